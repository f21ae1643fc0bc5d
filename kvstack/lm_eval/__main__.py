"""lm-evaluation-harness's own command, which finds the model type `kvstack` because this package was imported."""

import sys

from lm_eval.__main__ import cli_evaluate

from ..errors import KVStackError

if __name__ == "__main__":
    try:
        cli_evaluate()
    except KVStackError as error:
        sys.exit(f"error: {error}")

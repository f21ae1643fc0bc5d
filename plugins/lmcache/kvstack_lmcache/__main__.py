"""`python -m kvstack_lmcache ...` is the command `lmcache ...`, with kvstack's serializer registered.

`python -m kvstack_lmcache measure` compares serializers.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

from . import register


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        from .measure import run

        run()
        return
    register()
    (command,) = entry_points(group="console_scripts", name="lmcache")
    sys.argv[0] = "lmcache"
    command.load()()


if __name__ == "__main__":
    main()

"""One of the processes that share a model: does all jobs in turn, and writes what comes out of each into a file.

python -m tests.parallel.worker RANK SIZE FOLDER
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from .jobs import JOBS, model_in


def main(rank: int, size: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    # a process that waits for another one that has failed ends too
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    model = model_in(folder, "llama")
    with torch.no_grad():
        for number, job in enumerate(JOBS.values()):
            try:
                out = job(model, folder)
            except Exception:
                out = traceback.format_exc()
            torch.save(out, folder / f"{number}-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

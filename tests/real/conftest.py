import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _all_cores():
    """Real models are large enough to gain from more threads."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))  # threads that wait for each other are slow
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def smollm2():
    from kvstack.models import load

    return load()


@pytest.fixture(scope="package")
def gemma3():
    from kvstack.models import GEMMA_MODEL, load

    return load(GEMMA_MODEL)

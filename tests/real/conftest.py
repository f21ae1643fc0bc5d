import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _all_cores():
    """Real models are large enough to gain from more threads."""
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="package")
def smollm2():
    from kvstack.models import load

    return load()

"""What holds for all tests of this repository, those of plugins included."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# a first example may build models; the machine decides how long that takes
settings.register_profile("kvstack", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("kvstack")

# without a GPU triton interprets kernels, and has to know so before anything imports it
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tiny models are faster on one thread, and test processes do not fight for the cores
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Calibrations of tiny models do not go into the user's cache; the default model stays where it is."""
    from kvstack.calibration import keep

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keep, "folder", lambda: tmp_path_factory.getbasetemp() / "calibrations")
        yield


@pytest.fixture(autouse=True)
def _inference():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


PLUGINS = Path(__file__).parent / "plugins"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Plugins that are not installed are left out; tests/test_plugins.py says which, and how they are."""
    if collection_path.parent == PLUGINS and (collection_path / "pyproject.toml").exists():
        module = f"kvstack_{collection_path.name.replace('-', '_')}"
        return True if importlib.util.find_spec(module) is None else None
    return None

"""The whole matrix runs when it is asked for, with `-m matrix`."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "matrix" in config.getoption("markexpr"):
        return
    whole = [item for item in items if item.get_closest_marker("matrix")]
    if whole:
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if item not in whole]

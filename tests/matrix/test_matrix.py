"""Every architecture, stage and mode: exact, close, or refused before anything is computed.

A small part runs with the other tests; `make matrix` runs all and writes the tables of docs/models.md.
"""

import pytest

from .architectures import NAMES, attentions
from .cells import run
from .modes import MODES
from .plan import EVERYDAY, EXACT, cells
from .table import Cell, write


def check(cells):
    wrong = [cell for cell in cells if cell.verdict.kind == "wrong"]
    assert not wrong, "\n".join(f"{c.name} {c.attention}, {c.mode}, {c.stack}: {c.verdict.words}" for c in wrong)


@pytest.mark.parametrize("name", NAMES)
def test_the_empty_stack_is_a_dynamic_cache(name):
    attention = attentions(name)[0]
    modes = ("plain", "left padding")
    check([Cell(name, attention, mode, "empty", run(name, attention, mode, "empty")) for mode in modes])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EVERYDAY)
def test_every_mode(name, mode):
    attention = attentions(name)[0]
    check([Cell(name, attention, mode, stack, run(name, attention, mode, stack)) for stack in EXACT])


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "attention"), [(name, attention) for name in NAMES for attention in attentions(name)])
def test_all(name, attention):
    plan = cells(name, attention)
    found = [Cell(name, attention, mode, stack, run(name, attention, mode, stack)) for mode, stack in plan]
    write(name, attention, found)
    check(found)

"""The lengths of the benchmark's tasks, counted by a real tokenizer. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import AutoTokenizer

from kvstack.bench.measure.texts import documentation
from kvstack.bench.tasks import TASKS, make
from kvstack.models import source

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def count() -> Callable[[str], int]:
    tokenizer = AutoTokenizer.from_pretrained(source())
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 7680])
def test_tasks_fill_the_length_in_tokens(task, length, count):
    for sample in make(task, length, 2, 0, count, documentation()):
        (question,) = sample.questions
        assert 0.98 * length <= count(sample.text) + count(question.text) + question.new_tokens <= length
        assert all(answer in sample.text for answer in question.answers)

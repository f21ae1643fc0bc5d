"""LongBench's English data sets (Bai et al. 2023, arXiv 2308.14508), read from its own files.

The metrics and the numbers of new tokens are LongBench's. The wording of the prompts is this project's, one for each
family of data sets, with the question always last; so scores compare caches with each other, but not with
published ones. The Chinese data sets are left out: their metrics need a Chinese word segmenter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from ...errors import KVStackError
from .jsonl import entries
from .sample import Question, Sample

__all__ = ["DATASETS", "Dataset", "longbench_files"]


@dataclass(frozen=True)
class Dataset:
    ask: str
    """Follows the context; `{input}` is the sample's own question."""
    metric: str
    new_tokens: int
    one_line: bool = False


ANSWER = "\n\nQuestion: {input}\nAnswer from the text above, in a few words and without explanation.\nAnswer:"
SUMMARY = "\n\nSummarise the text above in a few paragraphs.\nSummary:"
MEETING = "\n\nFrom the meeting above, answer this: {input}\nAnswer in a few sentences.\nAnswer:"
MORE = "\n{input}"  # the context is solved examples, and the input ends where the answer begins
WHICH = (
    "\n\nSummary: {input}\n\nWhich of the numbered paragraphs above does it summarise? "
    "Answer with the paragraph's name, as in Paragraph 1.\nAnswer:"
)
COUNT = "\n\nSome of the paragraphs above are repeated. How many different ones are there? Give the number.\nAnswer:"
CODE = "\n{input}\nThe next line of this code:\n"

DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "narrativeqa": Dataset(ANSWER, "f1", 128),
        "qasper": Dataset(ANSWER, "f1", 128),
        "multifieldqa_en": Dataset(ANSWER, "f1", 64),
        "hotpotqa": Dataset(ANSWER, "f1", 32),
        "2wikimqa": Dataset(ANSWER, "f1", 32),
        "musique": Dataset(ANSWER, "f1", 32),
        "gov_report": Dataset(SUMMARY, "rouge_l", 512),
        "qmsum": Dataset(MEETING, "rouge_l", 512),
        "multi_news": Dataset(SUMMARY, "rouge_l", 512),
        "trec": Dataset(MORE, "classes", 64, one_line=True),
        "triviaqa": Dataset(MORE, "f1", 32, one_line=True),
        "samsum": Dataset(MORE, "rouge_l", 128, one_line=True),
        "passage_count": Dataset(COUNT, "count", 32),
        "passage_retrieval_en": Dataset(WHICH, "retrieval", 32),
        "lcc": Dataset(CODE, "edit", 64),
        "repobench-p": Dataset(CODE, "edit", 64),
    }
)


def longbench_files(folder: Path, task: str, samples: int) -> list[Sample]:
    """The first `samples` of `folder/TASK.jsonl`; a task's name may end in `_e`, for LongBench-E.

    The context is whole, however long: it is the caller who cuts its middle out where the model cannot hold it.
    """
    dataset = DATASETS.get(task.removesuffix("_e"))
    if dataset is None:
        raise KVStackError(f"{task!r} is not an English data set of LongBench. Use one of {', '.join(DATASETS)}.")
    read = []
    for index, entry in enumerate(
        entries(
            folder / f"{task}.jsonl",
            ("input", "context", "answers"),
            samples,
            "LongBench's samples are files TASK.jsonl, with the fields input, context and answers.",
        )
    ):
        # a prefix that ends with a space would split the answer's first word otherwise than the model has learned
        asked = entry["input"].strip("\n").rstrip(" ")
        question = Question(
            _joined(dataset.ask, asked),
            tuple(entry["answers"]),
            dataset.new_tokens,
            dataset.metric,
            tuple(entry.get("all_classes") or ()),
            dataset.one_line,
        )
        read.append(Sample(task, entry["context"].rstrip("\n"), (question,), None, index, seed=None))
    return read


def _joined(ask: str, asked: str) -> str:
    """The question; without the line of the input where that is empty. No `format`: code is full of braces."""
    return ask.replace("{input}", asked) if asked else ask.replace("\n{input}", "")

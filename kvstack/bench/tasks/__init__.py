"""Tasks: the name of a task and a length come in; texts with questions go out, and later the scores of the answers.

Models and caches must not be known here: the caller brings the function that counts tokens.
"""

from .answers import DATASETS, Asked, Dataset, answer_files
from .longbench import longbench_files
from .making import TASKS, make
from .ruler import ruler_files
from .sample import Question, Sample
from .scoring import score

__all__ = [
    "DATASETS",
    "TASKS",
    "Asked",
    "Dataset",
    "Question",
    "Sample",
    "answer_files",
    "longbench_files",
    "make",
    "ruler_files",
    "score",
]

"""Tasks for the needle benchmark: long texts, questions about them, and the score of an answer.

    making      `make`: RULER's synthetic tasks, written anew, at any length
    ruler       `ruler_files`: the files that RULER's own generator writes
    longbench   `longbench_files`: the English data sets of LongBench
    scoring     `score`: one function for the answers to all of them

A `Sample` is a text and the questions about it, kept apart, so that a cache can compress the text before it sees what
is asked. Nothing here loads a model: lengths are counted by a function that the caller brings.
"""

from .longbench import longbench_files
from .making import TASKS, make
from .ruler import ruler_files
from .sample import Question, Sample
from .scoring import score

__all__ = ["TASKS", "Question", "Sample", "longbench_files", "make", "ruler_files", "score"]

"""kvpress, driven as a process: it needs transformers < 5.3, so it has an environment of its own.

`make peers` builds that environment in `.venv-peers`; `KVSTACK_PEERS` names another one.

    with KvPress(find(), folder) as peer:
        log_probs, share, simulated = peer.read(ids, context, Press("snapkv", keep=0.2))
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from ...errors import KVStackError

__all__ = ["DENSE", "PRESSES", "Answer", "KvPress", "Press", "Reading", "find", "missing"]

DENSE = "dense"
"""Name of no press at all: the model as this older transformers runs it, which must agree with kvstack's own."""
WORKER = Path(__file__).with_name("kvpress_worker.py")
PROJECT = Path(__file__).parents[3]


class Known(NamedTuple):
    """A press of kvpress, what it wraps, and which of its settings a spec may name."""

    press: str
    settings: tuple[str, ...] = ()
    inside: str | None = None


SNAPKV = ("window_size", "kernel_size")
EXPECTED = ("n_future_positions", "n_sink", "use_covariance", "use_vnorm", "epsilon")
PRESSES = {
    DENSE: Known(""),
    "snapkv": Known("SnapKVPress", SNAPKV),
    "expected": Known("ExpectedAttentionPress", EXPECTED),
    "keydiff": Known("KeyDiffPress"),
    "tova": Known("TOVAPress"),
    "streaming": Known("StreamingLLMPress", ("n_sink",)),
    "knorm": Known("KnormPress"),
    "random": Known("RandomPress"),
    "kvzip": Known("KVzipPress", ("layerwise", "n_sink", "kvzip_plus_normalization", "chunk_size")),
    "ada-snapkv": Known("AdaKVPress", SNAPKV, "SnapKVPress"),
    "ada-expected": Known("AdaKVPress", EXPECTED, "ExpectedAttentionPress"),
}


@dataclass(frozen=True)
class Press:
    """A press by its name in `PRESSES`, the share of tokens it keeps, and its own settings."""

    name: str
    keep: float
    settings: Mapping[str, Any] = field(default_factory=dict)

    def asked(self, tokens: int) -> dict[str, Any] | None:
        """Return the orders for the worker, for a text of so many tokens."""
        if self.name == DENSE:
            return None
        known, settings = PRESSES[self.name], dict(self.settings)
        if known.settings == SNAPKV:
            # kvpress' own 64 is a bit worse on texts like these, and far worse where fewer than 64 tokens are kept
            settings.setdefault("window_size", max(1, min(32, int(self.keep * tokens) // 2)))
        # kvpress rounds tokens * (1 - ratio) down, and 1000 * (1 - 0.8) is a little less than 200
        ratio = max(0.0, 1 - self.keep - 1e-9)
        return {"name": known.press, "inside": known.inside, "ratio": ratio, "settings": settings}


class Reading(NamedTuple):
    log_probs: Tensor
    """(scored, vocabulary), float32: after each token behind the context that has a successor."""
    share: float
    """Bytes held when the context was read, as a share of a dense bfloat16 cache's."""
    simulated: bool
    """True if the press only hides tokens: the bytes are then those it would save."""


class Answer(NamedTuple):
    ids: list[int]
    share: float
    """Bytes held after the answer."""
    simulated: bool


def find() -> Path | None:
    """The python of the environment that has kvpress: `$KVSTACK_PEERS`, or `.venv-peers` next to pyproject.toml."""
    folder = Path(os.environ.get("KVSTACK_PEERS") or PROJECT / ".venv-peers").expanduser()
    python = folder / "bin" / "python"
    return python if python.exists() else None


def missing() -> str | None:
    """Why kvpress cannot run and how to get it; None where it can."""
    if find():
        return None
    if named := os.environ.get("KVSTACK_PEERS"):
        return f"KVSTACK_PEERS={named} holds no bin/python. Name the folder that `make peers` made."
    return "kvpress has no environment yet. Run `make peers`."


class KvPress:
    """A model in a process with kvpress, which starts with the first request.

    Parameters
    ----------
    python : Path
        the interpreter of the environment, from `find`.
    model : path of the model's folder
    dtype : name of the torch dtype
    threads : threads of the process
    """

    def __init__(self, python: Path, model: str | Path, dtype: str = "float32", threads: int = 2) -> None:
        self.command = [str(python), "-I", str(WORKER), str(model), dtype, str(threads)]
        self.threads = threads
        self.versions: dict[str, str] = {}
        """Of the worker's packages, once it runs."""
        self._process: subprocess.Popen[str] | None = None
        self._stderr: IO[str] | None = None

    def __enter__(self) -> KvPress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, ids: Tensor, context: int, press: Press) -> Reading:
        """Compress the first `context` tokens of `ids` (1, T) and score the others, the last one excepted."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "log_probs.safetensors"
            request = {"op": "read", "ids": ids[0].tolist(), "context": context, "out": str(out)}
            reply = self._ask(request, press.asked(context))
            return Reading(load_file(out)["log_probs"], reply["share"], reply["simulated"])

    def answer(self, text: Tensor, question: Tensor, new_tokens: int, press: Press, blind: bool) -> Answer:
        """Generate greedily after `text` (1, T) and `question` (1, Q).

        With `blind` the press works on the text alone and the question is fed afterwards, else on both.
        """
        request = {"op": "answer", "text": text[0].tolist(), "question": question[0].tolist(), "new": new_tokens}
        tokens = text.shape[1] + (0 if blind else question.shape[1])
        reply = self._ask({**request, "blind": blind}, press.asked(tokens))
        return Answer(reply["ids"], reply["share"], reply["simulated"])

    def close(self) -> None:
        """End the process; a later request starts another."""
        if self._process is None:
            return
        self._process.kill()  # it holds nothing that is worth keeping
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            with suppress(BrokenPipeError):  # what a dead worker never read
                stream.close()
        self._process = None

    def _ask(self, request: dict[str, Any], press: dict[str, Any] | None) -> dict[str, Any]:
        if self._process is None:
            self._start()
        reply = self._exchange({**request, "press": press})
        if "error" in reply:
            raise KVStackError(f"kvpress failed with {press['name'] if press else 'no press'}: {reply['error']}")
        return reply

    def _start(self) -> None:
        # a file, since nobody reads a pipe while the worker writes its warnings
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(self.threads)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self.command, stdin=pipe, stdout=pipe, stderr=self._stderr, text=True, env={**os.environ, **quiet}
        )
        self.versions = self._exchange(None)

    def _exchange(self, request: dict[str, Any] | None) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            if request is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code, last = self._process.wait(), self._last_words()
            self.close()
            raise KVStackError(f"the process with kvpress died with code {code}. It last said:\n{last}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _last_words(self, lines: int = 8) -> str:
        assert self._stderr is not None
        self._stderr.seek(0)
        return "\n".join(self._stderr.read().splitlines()[-lines:])

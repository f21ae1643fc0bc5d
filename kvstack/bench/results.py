"""Figures on disk: JSON lines that are only ever appended, so that an interrupted run goes on where it stopped.

    {"bench": "quality", "key": {...}, "figures": {...}, "environment": {...}}

`key` names what was measured (a context, a window of text, a cache, ...). A line counts for a later run when its key
and its environment are the same, apart from the commit: the digest of the sources says whether the code was. The code
of a plugin is part of the key of the stacks that use it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import KVStackError

__all__ = ["Figures", "Record", "Results", "load", "name", "read", "strict"]

Record = dict[str, Any]
READERS_ONLY = ("commit",)
MEASURED = (
    "cache", "context", "domain", "mode", "plugins", "rows", "sample", "task", "text", "texts", "variant", "window",
)  # fmt: skip
"""Names in a key that say what was measured; the others say how."""


class Figures(NamedTuple):
    """The figures of one benchmark."""

    rows: list[Record]
    """Keys and figures together."""
    environment: Mapping[str, Any]
    """Their origin: model, versions, hardware, seed, ..."""


class Results:
    """The figures of one benchmark in `folder`, or of this run alone without a folder."""

    def __init__(self, bench: str, folder: Path | None, environment: Mapping[str, Any]) -> None:
        self.bench, self.environment = bench, dict(environment)
        self.path = None if folder is None else folder / f"{bench}.jsonl"
        self._known: dict[str, Record] = {}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for record in read(self.path):
                if strict(record["environment"]) == strict(self.environment):
                    self._known[name(record["key"])] = record["figures"]

    def get(self, **key: Any) -> Record | None:
        """The figures of `key`, or None where they are still to be measured."""
        return self._known.get(name(key))

    def add(self, figures: Mapping[str, Any], **key: Any) -> None:
        record = {"bench": self.bench, "key": key, "figures": figures, "environment": self.environment}
        line = json.dumps(record)
        self._known[name(key)] = json.loads(line)["figures"]  # the same whether measured now or read again
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def figures(self, keys: Iterable[Mapping[str, Any]]) -> Figures:
        """Those of `keys` that are there, in this order."""
        rows = [{**key, **self._known[name(key)]} for key in keys if name(key) in self._known]
        return Figures(rows, self.environment)


def read(path: Path) -> list[Record]:
    """All records of a file. A last line that an interruption cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")  # the next line must not continue it
        del lines[-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            record["bench"], record["key"], record["figures"], record["environment"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise KVStackError(f"{path}, line {number} is not a benchmark record. Name another folder.") from None
        records.append(record)
    return records


def load(folder: Path, bench: str) -> Figures:
    """The figures of one benchmark in a folder that belong together; no rows where there are none.

    Those of the newest environment and settings, of each key the newest: figures of other code, another model, or of
    more tokens scored do not mix.
    """
    records = read(folder / f"{bench}.jsonl")
    if not records:
        return Figures([], {})
    environment = records[-1]["environment"]
    wanted = strict(environment)
    here = [record for record in records if strict(record["environment"]) == wanted]
    how = _settings(here[-1]["key"])
    plugins = {record["key"].get("cache"): record["key"].get("plugins") for record in here}  # the last one counts
    newest = {
        name(key): record
        for record in here
        if _settings(key := record["key"]) == how and key.get("plugins") == plugins[key.get("cache")]
    }
    return Figures([{**record["key"], **record["figures"]} for record in newest.values()], environment)


def _settings(key: Mapping[str, Any]) -> str:
    """Return the part of a key that says how something was measured, as a string."""
    return name({what: value for what, value in key.items() if what not in MEASURED})


def name(key: Mapping[str, Any]) -> str:
    """One string for equal keys; a setting that is None is one that was left alone."""
    return json.dumps({what: value for what, value in key.items() if value is not None}, sort_keys=True)


def strict(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of an environment that must be equal for two figures to be compared."""
    return {what: value for what, value in environment.items() if what not in READERS_ONLY}

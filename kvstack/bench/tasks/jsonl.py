"""Files of one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import KVStackError

__all__ = ["entries"]


def entries(path: Path, fields: Sequence[str], count: int | None, layout: str) -> list[dict[str, Any]]:
    """The first `count` objects of a file, all if None, each with all of `fields`; `layout` says what files there
    should be."""
    if not path.is_file():
        raise KVStackError(f"{path} does not exist. {layout}")
    objects: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(objects) == count:
                break
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise KVStackError(f"{path}, line {number}: no JSON object: {error}.") from error
            missing = [name for name in fields if name not in entry]
            if missing:
                raise KVStackError(f"{path}, line {number}: no {' and no '.join(missing)}. {layout}")
            objects.append(entry)
    if not objects:
        raise KVStackError(f"{path} holds no sample. {layout}")
    return objects

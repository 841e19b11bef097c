"""JSON as logs carry it: one object, no name twice, bounded in size and depth."""

from __future__ import annotations

import json
from typing import Any, Final

MAX_RECORD_SIZE: Final = 1 << 20


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def load(data: bytes) -> Any:
    """Return the value that `data` are.

    Raises:
        ValueError: the data are no JSON, too large or too deep, or an object has a name twice.
    """
    if len(data) > MAX_RECORD_SIZE:
        raise ValueError(f"a record of {len(data)} bytes")
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def load_log(data: bytes) -> Any:
    """Return the value of a whole log that is one JSON text; its size is bounded by the caller.

    Raises:
        ValueError: the data are no JSON or too deep, or an object has a name twice.
    """
    try:
        return json.loads(data, object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def dump(value: Any) -> bytes:
    """Return JSON in its shortest form, names in the order that they have."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")

"""The filter language of ListInstances: terms joined by AND (AIP-160, a small part of it)."""

from __future__ import annotations

import re
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.store.model import Filter, InstanceState

_MAX_LENGTH: Final = 4096
_AND: Final = re.compile(r"\s+AND\s+")
_TERM: Final = re.compile(r"(?P<field>[A-Za-z][A-Za-z0-9._/-]*)\s*(?P<operator>[=:])\s*(?P<value>\"[^\"]*\"|[^\s\"]+)")


def parse_filter(text: str) -> Filter:
    """Parse `state=ON AND labels.team=web AND name:web-`; an empty text matches all.

    Raises:
        InvalidArgumentError: FILTER_INVALID.
    """
    if not text.strip():
        return Filter()
    if len(text) > _MAX_LENGTH:
        raise _invalid("the filter is too long")
    state: InstanceState | None = None
    name: str | None = None
    prefix: str | None = None
    labels: dict[str, str] = {}
    for term in _AND.split(text.strip()):
        match = _TERM.fullmatch(term.strip())
        if match is None:
            raise _invalid(f"{term[:80]!r} is no term")
        value = match["value"].strip('"')
        match match["field"], match["operator"]:
            case "state", "=":
                if value not in list(InstanceState):
                    raise _invalid(f"there is no state {value[:40]!r}")
                state = InstanceState(value)
            case "name", "=":
                name = value
            case "name", ":":
                prefix = value
            case field, "=" if field.startswith("labels."):
                labels[field.removeprefix("labels.")] = value
            case field, operator:
                raise _invalid(f"{field[:40]!r} can't be compared with {operator!r}")
    return Filter(state, name, prefix, labels)


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "FILTER_INVALID",
        message,
        subject="filter",
        remedy="terms are state=ON, name=web-1, name:web-, labels.KEY=VALUE, joined by AND",
    )

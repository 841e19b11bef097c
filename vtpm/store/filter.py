"""The filter language of ListInstances: terms joined by AND (AIP-160, a small part of it)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from vtpm.errors import InvalidArgumentError
from vtpm.store.model import Filter, InstanceState

_MAX_LENGTH: Final = 4096
_AND: Final = re.compile(r"\s+AND\s+")
_TERM: Final = re.compile(r"(?P<field>[A-Za-z][A-Za-z0-9._/-]*)\s*(?P<operator>[=:])\s*(?P<value>\"[^\"]*\"|[^\s\"]+)")
_LABEL: Final = "labels."


def parse_filter(text: str) -> Filter:
    """Parse `state=ON AND labels.team=web AND name:web-`; an empty text matches all.

    Raises:
        InvalidArgumentError: FILTER_INVALID.
    """
    if not text.strip():
        return Filter()
    if len(text) > _MAX_LENGTH:
        raise _invalid("the filter is too long")
    terms: dict[tuple[str, str], str] = {}
    for field, operator, value in _terms(text.strip()):
        if (field, operator) in terms:
            raise _invalid(f"{field[:40]!r} is named twice, and terms are joined by AND")
        terms[field, operator] = value
    state: InstanceState | None = None
    labels: dict[str, str] = {}
    for (field, operator), value in terms.items():
        match field, operator:
            case "state", "=":
                if value not in list(InstanceState):
                    raise _invalid(f"there is no state {value[:40]!r}")
                state = InstanceState(value)
            case "name", ("=" | ":"):
                pass
            case _, "=" if field.startswith(_LABEL) and field != _LABEL:
                labels[field.removeprefix(_LABEL)] = value
            case _:
                raise _invalid(f"{field[:40]!r} can't be compared with {operator!r}")
    return Filter(state, terms.get(("name", "=")), terms.get(("name", ":")), labels)


def _terms(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (field, operator, value) of each term; a quoted value may hold anything but a quote."""
    at = 0
    while True:
        match = _TERM.match(text, at)
        if match is None:
            raise _invalid(f"{text[at : at + 80]!r} is no term")
        yield match["field"], match["operator"], match["value"].strip('"')
        at = match.end()
        if at == len(text):
            return
        joint = _AND.match(text, at)
        if joint is None:
            raise _invalid(f"{text[at : at + 80]!r} is no term joined by AND")
        at = joint.end()


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "FILTER_INVALID",
        message,
        subject="filter",
        remedy="terms are state=ON, name=web-1, name:web-, labels.KEY=VALUE, joined by AND",
    )

"""The grammar of swtpm's option values, `name=value,flag,…`: which fields an option has, and how each may be written.

As swtpm 0.7.1 reads them, so that no script has to be changed: a name without a value stands for `true`; what is no number is
refused; a flag is set by `true` or `1` in any case and unset by anything else; of a field given twice the first one counts.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Final

from vtpm.errors import InvalidArgumentError

_NUMBER: Final = re.compile(r"\s*([+-]?)([0-9]+)", re.ASCII)
_OCTAL: Final = re.compile(r"\s*\+?([0-7]+)", re.ASCII)
# With the base in front, as strtol(3) takes them.
_ANY_BASE: Final = re.compile(r"\s*\+?(?:0[xX]([0-9a-fA-F]+)|0([0-7]+)|(0|[1-9][0-9]*))", re.ASCII)
_MAX_NUMBER: Final = (1 << 31) - 1
_MAX_ID: Final = (1 << 32) - 1
_MAX_MODE: Final = 0o777


class Kind(enum.Enum):
    """What a field's value is."""

    TEXT = enum.auto()
    NUMBER = enum.auto()
    FLAG = enum.auto()
    MODE = enum.auto()
    USER = enum.auto()
    GROUP = enum.auto()


def refused(message: str, remedy: str = "") -> InvalidArgumentError:
    """Return the error of a command line that is not taken."""
    return InvalidArgumentError("USAGE", message, remedy=remedy)


def parse_fields(what: str, text: str, kinds: Mapping[str, Kind]) -> dict[str, str]:
    """Return the fields of an option by their names, each as `_value` writes it; `what` names the option in errors.

    A flag that is set is there, and one that is not is missing. A descriptor or a port below 0 is missing too: swtpm takes it
    for none.

    Raises:
        InvalidArgumentError: USAGE.
    """
    found: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if name not in kinds or (equals and not value):
            raise refused(f"Error parsing {what} options: Unknown option '{part}'")
        value = _value(what, name, kinds[name], value if equals else "true")
        # The first one counts, whatever it says.
        found.setdefault(name, value)
    return {name: value for name, value in found.items() if value}


def _value(what: str, name: str, kind: Kind, text: str) -> str:
    """Return a value as the rest of the program takes it: a number in decimal, a mode in octal; empty for none."""
    match kind:
        case Kind.TEXT:
            return text
        case Kind.FLAG:
            return "true" if text.lower() in ("true", "1") else ""
        case Kind.NUMBER:
            number = _NUMBER.fullmatch(text)
            if number is None or int(number[2]) > _MAX_NUMBER:
                raise refused(f"Error parsing {what} options: '{text}' is no value of {name}")
            return "" if number[1] == "-" else str(int(number[2]))
        case Kind.MODE:
            mode = _OCTAL.fullmatch(text)
            if mode is None or int(mode[1], 8) > _MAX_MODE:
                raise refused(f"Error parsing {what} options: '{text}' is no mode", "give three octal digits, such as 0640")
            return f"{int(mode[1], 8):o}"
        case Kind.USER | Kind.GROUP:
            return str(_id(what, name, kind, text))


def _id(what: str, name: str, kind: Kind, text: str) -> int:
    """Return the number of a user or group, which is given by its number or its name."""
    number = _NUMBER.fullmatch(text)
    if number is not None:
        if number[1] == "-" or int(number[2]) >= _MAX_ID:
            raise refused(f"Error parsing {what} options: {name} {text} outside valid range")
        return int(number[2])
    try:
        if kind is Kind.USER:
            import pwd

            return pwd.getpwnam(text).pw_uid
        import grp

        return grp.getgrnam(text).gr_gid
    except KeyError:
        noun = "User" if kind is Kind.USER else "Group"
        raise refused(f"Error parsing {what} options: {noun} '{text}' does not exist.") from None


def any_number(what: str, text: str, limit: int = _MAX_NUMBER) -> int:
    """Return a number that is an option by itself (`--port`, `--fd`), from 0 to `limit`.

    Raises:
        InvalidArgumentError: USAGE.
    """
    found = _ANY_BASE.fullmatch(text)
    if found is not None:
        number = int(found[1], 16) if found[1] else int(found[2], 8) if found[2] else int(found[3])
        if number <= limit:
            return number
    raise refused(f"Cannot parse {what} '{text}'.", f"give a number from 0 to {limit}")

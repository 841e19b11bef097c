"""Page tokens: opaque to the caller, and never trusted when they come back."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
import uuid
from typing import Final

from vtpm.errors import InvalidArgumentError

# Format version u8, id of the last instance given out, the beginning of SHA-256 of the filter that the listing began with.
_TOKEN: Final = struct.Struct(">B16s8s")
_TOKEN_VERSION: Final = 1


def make_page_token(last: uuid.UUID, filter_text: str) -> str:
    """Return the token of the page that follows the instance `last`."""
    token = _TOKEN.pack(_TOKEN_VERSION, last.bytes, _filter_mark(filter_text))
    return base64.urlsafe_b64encode(token).decode().rstrip("=")


def parse_page_token(token: str, filter_text: str) -> uuid.UUID | None:
    """Return the id behind which the page begins; None for the first page, whose token is empty.

    Raises:
        InvalidArgumentError: PAGE_TOKEN_INVALID, no token of ours, or one of a listing with another filter.
    """
    if not token:
        return None
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        version, last, mark = _TOKEN.unpack(raw)
    except (binascii.Error, struct.error, ValueError):
        raise _invalid("the page token was not made by this service") from None
    if version != _TOKEN_VERSION:
        raise _invalid("the page token is of another version of the service")
    if mark != _filter_mark(filter_text):
        raise _invalid("the page token belongs to a listing with another filter")
    return uuid.UUID(bytes=last)


def _filter_mark(filter_text: str) -> bytes:
    return hashlib.sha256(filter_text.strip().encode()).digest()[:8]


def _invalid(message: str) -> InvalidArgumentError:
    return InvalidArgumentError("PAGE_TOKEN_INVALID", message, remedy="list again from the first page, without a token")

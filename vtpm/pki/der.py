"""DER by hand (X.690): the few types that certificates are made of.

A certificate is put together from parts that were encoded once, so that what is left per certificate is a signature. It is also
what makes extensions and attribute certificates possible that `cryptography` has no types for.
"""

from __future__ import annotations

import datetime as dt
import functools
from typing import Final

SEQUENCE: Final = 0x30
SET: Final = 0x31
_CONTEXT: Final = 0x80
_CONSTRUCTED: Final = 0x20
# RFC 5280, 4.1.2.5: UTCTime through 2049, GeneralizedTime after.
_LAST_UTC_YEAR: Final = 2049
TRUE: Final = b"\x01\x01\xff"
NULL: Final = b"\x05\x00"


def encode(tag: int, content: bytes) -> bytes:
    """Return one element: tag, length, content."""
    size = len(content)
    if size < 0x80:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def sequence(*parts: bytes) -> bytes:
    """SEQUENCE of encoded elements."""
    return encode(SEQUENCE, b"".join(parts))


def set_of(*parts: bytes) -> bytes:
    """SET OF encoded elements, in DER's order."""
    return encode(SET, b"".join(sorted(parts)))


def tagged(number: int, content: bytes) -> bytes:
    """Context tag around encoded elements: EXPLICIT, or IMPLICIT of a constructed type whose content is given."""
    return encode(_CONTEXT | _CONSTRUCTED | number, content)


def tagged_primitive(number: int, content: bytes) -> bytes:
    """IMPLICIT context tag of a primitive type whose content is given."""
    return encode(_CONTEXT | number, content)


def integer(value: int) -> bytes:
    """INTEGER."""
    return encode(0x02, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def enumerated_content(value: int) -> bytes:
    """Content of an ENUMERATED or INTEGER, for an IMPLICIT tag."""
    return integer(value)[2:]


def enumerated(value: int) -> bytes:
    """ENUMERATED."""
    return encode(0x0A, enumerated_content(value))


def octets(content: bytes) -> bytes:
    """OCTET STRING."""
    return encode(0x04, content)


def bits(content: bytes, unused: int = 0) -> bytes:
    """BIT STRING with `unused` bits at its end."""
    return encode(0x03, bytes((unused,)) + content)


def utf8(text: str) -> bytes:
    """UTF8String."""
    return encode(0x0C, text.encode())


def ia5(text: str) -> bytes:
    """IA5String; `text` is ASCII."""
    return encode(0x16, text.encode("ascii"))


@functools.cache
def oid(dotted: str) -> bytes:
    """OBJECT IDENTIFIER from its dotted form."""
    first, second, *rest = (int(arc) for arc in dotted.split("."))
    content = bytearray()
    for arc in (first * 40 + second, *rest):
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(0x80 | (arc & 0x7F))
        content += bytes(reversed(groups))
    return encode(0x06, bytes(content))


def generalized_time(moment: dt.datetime) -> bytes:
    """GeneralizedTime of an aware `moment`, in whole seconds."""
    # Not strftime, which writes years before 1000 without their zeros.
    text = moment.astimezone(dt.UTC).isoformat(timespec="seconds")
    return encode(0x18, text[:19].translate({ord(c): None for c in "-:T"}).encode() + b"Z")


def time(moment: dt.datetime) -> bytes:
    """RFC 5280's Time: UTCTime through 2049, GeneralizedTime after."""
    encoded = generalized_time(moment)
    if moment.astimezone(dt.UTC).year > _LAST_UTC_YEAR:
        return encoded
    return encode(0x17, encoded[4:])

"""Messages as nobody sends them: any protobuf message, of any of its fields, with the values that break things."""

from __future__ import annotations

import random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from vtpm.engine.framing import LENGTH, frame

_POWERS = tuple(1 << bits for bits in (16, 31, 32, 63))
_EDGES = (0, 1, 2, 23, 24, 127, 128, 255, *_POWERS, *(power - 1 for power in _POWERS), (1 << 64) - 1)
_SIZES = (0, 0, 1, 2, 7, 10, 16, 20, 32, 33, 48, 64, 300, 4096, 4097)
_TEXTS = ("", "EK", "AK", "ECC_P256", "sha256", "INTERNAL", "A_REASON", "a reason", "\0", "\n", "é" * 50, "x" * 3000, "%s{}[]")
_BITS = {
    FieldDescriptor.TYPE_UINT32: (0, 32),
    FieldDescriptor.TYPE_UINT64: (0, 64),
    FieldDescriptor.TYPE_INT32: (31, 31),
    FieldDescriptor.TYPE_INT64: (63, 63),
    FieldDescriptor.TYPE_ENUM: (31, 31),
}


def filled(kind: type[Message], rng: random.Random, depth: int = 3) -> Message:
    """Return a message of a kind, with some of its fields."""
    message = kind()
    fill(message, rng, depth)
    return message


def fill(message: Message, rng: random.Random, depth: int = 3) -> None:
    """Give a message some more fields."""
    fields: list[Any] = list(message.DESCRIPTOR.fields)
    for field in rng.sample(fields, rng.randint(0, min(len(fields), 4))):
        if field.is_repeated:
            many = getattr(message, field.name)
            for _ in range(rng.choice((0, 1, 2, 9, 10, 11, 40))):
                if field.type == FieldDescriptor.TYPE_MESSAGE:
                    if depth:
                        fill(many.add(), rng, depth - 1)
                else:
                    many.append(_value(field, rng))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            part = getattr(message, field.name)
            part.SetInParent()
            if depth:
                fill(part, rng, depth - 1)
        else:
            setattr(message, field.name, _value(field, rng))


def _value(field: Any, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.randbytes(rng.choice(_SIZES))
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(_TEXTS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice((0.0, -1.0, float("inf"), float("nan"), 1e300))
    below, above = _BITS[field.type]
    number: int = rng.choice(_EDGES) if rng.random() < 0.8 else rng.getrandbits(64)
    low, high = -(1 << below) if below else 0, (1 << above) - 1
    return low + number % (high - low + 1) if below and rng.random() < 0.3 else min(number, high)


def noise(rng: random.Random) -> bytes:
    """Return bytes that are no message, or the beginning of one."""
    return rng.randbytes(rng.choice((1, 2, 3, 4, 7, 8, 64, 1000)))


def broken_frame(rng: random.Random, whole: bytes) -> bytes:
    """Return a frame as it should not be: cut off, too long, of another length than it says, or as it is."""
    match rng.randrange(6):
        case 0:
            return LENGTH.pack(rng.choice((0, 5 << 20, 0xFFFFFFFF))) + whole
        case 1:
            return LENGTH.pack(len(whole) + rng.randint(1, 9)) + whole
        case 2:
            return frame(whole)[: rng.randint(1, len(whole) + 3)]
        case 3:
            changed = bytearray(whole or b"\0")
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            return frame(bytes(changed))
        case _:
            return frame(whole)

"""Hash algorithms of event logs by TPM_ALG_ID (TCG Algorithm Registry, table 3)."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Final

SHA1: Final = 0x0004
SHA256: Final = 0x000B
SHA384: Final = 0x000C
SHA512: Final = 0x000D
SM3_256: Final = 0x0012

# (name as hashlib and IMA write it, digest size in bytes)
ALGORITHMS: Final = {
    SHA1: ("sha1", 20),
    SHA256: ("sha256", 32),
    SHA384: ("sha384", 48),
    SHA512: ("sha512", 64),
    SM3_256: ("sm3", 32),
    0x0027: ("sha3_256", 32),
    0x0028: ("sha3_384", 48),
    0x0029: ("sha3_512", 64),
}
SIZES: Final = {alg_id: size for alg_id, (_, size) in ALGORITHMS.items()}
_BY_NAME: Final = {name: alg_id for alg_id, (name, _) in ALGORITHMS.items()} | {"sm3_256": SM3_256, "sm3-256": SM3_256}
_DIRECT: Final[dict[int, Callable[[bytes], hashlib._Hash]]] = {
    SHA1: functools.partial(hashlib.sha1, usedforsecurity=False),
    SHA256: hashlib.sha256,
    SHA384: hashlib.sha384,
    SHA512: hashlib.sha512,
}


def name(alg_id: int) -> str:
    """Return the algorithm's name, such as `sha256`, or its number where no name is known."""
    known = ALGORITHMS.get(alg_id)
    return known[0] if known else f"0x{alg_id:04x}"


def by_name(text: str) -> int | None:
    """Return the TPM_ALG_ID of a hash's name, such as `sha256`; none where the name is unknown."""
    return _BY_NAME.get(text.lower())


def hasher(alg_id: int) -> Callable[[bytes], hashlib._Hash] | None:
    """Return the constructor of a hash; none where this Python has not got the hash, such as SM3 on some systems."""
    direct = _DIRECT.get(alg_id)
    if direct is not None:
        return direct
    known = ALGORITHMS.get(alg_id)
    if known is None or known[0] not in hashlib.algorithms_available:
        return None
    return functools.partial(hashlib.new, known[0])


def digest(alg_id: int, data: bytes) -> bytes | None:
    """Return the hash of `data`; none where this Python has not got the hash."""
    made = hasher(alg_id)
    return made(data).digest() if made else None

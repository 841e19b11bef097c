"""PCR banks, selections and the extend operation (TPM 2.0 Library, Part 1, 17; Part 2, 10.6 and 10.9.7)."""

from __future__ import annotations

import enum
import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vtpm.errors import InvalidArgumentError

PCR_COUNT: Final = 24
_SELECT_SIZE: Final = 3
_MAX_SELECTIONS: Final = 16
_COUNT: Final = struct.Struct(">I")
_SELECTION_HEAD: Final = struct.Struct(">HB")
_INDICES: Final = re.compile(r"(\d{1,2})(?:-(\d{1,2}))?")


class PcrBank(enum.Enum):
    """A PCR bank by its hash: (TPM_ALG_ID, digest size in bytes)."""

    SHA1 = (0x0004, 20)
    SHA256 = (0x000B, 32)
    SHA384 = (0x000C, 48)
    SHA512 = (0x000D, 64)

    @property
    def alg_id(self) -> int:
        """TPM_ALG_ID of the bank's hash."""
        return self.value[0]

    @property
    def digest_size(self) -> int:
        """Size in bytes of the bank's PCRs."""
        return self.value[1]

    @property
    def hash_name(self) -> str:
        """The hash as hashlib and tpm2-tools call it, such as `sha256`."""
        return self.name.lower()

    @classmethod
    def from_name(cls, name: str) -> PcrBank:
        """Return the bank called `name`, such as `sha256`.

        Raises:
            InvalidArgumentError: PCR_BANK_UNKNOWN.
        """
        for bank in cls:
            if bank.hash_name == name.lower():
                return bank
        raise _unknown_bank(name[:40])

    @classmethod
    def from_alg(cls, alg_id: int) -> PcrBank:
        """Return the bank of a TPM_ALG_ID.

        Raises:
            InvalidArgumentError: PCR_BANK_UNKNOWN.
        """
        bank = _BY_ALG.get(alg_id)
        if bank is None:
            raise _unknown_bank(f"0x{alg_id:04x}")
        return bank


_BY_ALG: Final = {bank.alg_id: bank for bank in PcrBank}


def _unknown_bank(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "PCR_BANK_UNKNOWN", f"there is no PCR bank {name!r}", remedy="use sha1, sha256, sha384 or sha512"
    )


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """PCR indices of one bank; kept sorted and distinct, as the TPM returns them."""

    bank: PcrBank
    indices: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= index < PCR_COUNT for index in self.indices):
            raise InvalidArgumentError("PCR_INDEX_INVALID", f"a PCR index is 0 to {PCR_COUNT - 1}")
        object.__setattr__(self, "indices", tuple(sorted(set(self.indices))))


def parse_selection(text: str) -> tuple[PcrSelection, ...]:
    """Parse `sha256:0-7,10+sha1:all`, as tpm2-tools writes selections and with ranges.

    Raises:
        InvalidArgumentError: PCR_SELECTION_INVALID, PCR_BANK_UNKNOWN or PCR_INDEX_INVALID.
    """
    selections = []
    for part in text.split("+")[: _MAX_SELECTIONS + 1]:
        name, colon, indices = part.partition(":")
        if not colon:
            raise _invalid_selection(part)
        selections.append(PcrSelection(PcrBank.from_name(name.strip()), _parse_indices(indices.strip())))
    if len({selection.bank for selection in selections}) != len(selections):
        raise InvalidArgumentError("PCR_SELECTION_INVALID", "a bank is named twice")
    return tuple(selections)


def _parse_indices(text: str) -> tuple[int, ...]:
    if text == "all":
        return tuple(range(PCR_COUNT))
    indices: list[int] = []
    for item in text.split(","):
        match = _INDICES.fullmatch(item.strip())
        if match is None:
            raise _invalid_selection(text)
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise _invalid_selection(text)
        indices.extend(range(first, last + 1))
    return tuple(indices)


def _invalid_selection(text: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "PCR_SELECTION_INVALID", f"{text[:80]!r} is no PCR selection", remedy="write it as sha256:0-7,10+sha1:all"
    )


def marshal_selections(selections: Sequence[PcrSelection]) -> bytes:
    """Return `selections` as TPML_PCR_SELECTION."""
    out = _COUNT.pack(len(selections))
    for selection in selections:
        bits = sum(1 << index for index in selection.indices)
        out += _SELECTION_HEAD.pack(selection.bank.alg_id, _SELECT_SIZE) + bits.to_bytes(_SELECT_SIZE, "little")
    return out


def unmarshal_selections(data: bytes) -> tuple[tuple[PcrSelection, ...], int]:
    """Parse a TPML_PCR_SELECTION at the beginning of `data`; return it and its size in bytes.

    Raises:
        InvalidArgumentError: PCR_SELECTION_INVALID or PCR_BANK_UNKNOWN.
    """
    try:
        (count,) = _COUNT.unpack_from(data)
        if count > _MAX_SELECTIONS:
            raise InvalidArgumentError("PCR_SELECTION_INVALID", "the selection names too many banks")
        offset, selections = _COUNT.size, []
        for _ in range(count):
            alg_id, size = _SELECTION_HEAD.unpack_from(data, offset)
            offset += _SELECTION_HEAD.size
            if not 0 < size <= _SELECT_SIZE or len(data) < offset + size:
                raise InvalidArgumentError("PCR_SELECTION_INVALID", "the selection's bit map is cut or too long")
            bits = int.from_bytes(data[offset : offset + size], "little")
            offset += size
            indices = tuple(index for index in range(PCR_COUNT) if bits >> index & 1)
            selections.append(PcrSelection(PcrBank.from_alg(alg_id), indices))
    except struct.error:
        raise InvalidArgumentError("PCR_SELECTION_INVALID", "the selection is cut") from None
    return tuple(selections), offset


def extend(bank: PcrBank, old: bytes, digest: bytes) -> bytes:
    """Return the PCR value after extending `old` with `digest`: H(old || digest) (TPM 2.0 Library, Part 1, 17.3).

    Raises:
        InvalidArgumentError: DIGEST_SIZE_INVALID, one of the two has not the bank's digest size.
    """
    if len(old) != bank.digest_size or len(digest) != bank.digest_size:
        raise InvalidArgumentError("DIGEST_SIZE_INVALID", f"a {bank.hash_name} digest has {bank.digest_size} bytes")
    return hashlib.new(bank.hash_name, old + digest).digest()


def pcr_digest(hash_name: str, values: Iterable[bytes]) -> bytes:
    """Return the pcrDigest of a quote: the hash over the selected values in selection order (Part 2, 10.12.1)."""
    digest = hashlib.new(hash_name)
    for value in values:
        digest.update(value)
    return digest.digest()


# tpm2-tools' `serialized` format is the C structs of tpm2-tss in little-endian: TPML_PCR_SELECTION, a count, TPML_DIGESTs.
_TOOLS_SELECTION: Final = struct.Struct("<HB4sx")
_TOOLS_SELECTIONS: Final = 16
_TOOLS_DIGEST: Final = struct.Struct("<H64s")
_TOOLS_DIGESTS: Final = 8


def to_tpm2_tools_pcrs(selections: Sequence[PcrSelection], values: Sequence[bytes]) -> bytes:
    """Return the file that `tpm2_quote -o` writes and `tpm2_checkquote -f` reads (format `serialized`).

    `values` are the digests in the order of `selections`, indices ascending within a bank.
    """
    out = struct.pack("<I", len(selections))
    for selection in selections:
        bits = sum(1 << index for index in selection.indices).to_bytes(4, "little")
        out += _TOOLS_SELECTION.pack(selection.bank.alg_id, _SELECT_SIZE, bits)
    out += bytes(_TOOLS_SELECTION.size * (_TOOLS_SELECTIONS - len(selections)))
    lists = [values[start : start + _TOOLS_DIGESTS] for start in range(0, len(values), _TOOLS_DIGESTS)]
    out += struct.pack("<I", len(lists))
    for part in lists:
        out += struct.pack("<I", len(part)) + b"".join(_TOOLS_DIGEST.pack(len(value), value) for value in part)
        out += bytes(_TOOLS_DIGEST.size * (_TOOLS_DIGESTS - len(part)))
    return out

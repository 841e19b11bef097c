"""What the readers of event logs return."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vtpm.eventlog.findings import Finding


class LogFormat(enum.StrEnum):
    """How a log is written."""

    TCG = "TCG crypto-agile"
    TCG_SHA1 = "TCG SHA-1"
    CCEL = "CCEL"
    IMA = "IMA binary"
    IMA_ASCII = "IMA ascii"
    CEL_TLV = "CEL TLV"
    CEL_JSON = "CEL JSON"
    SYSTEMD = "systemd userspace"
    UNKNOWN = "unknown"


# Events of logs that have no TCG event type get one of these in its place; TCG's are 32-bit unsigned.
CEL_CONTENT: Final = -1
SYSTEMD_CONTENT: Final = -2
IMA_TEMPLATE: Final = -3


@dataclass(frozen=True, slots=True)
class UnverifiedEvent:
    """One event as its log has it.

    Nothing in it is proven until a replay matches quoted registers. `data` is not proven even then, unless the digest is
    the hash of `data`. `register` is a PCR index, or for a CCEL the measurement register: 1 to 4 are RTMR 0 to 3.
    `digests` maps TPM_ALG_IDs to digests of that algorithm's size. `offset` is the record's first byte in the log.
    """

    number: int
    register: int
    event_type: int
    digests: Mapping[int, bytes]
    data: bytes
    offset: int


@dataclass(frozen=True, slots=True)
class UnverifiedLog:
    """What could be read of a log, with what was noticed on the way.

    `banks` maps TPM_ALG_IDs to digest sizes in bytes. `td` says that the registers are a trust domain's and no PCRs.
    """

    format: LogFormat
    banks: Mapping[int, int]
    events: tuple[UnverifiedEvent, ...]
    findings: tuple[Finding, ...]
    size_bytes: int
    read_bytes: int
    td: bool = False

    def register_name(self, register: int) -> str:
        """Return what a register is called, such as `PCR 4` or `RTMR 1`."""
        return register_name(register, td=self.td)


def register_name(register: int, *, td: bool) -> str:
    """Return what a register is called; `td` says that it is a trust domain's measurement register and no PCR."""
    if td:
        return "MRTD" if register == 0 else f"RTMR {register - 1}"
    return f"PCR {register}"

"""The event log of one TPM, as its worker keeps it: what was measured since the last power on, and who measured it.

Who it was is said by the daemon, which knows on whose socket a request came; never by the caller. Each has a part of the log
of its own, so that a guest that fills the log keeps nobody else from measuring.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import FailedPreconditionError, InvalidArgumentError
from vtpm.tpm.eventlog import EV_EFI_HCRTM_EVENT, event2, event2_size, parse_event_log, spec_id_header, startup_locality
from vtpm.tpm.pcr import PcrBank

if TYPE_CHECKING:
    from collections.abc import Iterable


class Origin(enum.IntEnum):
    """Who measured; the numbers are those of the link."""

    # Recorded by a worker of an earlier version, which did not say.
    UNKNOWN = pb.ORIGIN_UNKNOWN
    SERVICE = pb.ORIGIN_SERVICE
    OPERATOR = pb.ORIGIN_OPERATOR
    GUEST = pb.ORIGIN_GUEST
    VMM = pb.ORIGIN_VMM


# How many bytes of the log the events of each may take.
QUOTAS: Final[Mapping[Origin, int]] = {
    Origin.UNKNOWN: 16 << 10,
    Origin.SERVICE: 16 << 10,
    Origin.OPERATOR: 128 << 10,
    Origin.GUEST: 64 << 10,
    Origin.VMM: 4 << 10,
}
# More than all of these, and with its origins no more than a message of the link takes. Only a log that an earlier version
# began, which knew no parts, comes near.
MAX_EVENT_LOG_SIZE: Final = 240 << 10
_H_CRTM_PCR: Final = 0
_H_CRTM_LOCALITY: Final = 4
_H_CRTM_DATA: Final = b"HCRTM"
_REMEDY: Final = "reset the instance"


def origin_of(number: int) -> Origin:
    """Return the origin that a message names; UNKNOWN for one that this version does not know."""
    try:
        return Origin(number)
    except ValueError:
        return Origin.UNKNOWN


class EventLog:
    """Records of one TPM with `banks`, which are known once it was started."""

    def __init__(self) -> None:
        self._records = bytearray()
        # For each record whose it is and its size in bytes; the Spec ID record, which comes first, is not among them.
        self._entries: list[tuple[Origin, int]] = []
        # Bytes that the records of each take.
        self._used: Counter[Origin] = Counter()
        # Digests of an H-CRTM event that came before TPM2_Startup, when nobody could say which banks there are.
        self._h_crtm: tuple[bytes, ...] = ()

    def clear(self) -> None:
        """Begin anew: PCRs are fresh."""
        self._records.clear()
        self._entries.clear()
        self._used.clear()
        self._h_crtm = ()

    def bytes_for(self, banks: Sequence[PcrBank]) -> bytes:
        """Return the log, which begins with the Spec ID record."""
        self._place_h_crtm(banks)
        return bytes(self._records) or spec_id_header(banks)

    @property
    def origins(self) -> list[Origin]:
        """Whose each event is, in the order of the log, without the Spec ID record; nothing if that is not known of any."""
        origins = [origin for origin, _ in self._entries]
        return origins if any(origins) else []

    def check_room(self, origin: Origin, banks: Sequence[PcrBank], data: bytes) -> None:
        """Raise EVENT_LOG_FULL if `origin` has no room for an event with `data`."""
        size = event2_size(banks, data)
        if self._used[origin] + size > QUOTAS[origin] or len(self._records) + size > MAX_EVENT_LOG_SIZE:
            raise FailedPreconditionError(
                "EVENT_LOG_FULL",
                f"the part of the event log for events of origin {origin.name} is full ({QUOTAS[origin] >> 10} KiB); "
                "nothing was extended",
                remedy=_REMEDY,
            )

    def add(self, origin: Origin, pcr: int, event_type: int, digests: Mapping[PcrBank, bytes], data: bytes) -> None:
        """Record what was extended, with a digest for each bank."""
        self._place_h_crtm(tuple(digests))
        if not self._records:
            self._records += spec_id_header(tuple(digests))
        self._append(origin, event2(pcr, event_type, digests, data))

    def _append(self, origin: Origin, record: bytes) -> None:
        self._records += record
        self._entries.append((origin, len(record)))
        self._used[origin] += len(record)

    def h_crtm(self, digests: Sequence[bytes]) -> None:
        """Record an H-CRTM event before TPM2_Startup: the VMM's, with a digest for each bank that there may be.

        PCR 0 begins anew with each, so only the last one counts (TPM 2.0 Library, Part 1, 34.2).
        """
        self._h_crtm = tuple(digests)

    def _place_h_crtm(self, banks: Sequence[PcrBank]) -> None:
        if not self._h_crtm:
            return
        digests = {bank: digest for bank, digest in zip(PcrBank, self._h_crtm, strict=True) if bank in banks}
        # Nothing can have been measured before it.
        self.clear()
        self._records += spec_id_header(banks)
        self._append(Origin.VMM, startup_locality(banks, _H_CRTM_LOCALITY))
        self._append(Origin.VMM, event2(_H_CRTM_PCR, EV_EFI_HCRTM_EVENT, digests, _H_CRTM_DATA))

    # ---- hibernation -----------------------------------------------------------------------------------------------------

    def fill(self, snapshot: pb.Snapshot) -> None:
        """Put the log into a snapshot."""
        snapshot.events = bytes(self._records)
        snapshot.event_origins.extend(pb.Origin.ValueType(origin) for origin, _ in self._entries)
        snapshot.event_sizes.extend(size for _, size in self._entries)
        snapshot.h_crtm_digests.extend(self._h_crtm)

    def restore(self, snapshot: pb.Snapshot) -> None:
        """Go on with the log of a snapshot. In one of an earlier version nobody knows whose the events are."""
        self.clear()
        if not snapshot.events and not snapshot.h_crtm_digests:
            # As in most.
            return
        self._records += snapshot.events
        if len(snapshot.h_crtm_digests) == len(PcrBank):
            self._h_crtm = tuple(snapshot.h_crtm_digests)
        if len(snapshot.event_origins) == len(snapshot.event_sizes) and snapshot.event_sizes:
            origins = (origin_of(number) for number in snapshot.event_origins)
            self._entries = list(zip(origins, snapshot.event_sizes, strict=True))
        else:
            self._entries = [(Origin.UNKNOWN, size) for size in _sizes(snapshot.events)]
        for origin, size in self._entries:
            self._used[origin] += size


def _sizes(log: bytes) -> Iterable[int]:
    try:
        events = parse_event_log(log)
    except InvalidArgumentError:
        return
    for event in events:
        yield event2_size((), event.data) + sum(2 + len(digest) for digest in event.digests.values())

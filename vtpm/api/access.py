"""Who a server speaks to. The first gate is the socket's file permissions; this is what may be done behind it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final, Protocol

from vtpm.api.convert import instance_ref
from vtpm.errors import ErrorKind, InvalidArgumentError, VtpmError
from vtpm.instance.model import Origin
from vtpm.tpm.pcr import PCR_COUNT

MAX_LOCALITY: Final = 4
FIRMWARE_PCRS: Final = range(8)


class Access(Protocol):
    """What the callers of one server may do."""

    @property
    def role(self) -> str:
        """`operator` or `guest`, for the audit log."""

    @property
    def bound(self) -> str:
        """Id of the one instance that callers may use; empty for all."""

    def instance(self, asked: str) -> str:
        """Return the instance that a request which names `asked` goes to."""

    @property
    def origin(self) -> Origin:
        """Whose the events are that callers have recorded."""

    def locality(self, asked: int) -> int:
        """Return the locality that a command runs at."""

    def pcr(self, asked: int) -> int:
        """Return the PCR that a measurement goes to."""


@dataclass(frozen=True, slots=True)
class OperatorAccess:
    """Every instance, at every locality."""

    role: str = "operator"
    bound: str = ""
    origin: Origin = Origin.OPERATOR

    def instance(self, asked: str) -> str:
        """Return `asked`.

        Raises:
            InvalidArgumentError: it is missing or malformed.
        """
        return instance_ref(asked)

    def locality(self, asked: int) -> int:
        """Return `asked`.

        Raises:
            InvalidArgumentError: LOCALITY_INVALID.
        """
        if asked > MAX_LOCALITY:
            raise InvalidArgumentError("LOCALITY_INVALID", f"a locality is 0 to {MAX_LOCALITY}")
        return asked

    def pcr(self, asked: int) -> int:
        """Return `asked`.

        Raises:
            InvalidArgumentError: PCR_INDEX_INVALID.
        """
        return _pcr(asked)


class GuestAccess:
    """One instance, whoever is asked for, at locality 0; the PCRs of its firmware are not measured into."""

    role: Final = "guest"
    origin: Final = Origin.GUEST

    def __init__(self, instance: uuid.UUID, name: str) -> None:
        self.bound: Final = str(instance)
        self._names = frozenset(("", name, self.bound))

    def instance(self, asked: str) -> str:
        """Return the guest's own instance.

        Raises:
            VtpmError: PERMISSION_DENIED, INSTANCE_NOT_YOURS; the same whether the other instance exists or not.
        """
        if asked.removeprefix("instances/") not in self._names:
            raise VtpmError(
                "INSTANCE_NOT_YOURS",
                "this socket speaks for one instance, and the request names another",
                subject=asked[:80],
                remedy="leave `instance` empty",
                kind=ErrorKind.PERMISSION_DENIED,
            )
        return self.bound

    def locality(self, asked: int) -> int:
        """Return 0.

        Raises:
            VtpmError: PERMISSION_DENIED, LOCALITY_NOT_ALLOWED.
        """
        if asked:
            raise VtpmError(
                "LOCALITY_NOT_ALLOWED",
                "a guest speaks at locality 0",
                subject=self.bound,
                remedy="leave `locality` at 0",
                kind=ErrorKind.PERMISSION_DENIED,
            )
        return 0

    def pcr(self, asked: int) -> int:
        """Return `asked`, which is none of the PCRs that tell of the firmware (PC Client Firmware Profile, 3.3.4).

        Raises:
            InvalidArgumentError: PCR_INDEX_INVALID.
            VtpmError: PERMISSION_DENIED, PCR_NOT_FOR_GUESTS.
        """
        if asked in FIRMWARE_PCRS:
            raise VtpmError(
                "PCR_NOT_FOR_GUESTS",
                f"a guest measures into no PCR below {FIRMWARE_PCRS.stop}: those are for the platform and its firmware",
                subject=self.bound,
                remedy=f"use PCR {FIRMWARE_PCRS.stop} to {PCR_COUNT - 1}",
                kind=ErrorKind.PERMISSION_DENIED,
            )
        return _pcr(asked)


def _pcr(asked: int) -> int:
    if asked >= PCR_COUNT:
        raise InvalidArgumentError("PCR_INDEX_INVALID", f"a PCR index is 0 to {PCR_COUNT - 1}")
    return asked

"""Who a server speaks to. The first gate is the socket's file permissions; this is what may be done behind it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Final, Protocol

from vtpm.api.convert import instance_ref
from vtpm.errors import ErrorKind, InvalidArgumentError, VtpmError

MAX_LOCALITY: Final = 4


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

    def locality(self, asked: int) -> int:
        """Return the locality that a command runs at."""


@dataclass(frozen=True, slots=True)
class OperatorAccess:
    """Every instance, at every locality."""

    role: str = "operator"
    bound: str = ""

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


class GuestAccess:
    """One instance, whoever is asked for, at locality 0."""

    role: Final = "guest"

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

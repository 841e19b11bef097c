"""The one error family of the service.

Every error carries what the person who must act needs: a stable `reason`, the `subject` it happened to, a sentence, and
a `remedy` (a command or a setting). The borders map `kind` to a gRPC status code (`vtpm.api`) and to an exit code (`vtpm.cli`).
No secret, auth value or state byte ever goes into one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping


class ErrorKind(enum.Enum):
    """What class of trouble it is; the value is the name of the gRPC status code it maps to."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    DATA_LOSS = "DATA_LOSS"
    INTERNAL = "INTERNAL"


class VtpmError(Exception):
    """Base of every error the service raises on purpose.

    `reason` is a stable UPPER_SNAKE_CASE identifier, `subject` names the instance, file or row, `remedy` says what to do.
    """

    kind: ErrorKind = ErrorKind.INTERNAL

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        subject: str = "",
        remedy: str = "",
        kind: ErrorKind | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.subject = subject
        self.remedy = remedy
        self.metadata = dict(metadata or {})
        if kind is not None:
            self.kind = kind

    def __str__(self) -> str:
        """One line: subject, sentence, remedy."""
        text = f"{self.subject}: {self.message}" if self.subject else self.message
        return f"{text} ({self.remedy})" if self.remedy else text


class InvalidArgumentError(VtpmError):
    """A request or a value in it is malformed, whatever the state of the system."""

    kind = ErrorKind.INVALID_ARGUMENT


class NotFoundError(VtpmError):
    """The named thing does not exist."""

    kind = ErrorKind.NOT_FOUND


class AlreadyExistsError(VtpmError):
    """The name or id is taken."""

    kind = ErrorKind.ALREADY_EXISTS


class FailedPreconditionError(VtpmError):
    """The instance or the service is not in the state that the request needs."""

    kind = ErrorKind.FAILED_PRECONDITION


class ConflictError(VtpmError):
    """An etag, epoch or version did not match: somebody else was faster."""

    kind = ErrorKind.ABORTED


class UnavailableError(VtpmError):
    """A part of the service is not reachable just now; a retry may help."""

    kind = ErrorKind.UNAVAILABLE


class ConfigError(VtpmError):
    """The configuration can't be used."""

    kind = ErrorKind.FAILED_PRECONDITION


class SealedStateError(VtpmError):
    """A sealed blob or a wrapped key is damaged, swapped, truncated or of an unknown format (invariant 6)."""

    kind = ErrorKind.DATA_LOSS


class KeyProviderError(VtpmError):
    """A key provider refuses or fails."""

    kind = ErrorKind.FAILED_PRECONDITION


class AnchorError(VtpmError):
    """The freshness anchor is missing, damaged, another store's or out of reach: nothing is powered on (invariant 7)."""

    kind = ErrorKind.FAILED_PRECONDITION


class BackupError(VtpmError):
    """A backup is damaged, foreign or of an unknown format, or can't be restored here."""

    kind = ErrorKind.FAILED_PRECONDITION


class StoreError(VtpmError):
    """The store can't be read or written: full disk, read-only, locked, damaged."""

    kind = ErrorKind.UNAVAILABLE


class EngineError(VtpmError):
    """The engine host or a worker failed or can't be reached."""

    kind = ErrorKind.UNAVAILABLE


class TpmError(VtpmError):
    """The TPM answered a command of the service's own with a response code other than success.

    `rc` is the TPM_RC (TPM 2.0 Library, Part 2, 6.6).
    """

    kind = ErrorKind.FAILED_PRECONDITION

    def __init__(self, rc: int, name: str, message: str, *, subject: str = "", remedy: str = "") -> None:
        super().__init__(
            "TPM_ERROR", message, subject=subject, remedy=remedy, metadata={"tpm_rc": f"0x{rc:03x}", "tpm_rc_name": name}
        )
        self.rc = rc

"""The border that errors cross: a VtpmError becomes a rich gRPC status, anything else becomes an incident number.

grpc.aio would send an unhandled exception's text to the client, so what is here is a security control.
"""

from __future__ import annotations

import errno
import secrets
import traceback
from typing import TYPE_CHECKING, Final

import grpc
import structlog
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from vtpm.errors import ErrorKind, VtpmError

if TYPE_CHECKING:
    from grpc import Status

log: Final = structlog.get_logger("vtpm.api")

DOMAIN: Final = "vtpm"
# A status travels in trailers, which clients bound to 8 KiB.
_MAX_MESSAGE: Final = 1024
_MAX_VALUE: Final = 512
_MAX_METADATA: Final = 8

# Trouble of the host, whose texts name its files and processes: a guest hears that there is some, and what kind.
_HOST_TROUBLE: Final = frozenset((ErrorKind.UNAVAILABLE, ErrorKind.DATA_LOSS, ErrorKind.INTERNAL))


def code_of(error: VtpmError) -> grpc.StatusCode:
    """Return the gRPC status code of an error."""
    return grpc.StatusCode[error.kind.value]


def status_of(error: VtpmError, *, for_guest: bool) -> Status:
    """Return the status that tells a caller about `error`: its sentence, and an ErrorInfo with reason, subject and remedy."""
    message, metadata = error.message, {"subject": error.subject, "remedy": error.remedy, **error.metadata}
    if for_guest and error.kind in _HOST_TROUBLE:
        message, metadata = "the TPM can't be used just now; the operator's log says why", {}
    bounded = [(key, _bounded(value, _MAX_VALUE)) for key, value in metadata.items() if value]
    return _status(code_of(error), _bounded(message, _MAX_MESSAGE), error.reason, dict(bounded[:_MAX_METADATA]))


def status_of_unexpected(error: Exception, method: str) -> Status:
    """Log `error` with its traceback and return a status that says nothing but the number to look for in the log.

    Too few descriptors are no defect, wherever they run out: those are named.
    """
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        log.error("api.descriptors_exhausted", method=method)
        return _status(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the daemon has no descriptor left",
            "DESCRIPTORS_EXHAUSTED",
            {"remedy": "raise LimitNOFILE= of the daemon, or stop instances"},
        )
    incident = secrets.token_hex(6)
    # Lines, not exc_info: a console renderer may print the frames' local variables beside it, and there are keys among them.
    lines = "".join(traceback.format_exception(error)).splitlines()
    log.error("api.incident", incident=incident, method=method, error=type(error).__name__, traceback=lines)
    return _status(
        grpc.StatusCode.INTERNAL,
        f"internal error, incident {incident}",
        "INTERNAL",
        {"incident": incident, "remedy": f"look for incident {incident} in the daemon's log"},
    )


def _status(code: grpc.StatusCode, message: str, reason: str, metadata: dict[str, str]) -> Status:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata))
    status: Status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=[detail]))
    return status


def _bounded(text: str, limit: int) -> str:
    # A lone surrogate (a file name that is no UTF-8) can't be put into a proto.
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"

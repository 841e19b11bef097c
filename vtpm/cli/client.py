"""The CLI's end of the API: a channel to the operators' socket, and errors as the service means them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from vtpm.errors import ErrorKind, InvalidArgumentError, VtpmError
from vtpm.peers import HeldSocket

if TYPE_CHECKING:
    import grpc

_TIMEOUT_S: Final = 120.0
_CONNECT_TIMEOUT_S: Final = 10.0
_ERROR_DOMAIN: Final = "vtpm"
# A daemon that restarts is there again within a second or two, and on this host it costs nothing to look often. Not
# `min_reconnect_backoff_ms`: that is also how long a connection may wait for whoever is to accept it, and behind a socket of
# systemd that is the next daemon.
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


class Client:
    """Stubs over one channel to `address`, a gRPC target such as `unix:/run/vtpm/operator.sock`.

    Whoever serves a unix socket is looked at before anything is sent (vtpm.peers).

    Raises:
        InvalidArgumentError: ADDRESS_UNSUPPORTED.
    """

    def __init__(self, address: str) -> None:
        import grpc

        from vtpm.api.v1 import (
            activation_pb2_grpc,
            certificate_pb2_grpc,
            durability_pb2_grpc,
            instance_pb2_grpc,
            tpm_pb2_grpc,
        )

        self.address = address
        path = _socket_path(address)
        self._held = HeldSocket(path, timeout_s=_TIMEOUT_S) if path is not None else None
        self._channel = grpc.insecure_channel(f"unix:{self._held.name}" if self._held else address, options=_OPTIONS)
        self.instances = instance_pb2_grpc.InstanceServiceStub(self._channel)
        self.host = instance_pb2_grpc.HostServiceStub(self._channel)
        self.durability = durability_pb2_grpc.DurabilityServiceStub(self._channel)
        self.certificates = certificate_pb2_grpc.CertificateServiceStub(self._channel)
        self.activation = activation_pb2_grpc.ActivationServiceStub(self._channel)
        self.tpm = tpm_pb2_grpc.TpmServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()
        if self._held is not None:
            self._held.close()

    def call(self, method: Any, request: Any, timeout_s: float = _TIMEOUT_S) -> Any:
        """Call a unary method; an error of the call is raised as VtpmError."""
        with self.errors():
            return method(request, timeout=timeout_s)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Look at the server, then turn gRPC errors into VtpmError."""
        import grpc

        if self._held is not None:
            try:
                self._held.refresh()
            except OSError as error:
                raise _unreachable(self.address, error.strerror or str(error)) from None
        try:
            yield
        except grpc.RpcError as error:
            raise to_error(error, self.address) from None


def _socket_path(address: str) -> Path | None:
    """Return the path of a target that names a unix socket, as gRPC reads it; None for another kind of target."""
    scheme, _, rest = address.partition(":")
    if scheme == "unix-abstract":
        raise InvalidArgumentError(
            "ADDRESS_UNSUPPORTED",
            "the name of an abstract socket is anybody's",
            subject=address,
            remedy="name a socket's path: unix:/…",
        )
    if scheme != "unix":
        return None
    return Path(unquote(rest.removeprefix("//")))


def _unreachable(address: str, why: str = "") -> VtpmError:
    return VtpmError(
        "DAEMON_UNREACHABLE",
        f"no daemon answers at {address}{why and f': {why}'}",
        remedy="start it with ./script/run, or name its directory with --runtime-dir",
        kind=ErrorKind.UNAVAILABLE,
    )


def to_error(error: grpc.RpcError, address: str) -> VtpmError:
    """Return what a gRPC error says: its ErrorInfo if the service sent one."""
    import grpc
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

    assert isinstance(error, grpc.Call)
    code = error.code()
    status = rpc_status.from_call(error)
    if status is not None:
        info = error_details_pb2.ErrorInfo()
        for detail in status.details:
            if detail.Unpack(info) and info.domain == _ERROR_DOMAIN:
                metadata = dict(info.metadata)
                return VtpmError(
                    info.reason,
                    metadata.pop("message", status.message),
                    subject=metadata.pop("subject", ""),
                    remedy=metadata.pop("remedy", ""),
                    kind=ErrorKind(code.name),
                    metadata=metadata,
                )
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unreachable(address)
    kind = ErrorKind(code.name) if code.name in ErrorKind.__members__ else ErrorKind.INTERNAL
    return VtpmError(code.name, error.details() or code.name, kind=kind)

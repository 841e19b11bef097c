"""The CLI's end of the API: a channel to the operators' socket, and errors as the service means them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from vtpm.errors import ErrorKind, VtpmError

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
    """Stubs over one channel to `address`, a gRPC target such as `unix:/run/vtpm/operator.sock`."""

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
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self.instances = instance_pb2_grpc.InstanceServiceStub(self._channel)
        self.host = instance_pb2_grpc.HostServiceStub(self._channel)
        self.durability = durability_pb2_grpc.DurabilityServiceStub(self._channel)
        self.certificates = certificate_pb2_grpc.CertificateServiceStub(self._channel)
        self.activation = activation_pb2_grpc.ActivationServiceStub(self._channel)
        self.tpm = tpm_pb2_grpc.TpmServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def call(self, method: Any, request: Any) -> Any:
        """Call a unary method; an error of the call is raised as VtpmError."""
        with self.errors():
            return method(request, timeout=_TIMEOUT_S)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn gRPC errors into VtpmError."""
        import grpc

        try:
            yield
        except grpc.RpcError as error:
            raise to_error(error, self.address) from None


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
        return VtpmError(
            "DAEMON_UNREACHABLE",
            f"no daemon answers at {address}",
            remedy="start it with ./script/run, or name its directory with --runtime-dir",
            kind=ErrorKind.UNAVAILABLE,
        )
    kind = ErrorKind(code.name) if code.name in ErrorKind.__members__ else ErrorKind.INTERNAL
    return VtpmError(code.name, error.details() or code.name, kind=kind)

"""The daemon's gRPC front: the operators' server and one server per guest socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import grpc.aio
import structlog
from grpc_health.v1.health_pb2_grpc import add_HealthServicer_to_server
from grpc_reflection.v1alpha.reflection_pb2_grpc import add_ServerReflectionServicer_to_server

from vtpm.api.access import Access, GuestAccess, OperatorAccess
from vtpm.api.activation import ActivationDesk, ActivationServicer
from vtpm.api.certificates import Certificates, CertificateServicer
from vtpm.api.drain import Drain
from vtpm.api.durability import Durability, DurabilityServicer
from vtpm.api.guests import GuestServers
from vtpm.api.health import HEALTH_SERVICE, REFLECTION_SERVICE, HealthServicer, ReflectionServicer
from vtpm.api.host import HostServicer
from vtpm.api.instances import InstanceServicer
from vtpm.api.interceptors import CallInterceptor, MessageLimits
from vtpm.api.limits import AnswerRoom, CallLimits
from vtpm.api.ports import Admission, ApiSettings, Instances, RequestMetrics
from vtpm.api.sockets import admit_group, group_id, serve_on
from vtpm.api.tpm import MAX_DATA_SIZE, TpmServicer
from vtpm.api.tracing import open_tracing
from vtpm.api.v1.activation_pb2_grpc import add_ActivationServiceServicer_to_server
from vtpm.api.v1.certificate_pb2_grpc import add_CertificateServiceServicer_to_server
from vtpm.api.v1.durability_pb2_grpc import add_DurabilityServiceServicer_to_server
from vtpm.api.v1.instance_pb2_grpc import add_HostServiceServicer_to_server, add_InstanceServiceServicer_to_server
from vtpm.api.v1.tpm_pb2_grpc import add_TpmServiceServicer_to_server
from vtpm.store.model import InstanceRecord
from vtpm.wire.guarded import GuestFlow
from vtpm.wire.http2 import MAX_FRAME_SIZE
from vtpm.wire.listening import Seldom
from vtpm.wire.shares import ConnectionShares

log: Final = structlog.get_logger("vtpm.api")

INSTANCE_SERVICE: Final = "vtpm.v1.InstanceService"
HOST_SERVICE: Final = "vtpm.v1.HostService"
DURABILITY_SERVICE: Final = "vtpm.v1.DurabilityService"
TPM_SERVICE: Final = "vtpm.v1.TpmService"
CERTIFICATE_SERVICE: Final = "vtpm.v1.CertificateService"
ACTIVATION_SERVICE: Final = "vtpm.v1.ActivationService"

# Where grpc.aio tells of calls that ended otherwise than it expected: at any client's will.
_GRPC_LOG: Final = logging.getLogger("grpc._cython.cygrpc")
_KEEPALIVE_MS: Final = 60_000
_KEEPALIVE_TIMEOUT_MS: Final = 20_000
_SHORTEST_PING_INTERVAL_MS: Final = 10_000
# A page of instances is the largest answer, and a single instance passes the page's own bound by little.
_MAX_RESPONSE_BYTES: Final = 4 << 20
_MAX_STREAMS_PER_CONNECTION: Final = 256
_MAX_OPERATOR_CONNECTIONS: Final = 256
# What a guest's requests are as large as they need to be. What is measured has at most a mebibyte, with event data and names; a
# command has 4 KiB, a nonce 64 bytes, a key to be certified less than a KiB, and nothing else is larger than a command.
_GUEST_REQUEST_BYTES: Final = 16 << 10
_MEASURE_BYTES: Final = MAX_DATA_SIZE + _GUEST_REQUEST_BYTES
# Event logs of all guests under way at once, each of some 200 KiB.
_LARGE_ANSWERS_AT_ONCE: Final = 32
_GUEST_OPTIONS: Final = (
    ("grpc.max_receive_message_length", _MEASURE_BYTES),
    # What comes before anybody has asked for it, of each stream; without a probe of the bandwidth it stays at that.
    ("grpc.http2.lookahead_bytes", _GUEST_REQUEST_BYTES),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.max_frame_size", MAX_FRAME_SIZE),
    # Of a message that has begun gRPC makes room for the rest at once otherwise.
    ("grpc.experimental.tcp_read_chunk_size", 8 << 10),
    ("grpc.experimental.tcp_max_read_chunk_size", 16 << 10),
    # A few KiB that become a mebibyte are no message of a guest's.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_metadata_size", 4 << 10),
    ("grpc.absolute_max_metadata_size", 8 << 10),
    ("grpc.http2.hpack_table_size.decoder", 4 << 10),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
)


class ApiServer:
    """Serves the API from `start` until `drain` and `stop`."""

    def __init__(
        self,
        instances: Instances,
        settings: ApiSettings,
        metrics: RequestMetrics,
        durability: Durability,
        certificates: Certificates | None = None,
        activations: ActivationDesk | None = None,
        *,
        operator_socket: Path | None = None,
        guest_connections: int = 0,
    ) -> None:
        self._instances = instances
        self._durability = durability
        self._activations = activations
        self._certificates = certificates
        # `guest_connections`: how many of guests there are descriptors for, 0 for as many as the settings say.
        # Another one than the operators see, if somebody else listens there and brings what comes.
        self._operator_socket = operator_socket or settings.operator_socket
        self._settings = settings
        self._metrics = metrics
        self._drain = Drain()
        self._limits = CallLimits(
            settings.max_calls,
            settings.max_guest_calls,
            guest_rate=settings.command_rate,
            guest_burst=settings.command_burst,
        )
        all_connections = min(settings.max_all_guest_connections, guest_connections or settings.max_all_guest_connections)
        self._guests = GuestServers(
            instances,
            self._guest_server,
            settings.operator_socket.parent / "guests",
            ConnectionShares(settings.max_guest_connections, all_connections),
            # One that is being received, and the beginnings of those that wait for it.
            largest_message=_MEASURE_BYTES + settings.max_guest_calls * _GUEST_REQUEST_BYTES,
            message_timeout_s=settings.receive_timeout_s,
        )
        self._tracing = open_tracing(settings.otel_endpoint)
        self._operators: grpc.aio.Server | None = None
        self._seldom = Seldom()
        self._large_answers = asyncio.Semaphore(_LARGE_ANSWERS_AT_ONCE)

    async def start(self) -> None:
        """Listen for operators, then bring up the guest sockets of what runs already.

        Raises:
            ConfigError: a setting can't be used.
            UnavailableError: the socket can't be made.
        """
        _GRPC_LOG.addFilter(self._seldom)
        path = self._operator_socket
        group = group_id(self._settings.socket_group)
        self._operators = self._operator_server()
        # A relay is the only one to connect to a socket that is not the operators' own.
        await serve_on(self._operators, path, group if path == self._settings.operator_socket else None)
        if group is not None:
            admit_group(path.parent, group)
        self._guests.follow()
        log.info("api.listening", socket=str(path), group=self._settings.socket_group)

    async def drain(self, grace_s: float) -> None:
        """Take no new calls, end streams that only wait, and let what runs finish, at most `grace_s`."""
        deadline = time.monotonic() + grace_s
        self._drain.begin()
        # Who watches the health service is told before the connections close.
        await asyncio.sleep(0)
        await asyncio.gather(self._stop_operators(grace_s), self._guests.close(grace_s))
        # Operations whose caller has gone are finished too.
        await self._drain.operations_finished(max(0.0, deadline - time.monotonic()))

    async def stop(self) -> None:
        """End everything at once."""
        self._drain.begin()
        await asyncio.gather(self._stop_operators(None), self._guests.close(None))
        await self._drain.cut()
        await asyncio.to_thread(self._tracing.close)
        _GRPC_LOG.removeFilter(self._seldom)

    async def _stop_operators(self, grace_s: float | None) -> None:
        server, self._operators = self._operators, None
        if server is not None:
            with contextlib.suppress(OSError):
                self._operator_socket.unlink()
            await server.stop(grace_s)

    def _operator_server(self) -> grpc.aio.Server:
        access = OperatorAccess()
        options = (
            ("grpc.max_receive_message_length", self._settings.max_message_size_bytes),
            ("grpc.max_concurrent_streams", _MAX_STREAMS_PER_CONNECTION),
            ("grpc.max_allowed_incoming_connections", _MAX_OPERATOR_CONNECTIONS),
        )
        messages = MessageLimits(self._settings.receive_timeout_s)
        server = self._server(access, self._limits.operator(), messages, options)
        add_InstanceServiceServicer_to_server(InstanceServicer(self._instances, self._drain, self._guests.settled), server)
        add_HostServiceServicer_to_server(HostServicer(self._instances, self._drain), server)
        add_TpmServiceServicer_to_server(TpmServicer(self._instances, self._drain, access), server)
        add_DurabilityServiceServicer_to_server(DurabilityServicer(self._durability, self._drain), server)
        add_CertificateServiceServicer_to_server(CertificateServicer(self._certificates, self._drain), server)
        services = (INSTANCE_SERVICE, HOST_SERVICE, TPM_SERVICE, DURABILITY_SERVICE, CERTIFICATE_SERVICE)
        self._add_common(server, *services, *self._add_activation(server, access))
        return server

    def _add_activation(self, server: grpc.aio.Server, access: Access) -> Sequence[str]:
        if self._activations is None:
            return ()
        add_ActivationServiceServicer_to_server(ActivationServicer(self._activations, self._drain, access), server)
        return (ACTIVATION_SERVICE,)

    def _guest_server(self, record: InstanceRecord, flow: GuestFlow) -> grpc.aio.Server:
        access = GuestAccess(record.id, record.name)
        settings = self._settings
        messages = MessageLimits(
            settings.receive_timeout_s,
            settings.stream_idle_timeout_s,
            _GUEST_REQUEST_BYTES,
            {"Measure": _MEASURE_BYTES},
            AnswerRoom(self._large_answers),
        )
        options = (*_GUEST_OPTIONS, ("grpc.max_concurrent_streams", settings.max_guest_calls))
        server = self._server(access, self._limits.guest(flow), messages, options)
        add_TpmServiceServicer_to_server(TpmServicer(self._instances, self._drain, access), server)
        self._add_common(server, TPM_SERVICE, *self._add_activation(server, access))
        return server

    def _server(
        self, access: Access, admission: Admission, messages: MessageLimits, options: Sequence[tuple[str, int]]
    ) -> grpc.aio.Server:
        return grpc.aio.server(
            interceptors=[CallInterceptor(access, admission, messages, self._metrics, self._tracing)],
            options=[
                ("grpc.max_send_message_length", _MAX_RESPONSE_BYTES),
                # On a unix socket only a client that has stopped reading is ever found dead.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", _SHORTEST_PING_INTERVAL_MS),
                ("grpc.so_reuseport", 0),
                *options,
            ],
        )

    def _add_common(self, server: grpc.aio.Server, *services: str) -> None:
        add_HealthServicer_to_server(HealthServicer(services, self._drain), server)
        names = (*services, HEALTH_SERVICE, REFLECTION_SERVICE)
        add_ServerReflectionServicer_to_server(ReflectionServicer(names, self._drain), server)

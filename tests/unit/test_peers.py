"""Whoever is sent something by this service's clients was looked at before."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.strangers import STRANGER, Listening, a_place, a_server, needs_root
from vtpm import peers
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli.client import Client
from vtpm.cli.dropin_daemon import DaemonTpm
from vtpm.errors import ErrorKind, InvalidArgumentError, VtpmError
from vtpm.wire.control_client import ControlClient


def by_grpc(path: Path) -> None:
    client = Client(f"unix:{path}")
    try:
        client.call(client.host.GetHost, pb.GetHostRequest())
    finally:
        client.close()


def by_stream(path: Path) -> None:
    client = Client(f"unix:{path}")
    try:
        with client.errors():
            list(client.instances.WatchInstances(pb.WatchInstancesRequest()))
    finally:
        client.close()


def by_control(path: Path) -> None:
    with ControlClient(path, timeout_s=2) as control:
        control.get_capability()


def by_drop_in(path: Path) -> None:
    DaemonTpm(str(path)).execute(b"\x80\x01" + bytes(8))


CLIENTS: dict[str, Callable[[Path], None]] = {
    "a command": by_grpc,
    "a command that watches": by_stream,
    "the control channel": by_control,
    "the drop-in": by_drop_in,
}
EACH = pytest.mark.parametrize("client", CLIENTS)


def refusal(client: str, server: Listening) -> str:
    with pytest.raises(VtpmError) as refused:
        CLIENTS[client](server.path)
    assert (refused.value.reason, refused.value.kind) == ("SERVER_NOT_TRUSTED", ErrorKind.PERMISSION_DENIED)
    assert refused.value.subject == str(server.path)
    assert refused.value.remedy
    return refused.value.message


@needs_root
@EACH
def test_a_server_in_a_strangers_directory_is_sent_nothing(client: str) -> None:
    with a_place(mode=0o1777) as tmp:
        place = tmp / "vtpm-0"
        place.mkdir()
        os.chown(place, STRANGER, STRANGER)
        with a_server(place / "operator.sock", STRANGER) as server:
            assert "belongs to uid 65534" in refusal(client, server)
            assert server.received() is None, "nobody even connected"


@needs_root
@EACH
def test_a_server_below_a_strangers_link_is_sent_nothing(client: str) -> None:
    with a_place(mode=0o1777) as tmp, a_place(STRANGER) as theirs, a_server(theirs / "operator.sock", STRANGER) as server:
        link = tmp / "vtpm-0"
        link.symlink_to(theirs)
        os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
        with pytest.raises(VtpmError) as refused:
            CLIENTS[client](link / "operator.sock")
        assert refused.value.reason == "SERVER_NOT_TRUSTED"
        assert server.received() is None


@needs_root
@EACH
def test_a_strangers_socket_in_a_directory_of_ours_is_sent_nothing(client: str) -> None:
    with a_place(mode=0o1777) as place, a_server(place / "operator.sock", STRANGER) as server:
        assert "the socket belongs to uid 65534" in refusal(client, server)
        assert server.received() is None


@needs_root
@EACH
def test_a_stranger_who_listens_on_a_socket_of_ours_is_sent_nothing(client: str) -> None:
    with a_place() as place, a_server(place / "operator.sock", STRANGER, bound_by_root=True) as server:
        assert "uid 65534 serves it" in refusal(client, server)
        assert not server.received(), "the connection that asked who is there had nothing on it"


@needs_root
@EACH
def test_the_user_whom_root_gave_the_directory_is_spoken_to(client: str) -> None:
    with a_place(STRANGER) as place, a_server(place / "operator.sock", STRANGER) as server:
        with pytest.raises(VtpmError) as caught:
            CLIENTS[client](server.path)
        assert caught.value.reason != "SERVER_NOT_TRUSTED"
        assert server.received()


@pytest.mark.parametrize("address", ["unix-abstract:vtpm", "unix-abstract:a%00b"])
def test_an_abstract_name_is_anybodys(address: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        Client(address)
    assert refused.value.reason == "ADDRESS_UNSUPPORTED"


def test_where_nobody_is_that_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "no" / "such"):
        with pytest.raises(VtpmError) as caught:
            by_grpc(path)
        assert (caught.value.reason, caught.value.kind) == ("DAEMON_UNREACHABLE", ErrorKind.UNAVAILABLE)


def test_the_peers_user_is_the_one_that_listens(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(1)
        with peers.connect(tmp_path / "s", timeout_s=2) as connection:
            assert peers.peer_uid(connection) == os.geteuid()


# ---- gRPC, which connects by itself --------------------------------------------------------------------------------------


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers with a number of its own."""

    def __init__(self, number: int) -> None:
        self.number = number

    def Check(self, _request: object, _context: object) -> health_pb2.HealthCheckResponse:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=self.number)


def a_health_server(path: Path, number: int) -> grpc.Server:
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(Health(number), server)
    hidden = path.with_name(f".{number}")
    server.add_insecure_port(f"unix:{hidden}")
    server.start()
    hidden.rename(path)
    return server


@pytest.fixture
def held(tmp_path: Path) -> Iterator[peers.HeldSocket]:
    socket_ = peers.HeldSocket(tmp_path / "s", timeout_s=5)
    yield socket_
    socket_.close()


def ask(channel: grpc.Channel) -> int:
    return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status)


def test_a_channel_goes_on_with_the_server_that_comes_next(held: peers.HeldSocket, tmp_path: Path) -> None:
    with grpc.insecure_channel(f"unix:{held.name}", options=[("grpc.max_reconnect_backoff_ms", 100)]) as channel:
        for number in (1, 2):
            server = a_health_server(tmp_path / "s", number)
            held.refresh()
            assert ask(channel) == number
            server.stop(None).wait()


def test_a_channel_does_not_reach_what_takes_the_name_after_the_look(held: peers.HeldSocket, tmp_path: Path) -> None:
    first = a_health_server(tmp_path / "s", 1)
    held.refresh()
    second = a_health_server(tmp_path / "s", 2)
    with grpc.insecure_channel(f"unix:{held.name}") as channel:
        assert ask(channel) == 1
        first.stop(None).wait()
        with pytest.raises(grpc.RpcError) as caught:
            ask(channel)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        held.refresh()
        grpc.channel_ready_future(channel).result(10)
        assert ask(channel) == 2
    second.stop(None).wait()


def test_one_client_serves_many_threads(tmp_path: Path) -> None:
    server = a_health_server(tmp_path / "s", 1)
    client = Client(f"unix:{tmp_path / 's'}")
    errors: list[VtpmError] = []

    def call() -> None:
        try:
            client.call(client.host.GetHost, pb.GetHostRequest())
        except VtpmError as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {error.reason for error in errors} == {"UNIMPLEMENTED"}, "every one reached the server, which has no such method"
    client.close()
    server.stop(None).wait()

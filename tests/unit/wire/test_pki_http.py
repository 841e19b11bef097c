"""Distribution points over HTTP, asked by an ordinary client and by others."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import urllib.error
import urllib.request
from collections.abc import AsyncIterator

import pytest

from vtpm.engine.sandbox import open_descriptors
from vtpm.errors import ConfigError, StoreError
from vtpm.wire import pki_http
from vtpm.wire.pki_http import DistributionServer, parse_address

CRL = b"0\x03crl"


def published(path: str) -> tuple[str, bytes] | None:
    if path == "/crl/busy.crl":
        raise StoreError("STORE_BUSY", "the store is busy")
    return ("application/pkix-crl", CRL) if path == "/crl/aa.crl" else None


@pytest.fixture
async def server() -> AsyncIterator[DistributionServer]:
    made = DistributionServer("127.0.0.1:0", published)
    await made.start()
    yield made
    await made.close()


async def raw(server: DistributionServer, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


async def test_an_ordinary_client_gets_the_crl(server: DistributionServer) -> None:
    def get() -> tuple[int, bytes, str | None]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/crl/aa.crl", timeout=10) as answer:
            return answer.status, answer.read(), answer.headers["Content-Type"]

    assert await asyncio.to_thread(get) == (200, CRL, "application/pkix-crl")


async def test_head_is_get_without_content(server: DistributionServer) -> None:
    answer = await raw(server, b"HEAD /crl/aa.crl?x=1 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Length: 5\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", 404),
        (b"GET /crl/bb.crl HTTP/1.1", 404),
        (b"GET /../../etc/passwd HTTP/1.1", 404),
        (b"GET http://elsewhere/crl/aa.crl HTTP/1.1", 404),
        (b"GET /" + b"x" * 300 + b" HTTP/1.1", 404),
        (b"GET /\xff HTTP/1.1", 404),
        (b"POST /crl/aa.crl HTTP/1.1", 405),
        (b"DELETE /crl/aa.crl HTTP/1.0", 405),
        (b"nonsense", 400),
        (b"GET /crl/aa.crl HTTP/3", 400),
        (b"GET /crl/busy.crl HTTP/1.1", 503),
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1", 431),
    ],
)
async def test_all_else_is_refused(server: DistributionServer, request_line: bytes, status: int) -> None:
    answer = await raw(server, request_line + b"\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert CRL not in answer


async def test_one_that_says_nothing_is_not_waited_for(server: DistributionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pki_http, "_TIMEOUT_S", 0.05)
    assert await raw(server, b"GET /crl/aa") == b""


async def test_one_that_takes_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pki_http, "_TIMEOUT_S", 0.2)
    server = DistributionServer("127.0.0.1:0", lambda path: ("application/pkix-crl", bytes(16 << 20)))
    await server.start()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", server.port))
    before = open_descriptors()
    await loop.sock_sendall(client, b"GET /crl/aa.crl HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(30):
        while open_descriptors() >= before:
            # The server's end of it may not have been accepted when they were counted first.
            before = max(before, open_descriptors())
            await asyncio.sleep(0.05)
    client.close()
    await server.close()


async def test_no_more_connections_than_the_bound(server: DistributionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pki_http, "_MAX_CONNECTIONS", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /crl/aa")
    await asyncio.sleep(0.05)
    with contextlib.suppress(ConnectionResetError):
        assert await raw(server, b"GET /crl/aa.crl HTTP/1.1\r\n\r\n") == b""
    writer.write(b".crl HTTP/1.1\r\n\r\n")
    assert CRL in await reader.read()
    writer.close()
    assert CRL in await raw(server, b"GET /crl/aa.crl HTTP/1.1\r\n\r\n")


async def test_one_address_can_not_take_all_connections(server: DistributionServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pki_http, "_MAX_CONNECTIONS_PER_PEER", 1)
    _, silent = await asyncio.open_connection("127.0.0.1", server.port)
    refused, another = await asyncio.open_connection("127.0.0.1", server.port)
    assert await refused.read() == b""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
    writer.write(b"GET /crl/aa.crl HTTP/1.1\r\n\r\n")
    assert (await reader.read()).endswith(CRL)
    for each in (writer, another, silent):
        each.close()


@pytest.mark.parametrize("address", ["", "8080", "host:", "host:http", "host:70000", "host:-1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(address)
    assert caught.value.reason == "ADDRESS_INVALID"


async def test_an_address_in_use_is_named(server: DistributionServer) -> None:
    with pytest.raises(ConfigError) as caught:
        await DistributionServer(f"127.0.0.1:{server.port}", published).start()
    assert (caught.value.reason, caught.value.subject) == ("PKI_HTTP_UNUSABLE", f"127.0.0.1:{server.port}")


def test_ipv6_addresses() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address(":80") == ("", 80)

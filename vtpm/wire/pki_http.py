"""Distribution points over HTTP/1.1: CRLs (/crl/KEYID.crl) and CA certificates (/ca/KEYID.cer), RFC 5280, 4.2.1.13 and 4.2.2.1.

Plain HTTP on purpose: what is served is signed and public. Only GET and HEAD, one request per connection, everything bounded in
size, time and number.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
from collections import Counter
from collections.abc import Callable
from typing import Final

import structlog

from vtpm.errors import ConfigError, VtpmError

log: Final = structlog.get_logger("vtpm.pki_http")

_MAX_HEAD: Final = 8 << 10
_MAX_CONNECTIONS: Final = 128
# Of one address, so that nobody keeps all others out.
_MAX_CONNECTIONS_PER_PEER: Final = 32
_TIMEOUT_S: Final = 10.0
_MAX_PATH: Final = 256
_MAX_AGE_S: Final = 300

# Returns media type and content of a path, None where there is nothing; it may block and raise VtpmError.
Published = Callable[[str], tuple[str, bytes] | None]

_UNUSABLE: Final = {"pki_http_address": "PKI_HTTP_UNUSABLE", "metrics_address": "METRICS_ADDRESS_UNUSABLE"}
_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def parse_address(address: str) -> tuple[str, int]:
    """Read `host:port`; the host may be in brackets, or empty for every address.

    Raises:
        ConfigError: ADDRESS_INVALID.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ConfigError("ADDRESS_INVALID", "an address is host:port", subject=address[:80], remedy="such as 0.0.0.0:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


class DistributionServer:
    """Serves what `published` gives, from `start` until `close`."""

    def __init__(self, address: str, published: Published, *, setting: str = "pki_http_address") -> None:
        self._address = address
        self._published = published
        self._setting = setting
        self._server: asyncio.Server | None = None
        self._open: Counter[str] = Counter()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: PKI_HTTP_UNUSABLE or METRICS_ADDRESS_UNUSABLE, with the address.
        """
        try:
            host, port = parse_address(self._address)
        except ConfigError as error:
            raise ConfigError(_UNUSABLE[self._setting], error.message, subject=error.subject, remedy=error.remedy) from None
        try:
            self._server = await asyncio.start_server(self._serve, host or None, port, limit=_MAX_HEAD, backlog=64)
        except OSError as error:
            raise ConfigError(
                _UNUSABLE[self._setting],
                f"can't listen: {error.strerror or error}",
                subject=self._address,
                remedy=f"set {self._setting} to an address of this host, with a port that is free",
            ) from None
        log.info("pki_http.listening", address=self._address, port=self.port)

    async def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), _TIMEOUT_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = str((writer.get_extra_info("peername") or ("",))[0])
        try:
            if self._open.total() >= _MAX_CONNECTIONS or self._open[peer] >= _MAX_CONNECTIONS_PER_PEER:
                return
            self._open[peer] += 1
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    writer.write(await self._answer(reader))
                    # It counts until the peer has taken all of it, or its time is up.
                    writer.close()
                    await writer.wait_closed()
            finally:
                self._open[peer] -= 1
                if not self._open[peer]:
                    del self._open[peer]
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            # Slow, gone, or not speaking HTTP: nobody to tell.
            pass
        finally:
            # Closed alone it would stay, with all that is yet to be sent, for as long as the peer takes nothing.
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(431, b"")
        parts = head.split(b"\r\n", 1)[0].split(b" ")
        if len(parts) != 3 or parts[2] not in (b"HTTP/1.1", b"HTTP/1.0"):
            return _response(400, b"")
        method, target, _ = parts
        if method not in (b"GET", b"HEAD"):
            return _response(405, b"", extra=("Allow: GET, HEAD",))
        path = target.split(b"?", 1)[0]
        if len(path) > _MAX_PATH or not path.isascii() or not path.startswith(b"/"):
            return _response(404, b"", head_only=method == b"HEAD")
        try:
            found = await asyncio.to_thread(self._published, path.decode())
        except VtpmError as error:
            log.warning("pki_http.failed", reason=error.reason)
            return _response(503, b"", head_only=method == b"HEAD", extra=("Retry-After: 10",))
        if found is None:
            return _response(404, b"", head_only=method == b"HEAD")
        media_type, content = found
        extra = (f"Content-Type: {media_type}", f"Cache-Control: max-age={_MAX_AGE_S}")
        return _response(200, content, head_only=method == b"HEAD", extra=extra)


def _response(status: int, content: bytes, *, head_only: bool = False, extra: tuple[str, ...] = ()) -> bytes:
    lines = (
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Date: {email.utils.formatdate(usegmt=True)}",
        f"Content-Length: {len(content)}",
        "Connection: close",
        "X-Content-Type-Options: nosniff",
        *extra,
    )
    return "\r\n".join((*lines, "", "")).encode() + (b"" if head_only else content)

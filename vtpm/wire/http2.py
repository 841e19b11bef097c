"""How much of unfinished gRPC messages an HTTP/2 connection holds, told from its frames' lengths alone.

gRPC keeps what has come of a message until the rest is there, and says nothing about it. So whoever carries the bytes to gRPC
counts: frame headers (RFC 9113, 4.1) and the length in front of each gRPC message, nothing else. Headers are not decoded, and
what is carried is not changed. If a peer's bytes mean something else than they say, it is that peer's connection that ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from vtpm.errors import InvalidArgumentError

# RFC 9113, 3.4: what a client sends first.
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# The largest frame that a server takes unless it says otherwise (RFC 9113, 6.5.2).
MAX_FRAME_SIZE: Final = 16384
_HEAD_SIZE: Final = 9
# "Length-Prefixed-Message" of gRPC over HTTP/2: a flag for compression and four bytes of length.
_PREFIX_SIZE: Final = 5
_DATA, _HEADERS, _RST_STREAM, _CONTINUATION = 0, 1, 3, 9
_END_STREAM: Final = 0x01
_END_HEADERS: Final = 0x04
_PADDED: Final = 0x08
# More streams than a server allows at once can't be open for longer than it takes to refuse them.
_MAX_STREAMS: Final = 1024


class _Piece(NamedTuple):
    """What has come of one frame's payload; the last piece of a frame is `last`, and may be empty."""

    kind: int
    flags: int
    stream: int
    payload: memoryview
    last: bool


class _Frames:
    """Cuts the bytes of one direction into frames. Holds a frame's header at most."""

    def __init__(self, preface: int = 0, largest: int = 1 << 24) -> None:
        self._skip = preface
        self._largest = largest
        self._head = bytearray()
        self._left = 0

    def feed(self, data: memoryview) -> Iterator[_Piece]:
        """Yield the pieces of `data`.

        Raises:
            InvalidArgumentError: HTTP2_FRAME_TOO_LARGE.
        """
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        while data:
            begins = len(self._head) < _HEAD_SIZE
            if begins:
                missing = _HEAD_SIZE - len(self._head)
                self._head += data[:missing]
                data = data[missing:]
                if len(self._head) < _HEAD_SIZE:
                    return
                self._left = int.from_bytes(self._head[:3], "big")
                if self._left > self._largest:
                    raise InvalidArgumentError("HTTP2_FRAME_TOO_LARGE", f"a frame has at most {self._largest} bytes")
            payload, data = data[: self._left], data[self._left :]
            self._left -= len(payload)
            kind, flags, stream = self._head[3], self._head[4], int.from_bytes(self._head[5:], "big") & 0x7FFFFFFF
            last = not self._left
            if last:
                self._head.clear()
            yield _Piece(kind, flags, stream, payload, last)


class _Message:
    """What has come of the message that a stream is sending: `size` bytes; it is whole when `missing` more have come."""

    __slots__ = ("missing", "prefix", "size")

    def __init__(self) -> None:
        self.prefix = b""
        self.missing = 0
        self.size = 0

    def take(self, data: memoryview) -> memoryview:
        """Take what belongs to this message; return the rest."""
        wanted = _PREFIX_SIZE - len(self.prefix)
        if wanted:
            part = data[:wanted]
            self.prefix += bytes(part)
            self.size += len(part)
            data = data[wanted:]
            if len(self.prefix) == _PREFIX_SIZE:
                self.missing = int.from_bytes(self.prefix[1:], "big")
        part = data[: self.missing]
        self.missing -= len(part)
        self.size += len(part)
        return data[len(part) :]

    @property
    def whole(self) -> bool:
        return len(self.prefix) == _PREFIX_SIZE and not self.missing


class Sent(NamedTuple):
    """What a client's bytes came to.

    Streams that they open, streams that they give up before the server said anything, and bytes of streams that have ended.
    """

    opened: int
    given_up: int
    wasted: int


class MessageWatch:
    """Follows both directions of one connection from its first byte."""

    def __init__(self) -> None:
        self._from_client = _Frames(len(PREFACE), MAX_FRAME_SIZE)
        self._from_server = _Frames()
        # Streams that the client has not ended; None where one is between two messages.
        self._streams: dict[int, _Message | None] = {}
        self._highest = 0
        # The stream whose headers have begun and not ended (RFC 9113, 6.10).
        self._begun_headers = 0
        # Streams of which the server has said nothing yet.
        self._unanswered: set[int] = set()
        # When the message that a stream is sending began; the oldest is the first.
        self._began: dict[int, float] = {}
        self.unfinished = 0

    @property
    def oldest(self) -> float | None:
        """When the oldest of the messages began that are not whole yet."""
        return next(iter(self._began.values()), None)

    def sent(self, data: bytes, now: float) -> Sent:
        """Take note of what the client sent, at the time `now`.

        Raises:
            InvalidArgumentError: HTTP2_FRAME_TOO_LARGE, HTTP2_PADDED, HTTP2_TOO_MANY_STREAMS.
        """
        opened = given_up = wasted = 0
        for piece in self._from_client.feed(memoryview(data)):
            if piece.kind == _DATA:
                if piece.flags & _PADDED:
                    # No gRPC client pads, and where padding begins is one more thing to get wrong.
                    raise InvalidArgumentError("HTTP2_PADDED", "a DATA frame is padded")
                if piece.stream in self._streams:
                    self._add(piece.stream, piece.payload, now)
                else:
                    # gRPC drops what comes for a stream that has ended, or never began.
                    wasted += len(piece.payload)
            elif piece.kind == _HEADERS and piece.last and piece.stream % 2 and piece.stream > self._highest:
                self._open(piece.stream)
            # gRPC comes with a call when all of its headers are there: who keeps some of them back keeps nobody waiting.
            if piece.last and piece.stream == self._begun_headers and self._ends_headers(piece):
                self._begun_headers = 0
                opened += 1
            if piece.last and self._ends(piece):
                self._forget(piece.stream)
                if piece.kind == _RST_STREAM and piece.stream in self._unanswered:
                    self._unanswered.remove(piece.stream)
                    given_up += 1
        return Sent(opened, given_up, wasted)

    def answered(self, data: bytes) -> int:
        """Take note of what the server sent; a stream that it has ended holds nothing. Return how many streams it refused."""
        refused = 0
        for piece in self._from_server.feed(memoryview(data)):
            if not piece.last:
                continue
            if piece.kind in (_HEADERS, _RST_STREAM) and piece.stream in self._unanswered:
                self._unanswered.remove(piece.stream)
                refused += piece.kind == _RST_STREAM
            if self._ends(piece):
                self._forget(piece.stream)
        return refused

    @staticmethod
    def _ends(piece: _Piece) -> bool:
        return piece.kind == _RST_STREAM or (piece.kind in (_DATA, _HEADERS) and bool(piece.flags & _END_STREAM))

    @staticmethod
    def _ends_headers(piece: _Piece) -> bool:
        return piece.kind in (_HEADERS, _CONTINUATION) and bool(piece.flags & _END_HEADERS)

    def _open(self, stream: int) -> None:
        if max(len(self._streams), len(self._unanswered)) >= _MAX_STREAMS:
            raise InvalidArgumentError("HTTP2_TOO_MANY_STREAMS", f"at most {_MAX_STREAMS} streams are followed")
        self._highest = self._begun_headers = stream
        self._streams[stream] = None
        self._unanswered.add(stream)

    def _add(self, stream: int, data: memoryview, now: float) -> None:
        while data:
            message = self._streams[stream]
            if message is None:
                message = self._streams[stream] = _Message()
                self._began[stream] = now
            before = message.size
            data = message.take(data)
            self.unfinished += message.size - before
            if message.whole:
                self.unfinished -= message.size
                self._streams[stream] = None
                del self._began[stream]

    def _forget(self, stream: int) -> None:
        message = self._streams.pop(stream, None)
        if message is not None:
            self.unfinished -= message.size
            del self._began[stream]

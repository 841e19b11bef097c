"""A client that speaks HTTP/2 by hand, to say what no gRPC library would: half a message, a flood, nothing at all."""

from __future__ import annotations

import socket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS, ACK = 0x01, 0x04, 0x01
READ_PCRS = "/vtpm.v1.TpmService/ReadPcrs"
EXECUTE = "/vtpm.v1.TpmService/Execute"
EXECUTE_STREAM = "/vtpm.v1.TpmService/ExecuteStream"
GET_EVENT_LOG = "/vtpm.v1.TpmService/GetEventLog"
MEASURE = "/vtpm.v1.TpmService/Measure"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame (RFC 9113, 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _literal(name: str, value: str) -> bytes:
    # HPACK: a literal that is not indexed, with a new name, without Huffman coding (RFC 7541, 6.2.2).
    return b"\x00" + bytes((len(name),)) + name.encode() + bytes((len(value),)) + value.encode()


def call(stream: int, method: str) -> bytes:
    """The headers of a gRPC call."""
    fields = {":method": "POST", ":scheme": "http", ":path": method, ":authority": "localhost"}
    fields |= {"te": "trailers", "content-type": "application/grpc"}
    return frame(HEADERS, END_HEADERS, stream, b"".join(_literal(*field) for field in fields.items()))


def prefix(size: int) -> bytes:
    """What stands in front of a message of `size` bytes."""
    return b"\x00" + size.to_bytes(4, "big")


def message(stream: int, payload: bytes, *, end: bool = True) -> bytes:
    """A whole message, in as many frames as it takes."""
    data = prefix(len(payload)) + payload
    pieces = [data[start : start + 16384] for start in range(0, len(data), 16384)]
    last = len(pieces) - 1
    return b"".join(frame(DATA, END_STREAM if end and n == last else 0, stream, piece) for n, piece in enumerate(pieces))


def connect(path: str) -> socket.socket:
    """A connection that has said what a client says first."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(path)
    # A window as wide as can be, so that answers never wait.
    sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4, "big")))
    return sock


def shut_window() -> bytes:
    """What a client says that takes no answers: SETTINGS_INITIAL_WINDOW_SIZE is 0."""
    return frame(SETTINGS, 0, 0, b"\x00\x04" + bytes(4))


def closed(sock: socket.socket) -> bool:
    """Whether the other end is gone; reads what it still has said."""
    sock.setblocking(False)
    try:
        while sock.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class Windows:
    """How much the server takes yet (RFC 9113, 5.2): a client that sends more loses its stream, and one that waits does not."""

    def __init__(self) -> None:
        self._initial = 65535
        self._connection = 65535
        self._streams: dict[int, int] = {}
        self._buffer = b""

    def heard(self, data: bytes) -> bytes:
        """Take note of what the server sent; return what a client says to that."""
        self._buffer += data
        said = b""
        while len(self._buffer) >= 9 and len(self._buffer) >= 9 + (size := int.from_bytes(self._buffer[:3], "big")):
            kind, flags, stream = self._buffer[3], self._buffer[4], int.from_bytes(self._buffer[5:9], "big")
            payload, self._buffer = self._buffer[9 : 9 + size], self._buffer[9 + size :]
            if kind == SETTINGS and not flags & ACK:
                self._settings(payload)
                said += frame(SETTINGS, ACK, 0)
            elif kind == PING and not flags & ACK:
                said += frame(PING, ACK, 0, payload)
            elif kind == WINDOW_UPDATE and stream:
                self._streams[stream] = self._streams.get(stream, self._initial) + int.from_bytes(payload, "big")
            elif kind == WINDOW_UPDATE:
                self._connection += int.from_bytes(payload, "big")
        return said

    def _settings(self, payload: bytes) -> None:
        for start in range(0, len(payload), 6):
            # SETTINGS_INITIAL_WINDOW_SIZE holds for the streams that there are, too.
            if int.from_bytes(payload[start : start + 2], "big") == 4:
                value = int.from_bytes(payload[start + 2 : start + 6], "big")
                self._streams = {stream: window + value - self._initial for stream, window in self._streams.items()}
                self._initial = value

    def take(self, stream: int, wanted: int) -> int:
        """How many bytes of `wanted` may be sent in a frame now; they are counted as sent."""
        window = self._streams.get(stream, self._initial)
        size = max(0, min(wanted, window, self._connection, 16384))
        self._streams[stream] = window - size
        self._connection -= size
        return size

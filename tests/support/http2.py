"""A client that speaks HTTP/2 by hand, to say what no gRPC library would: half a message, a flood, nothing at all."""

from __future__ import annotations

import socket

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 0x01, 0x04, 0x01
READ_PCRS = "/vtpm.v1.TpmService/ReadPcrs"
EXECUTE = "/vtpm.v1.TpmService/Execute"
EXECUTE_STREAM = "/vtpm.v1.TpmService/ExecuteStream"
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

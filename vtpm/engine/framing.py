"""Length-prefixed messages on stream sockets: u32 length (big-endian), then that many bytes."""

from __future__ import annotations

import socket
import struct
from typing import Final

from vtpm.errors import EngineError

LENGTH: Final = struct.Struct(">I")
# A permanent state is a few kB and at most some hundred; a frame above this is a broken or hostile peer.
MAX_FRAME_SIZE: Final = 4 << 20


def frame(message: bytes) -> bytes:
    """Return `message` with its length in front."""
    return LENGTH.pack(len(message)) + message


class FrameReader:
    """Collects bytes as they come and gives whole messages.

    Bytes come from another process: a length above the bound is refused before anything is kept for it.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a part of a message has come, and not all of it."""
        return bool(self._buffer)

    def feed(self, data: bytes, *, limit: int = MAX_FRAME_SIZE, most: int | None = None) -> list[bytes]:
        """Add `data`; return the messages that are now whole. A message has at most `limit` bytes, and `most` may come at once.

        Raises:
            EngineError: FRAME_TOO_LARGE, FRAMES_TOO_MANY.
        """
        buffer = self._buffer
        # Nearly always a message comes alone and whole.
        if not buffer and len(data) >= LENGTH.size and LENGTH.unpack_from(data)[0] == len(data) - LENGTH.size <= limit:
            return [data[LENGTH.size :]]
        buffer += data
        messages: list[bytes] = []
        while len(buffer) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(buffer)
            if size > limit:
                raise EngineError("FRAME_TOO_LARGE", f"a peer announced a frame of {size} bytes")
            end = LENGTH.size + size
            if len(buffer) < end:
                break
            if most is not None and len(messages) == most:
                raise EngineError("FRAMES_TOO_MANY", f"a peer sent more than {most} frames at once")
            messages.append(bytes(memoryview(buffer)[LENGTH.size : end]))
            del buffer[:end]
        return messages


def receive_frame(sock: socket.socket) -> bytes:
    """Read one message from a blocking socket.

    Raises:
        EOFError: the peer is gone.
        EngineError: FRAME_TOO_LARGE.
    """
    (size,) = LENGTH.unpack(_receive(sock, LENGTH.size))
    if size > MAX_FRAME_SIZE:
        raise EngineError("FRAME_TOO_LARGE", f"a peer announced a frame of {size} bytes")
    return _receive(sock, size)


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data

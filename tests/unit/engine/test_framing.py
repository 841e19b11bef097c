"""Messages between processes arrive whole, in order, and never larger than agreed."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.engine.framing import LENGTH, MAX_FRAME_SIZE, FrameReader, frame, receive_frame
from vtpm.errors import EngineError

messages = st.lists(st.binary(max_size=80), max_size=8)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        yield ours, theirs


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[first:last] for first, last in itertools.pairwise(ends)]


def test_a_frame_is_its_length_and_its_message() -> None:
    assert frame(b"hello") == b"\0\0\0\x05hello"
    assert frame(b"") == b"\0\0\0\0"


@settings(deadline=None)
@given(sent=messages, cuts=st.lists(st.integers(0, 700), max_size=20))
def test_messages_arrive_whatever_the_pieces(sent: list[bytes], cuts: list[int]) -> None:
    reader = FrameReader()
    arrived = [message for piece in pieces(b"".join(map(frame, sent)), cuts) for message in reader.feed(piece)]
    assert arrived == sent


@settings(deadline=None)
@given(sent=messages)
def test_messages_arrive_byte_by_byte_and_each_with_its_last_byte(sent: list[bytes]) -> None:
    reader = FrameReader()
    for message in sent:
        *most, last = frame(message)
        assert [reader.feed(bytes([byte])) for byte in most] == [[]] * len(most)
        assert reader.feed(bytes([last])) == [message]


@settings(deadline=None)
@given(sent=messages, rest=st.binary(max_size=3))
def test_half_a_message_waits_for_its_rest(sent: list[bytes], rest: bytes) -> None:
    reader = FrameReader()
    assert reader.feed(b"".join(map(frame, sent)) + LENGTH.pack(len(rest) + 1) + rest) == sent
    assert reader.feed(b"!") == [rest + b"!"]


def test_a_message_is_not_changed_by_what_comes_after_it() -> None:
    reader = FrameReader()
    (first,) = reader.feed(frame(b"first"))
    reader.feed(frame(b"other"))
    assert first == b"first"


def test_the_largest_message_arrives() -> None:
    largest = bytes(MAX_FRAME_SIZE)
    assert FrameReader().feed(frame(largest)) == [largest]


@settings(deadline=None)
@given(size=st.integers(MAX_FRAME_SIZE + 1, 0xFFFF_FFFF), tail=st.binary(max_size=8))
def test_a_length_above_the_bound_is_refused_before_the_message_comes(size: int, tail: bytes) -> None:
    with pytest.raises(EngineError, match=str(size)) as refused:
        FrameReader().feed(LENGTH.pack(size) + tail)
    assert refused.value.reason == "FRAME_TOO_LARGE"


def test_a_length_above_the_bound_is_refused_behind_good_messages_too() -> None:
    reader = FrameReader()
    assert reader.feed(frame(b"good") + LENGTH.pack(MAX_FRAME_SIZE + 1)[:3]) == [b"good"]
    with pytest.raises(EngineError):
        reader.feed(LENGTH.pack(MAX_FRAME_SIZE + 1)[3:])


def test_a_message_is_received_from_a_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(frame(b"first") + frame(b"") + frame(b"second"))
    assert [receive_frame(ours) for _ in range(3)] == [b"first", b"", b"second"]


def test_a_message_larger_than_a_socket_buffer_is_received_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    message = bytes(range(256)) * 8192
    sender = threading.Thread(target=theirs.sendall, args=(frame(message),))
    sender.start()
    assert receive_frame(ours) == message
    sender.join()


@pytest.mark.parametrize("sent", [b"", b"\0\0", b"\0\0\0\x05", b"\0\0\0\x05hell"])
def test_a_peer_that_leaves_in_a_message_is_an_end_and_no_message(
    pair: tuple[socket.socket, socket.socket], sent: bytes
) -> None:
    ours, theirs = pair
    theirs.sendall(sent)
    theirs.close()
    with pytest.raises(EOFError):
        receive_frame(ours)


def test_a_length_above_the_bound_is_refused_on_a_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.sendall(LENGTH.pack(MAX_FRAME_SIZE + 1))
    with pytest.raises(EngineError) as refused:
        receive_frame(ours)
    assert refused.value.reason == "FRAME_TOO_LARGE"

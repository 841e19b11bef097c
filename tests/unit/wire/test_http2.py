"""What an HTTP/2 connection holds of unfinished messages, however its bytes are cut."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import http2
from vtpm.errors import InvalidArgumentError
from vtpm.wire.http2 import MAX_FRAME_SIZE, PREFACE, MessageWatch, Sent

BEGINNING = PREFACE + http2.frame(http2.SETTINGS, 0, 0)
TRAILERS = http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, 1, b"\x88")


def begun() -> MessageWatch:
    """A connection whose client has said its first words and opened stream 1."""
    watch = MessageWatch()
    assert watch.sent(BEGINNING + http2.call(1, http2.EXECUTE_STREAM), 1.0).opened == 1
    return watch


def test_a_whole_message_is_nothing_that_waits() -> None:
    watch = begun()
    watch.sent(http2.message(1, bytes(100_000), end=False), 2.0)
    assert (watch.unfinished, watch.oldest) == (0, None)


def test_what_has_come_of_a_message_waits_since_its_first_byte() -> None:
    watch = begun()
    whole = http2.message(1, bytes(1000), end=False)
    watch.sent(whole[:20], 2.0)
    watch.sent(whole[20:-1], 3.0)
    assert (watch.unfinished, watch.oldest) == (1004, 2.0)
    watch.sent(whole[-1:], 4.0)
    assert (watch.unfinished, watch.oldest) == (0, None)


@pytest.mark.parametrize("by", ["client", "server"])
def test_a_stream_that_has_ended_holds_nothing(by: str) -> None:
    watch = begun()
    watch.sent(http2.frame(http2.DATA, 0, 1, http2.prefix(1000) + bytes(500)), 2.0)
    assert watch.unfinished == 505
    if by == "client":
        watch.sent(http2.frame(http2.RST_STREAM, 0, 1, bytes(4)), 3.0)
    else:
        watch.answered(TRAILERS)
    assert (watch.unfinished, watch.oldest) == (0, None)
    assert watch.sent(http2.frame(http2.DATA, 0, 1, bytes(500)), 4.0) == Sent(0, 0, 500)
    assert watch.unfinished == 0


def test_streams_that_the_server_refuses_are_told_from_those_that_it_answers() -> None:
    watch = begun()
    watch.sent(http2.call(3, http2.EXECUTE), 2.0)
    assert watch.answered(http2.frame(http2.RST_STREAM, 0, 3, bytes(4))) == 1
    assert watch.answered(TRAILERS + http2.frame(http2.RST_STREAM, 0, 1, bytes(4))) == 0


def test_a_call_is_handed_over_when_all_of_its_headers_are_there() -> None:
    watch = MessageWatch()
    headers = http2.call(1, http2.EXECUTE)[9:]
    assert watch.sent(BEGINNING + http2.frame(http2.HEADERS, http2.END_STREAM, 1, headers[:20]), 1.0).opened == 0
    assert watch.sent(http2.frame(http2.CONTINUATION, 0, 1, headers[20:30]), 1.0).opened == 0
    assert watch.sent(http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1, headers[30:]), 1.0).opened == 1
    assert watch.sent(http2.frame(http2.CONTINUATION, http2.END_HEADERS, 1), 1.0).opened == 0


def test_a_call_that_is_given_up_unanswered_is_counted() -> None:
    watch = begun()
    assert watch.sent(http2.frame(http2.RST_STREAM, 0, 1, bytes(4)), 2.0).given_up == 1


def test_what_no_client_of_grpc_sends_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as large:
        begun().sent((MAX_FRAME_SIZE + 1).to_bytes(3, "big") + bytes(6), 2.0)
    assert large.value.reason == "HTTP2_FRAME_TOO_LARGE"
    with pytest.raises(InvalidArgumentError) as padded:
        begun().sent(http2.frame(http2.DATA, 0x08, 1, b"\x01xx"), 2.0)
    assert padded.value.reason == "HTTP2_PADDED"
    with pytest.raises(InvalidArgumentError) as many:
        begun().sent(b"".join(http2.call(stream, http2.EXECUTE) for stream in range(3, 4001, 2)), 2.0)
    assert many.value.reason == "HTTP2_TOO_MANY_STREAMS"


@given(
    messages=st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.integers(0, 40_000)), max_size=6),
    kept=st.floats(0, 1),
    cuts=st.lists(st.integers(1, 70_000), min_size=1, max_size=20),
)
def test_however_the_bytes_are_cut_the_count_is_of_what_is_missing_its_end(
    messages: list[tuple[int, int]], kept: float, cuts: list[int]
) -> None:
    watch = MessageWatch()
    watch.sent(BEGINNING + b"".join(http2.call(stream, http2.EXECUTE_STREAM) for stream in (1, 3, 5)), 0.0)
    data = b"".join(http2.message(stream, bytes(size), end=False) for stream, size in messages)
    data = data[: int(len(data) * kept)]
    position = 0
    for number in range(len(data)):
        cut = cuts[number % len(cuts)]
        watch.sent(data[position : position + cut], 1.0)
        position += cut
        if position >= len(data):
            break
    # The last message alone can be without its end; what has come of it is all but its frames' headers.
    expected = 0
    for stream, size in messages:
        whole = http2.message(stream, bytes(size), end=False)
        if len(data) < len(whole):
            frames, rest = divmod(len(data), 9 + MAX_FRAME_SIZE)
            expected = frames * MAX_FRAME_SIZE + max(0, rest - 9)
            break
        data = data[len(whole) :]
    assert watch.unfinished == expected


@given(st.lists(st.binary(max_size=200), max_size=20), st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_followed_or_refused_and_never_counted_beyond_what_came(
    requests: list[bytes], answers: list[bytes]
) -> None:
    watch, sent = MessageWatch(), 0
    with contextlib.suppress(InvalidArgumentError):
        for request in (PREFACE, *requests):
            sent += len(request)
            watch.sent(request, 1.0)
            assert 0 <= watch.unfinished <= sent
        for answer in answers:
            watch.answered(answer)
            assert 0 <= watch.unfinished <= sent

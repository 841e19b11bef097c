"""Requests of the mssim protocol, as tpm2-tss and IBM's TSS send them, in whatever pieces a socket gives."""

from __future__ import annotations

import contextlib
import itertools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.command import MAX_COMMAND_SIZE
from vtpm.wire.mssim_protocol import MAX_HASH_DATA_SIZE, Code, Port, Request, RequestReader

GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0008")
# Byte by byte as they are on the wire (TpmTcpProtocol.h).
SENT = {
    bytes.fromhex("00000008 00 0000000c") + GET_RANDOM: Request(Code.SEND_COMMAND, 0, GET_RANDOM),
    bytes.fromhex("00000008 03 00000000"): Request(Code.SEND_COMMAND, 3, b""),
    bytes.fromhex("0000000f 00000001"): Request(Code.REMOTE_HANDSHAKE, 0, b"\0\0\0\x01"),
    bytes.fromhex("00000010 00000000"): Request(Code.SET_ALTERNATIVE_RESULT, 0, bytes(4)),
    bytes.fromhex("00000005"): Request(Code.HASH_START),
    bytes.fromhex("00000006 00000003 616263"): Request(Code.HASH_DATA, 0, b"abc"),
    bytes.fromhex("00000007"): Request(Code.HASH_END),
    bytes.fromhex("00000014"): Request(Code.SESSION_END),
    bytes.fromhex("00000015"): Request(Code.STOP),
    GET_RANDOM: Request(Code.SEND_COMMAND, 0, GET_RANDOM, raw=True),
}
SIGNALS = [1, 2, 3, 4, 9, 10, 11, 12, 13, 14, 17, 20, 21, 30]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[first:last] for first, last in itertools.pairwise(ends)]


def taken(reader: RequestReader) -> list[Request]:
    requests = []
    while (request := reader.take()) is not None:
        requests.append(request)
    return requests


def read(port: Port, parts: list[bytes]) -> list[Request]:
    reader, requests = RequestReader(port), []
    for part in parts:
        reader.feed(part)
        requests += taken(reader)
    assert not reader.partial
    return requests


def refusal(port: Port, sent: bytes) -> str:
    reader = RequestReader(port)
    reader.feed(sent)
    with pytest.raises(InvalidArgumentError) as refused:
        reader.take()
    return refused.value.reason


@pytest.mark.parametrize(("sent", "request_"), SENT.items(), ids=[f"{r.code.name} {r.raw}" for r in SENT.values()])
def test_a_request_is_read_whole_and_byte_by_byte(sent: bytes, request_: Request) -> None:
    assert read(Port.COMMAND, [sent]) == [request_]
    assert read(Port.COMMAND, [bytes([byte]) for byte in sent]) == [request_]


@given(st.lists(st.sampled_from(list(SENT)), max_size=8), st.lists(st.integers(0, 200), max_size=12))
def test_requests_in_any_pieces_are_the_same_requests(sent: list[bytes], cuts: list[int]) -> None:
    assert read(Port.COMMAND, pieces(b"".join(sent), cuts)) == [SENT[one] for one in sent]


@given(st.lists(st.sampled_from(SIGNALS), max_size=8), st.lists(st.integers(0, 40), max_size=8))
def test_the_platform_port_has_codes_alone(codes: list[int], cuts: list[int]) -> None:
    sent = b"".join(struct.pack(">I", code) for code in codes)
    assert read(Port.PLATFORM, pieces(sent, cuts)) == [Request(Code(code)) for code in codes]


@given(locality=st.integers(0, 255), command=st.binary(max_size=MAX_COMMAND_SIZE))
def test_a_command_is_handed_on_untouched(locality: int, command: bytes) -> None:
    sent = struct.pack(">IBI", 8, locality, len(command)) + command
    assert read(Port.COMMAND, [sent]) == [Request(Code.SEND_COMMAND, locality, command)]


@pytest.mark.parametrize("code", [0, 1, 2, 17, 18, 22, 25, 26, 255, 0x8003 << 16, 0xFFFFFFFF])
def test_a_code_that_the_command_port_does_not_know(code: int) -> None:
    assert refusal(Port.COMMAND, struct.pack(">I", code)) == "MSSIM_CODE_UNKNOWN"


@pytest.mark.parametrize("code", [0, 5, 6, 7, 8, 15, 16, 18, 25, 0x80010000, 0xFFFFFFFF])
def test_a_code_that_the_platform_port_does_not_know(code: int) -> None:
    assert refusal(Port.PLATFORM, struct.pack(">I", code)) == "MSSIM_CODE_UNKNOWN"


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">IBI", 8, 0, MAX_COMMAND_SIZE + 1),
        struct.pack(">IBI", 8, 0, 0xFFFFFFFF),
        struct.pack(">II", 6, MAX_HASH_DATA_SIZE + 1),
        struct.pack(">HI", 0x8001, 9),
        struct.pack(">HI", 0x8002, MAX_COMMAND_SIZE + 1),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_it_is_waited_for(sent: bytes) -> None:
    assert refusal(Port.COMMAND, sent) == "MSSIM_SIZE_INVALID"


@settings(deadline=None)
@given(port=st.sampled_from(Port), parts=st.lists(st.binary(max_size=300), max_size=20))
def test_any_bytes_give_requests_or_one_refusal_and_are_not_hoarded(port: Port, parts: list[bytes]) -> None:
    reader, sizes = RequestReader(port), 0
    with contextlib.suppress(InvalidArgumentError):
        for part in parts:
            reader.feed(part)
            sizes += sum(len(request.body) for request in taken(reader))
            assert len(reader._buffer) <= 9 + MAX_HASH_DATA_SIZE
    assert sizes <= sum(map(len, parts))

"""Requests on the swtpm control channel, as tpm2-tss and QEMU send them, in whatever pieces a socket gives."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.tpm.ptm import ControlCommand, ControlReader

Request = tuple[ControlCommand, bytes]

# One request of each kind, byte by byte as it is on the wire (tpm_ioctl.h of swtpm, big-endian).
GET_CAPABILITY = bytes.fromhex("00000001")
INIT = bytes.fromhex("00000002 00000000")
INIT_DELETING_VOLATILE = bytes.fromhex("00000002 00000001")
GET_TPMESTABLISHED = bytes.fromhex("00000004")
SET_LOCALITY_3_OF_TSS = bytes.fromhex("00000005 03")
SET_LOCALITY_3_OF_QEMU = bytes.fromhex("00000005 03000000")

plain_requests = st.lists(
    st.sampled_from(
        [
            (GET_CAPABILITY, (ControlCommand.GET_CAPABILITY, b"")),
            (GET_TPMESTABLISHED, (ControlCommand.GET_TPMESTABLISHED, b"")),
            (INIT, (ControlCommand.INIT, b"\0\0\0\0")),
            (INIT_DELETING_VOLATILE, (ControlCommand.INIT, b"\0\0\0\x01")),
        ]
    ),
    max_size=8,
)
localities = st.integers(0, 255).map(lambda number: bytes([number]))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[first:last] for first, last in itertools.pairwise(ends)]


def fed(parts: list[bytes]) -> tuple[list[Request], bool]:
    reader = ControlReader()
    return [request for part in parts for request in reader.feed(part)], reader.broken


@pytest.mark.parametrize(
    ("sent", "request_"),
    [
        (GET_CAPABILITY, (ControlCommand.GET_CAPABILITY, b"")),
        (INIT, (ControlCommand.INIT, b"\0\0\0\0")),
        (GET_TPMESTABLISHED, (ControlCommand.GET_TPMESTABLISHED, b"")),
        (SET_LOCALITY_3_OF_TSS, (ControlCommand.SET_LOCALITY, b"\x03")),
        (SET_LOCALITY_3_OF_QEMU, (ControlCommand.SET_LOCALITY, b"\x03")),
    ],
    ids=["get capability", "init", "get established", "set locality (tpm2-tss)", "set locality (QEMU)"],
)
def test_a_request_is_read_whole_and_byte_by_byte(sent: bytes, request_: Request) -> None:
    assert fed([sent]) == ([request_], False)
    assert fed([bytes([byte]) for byte in sent]) == ([request_], False)


@settings(deadline=None)
@given(requests=plain_requests, cuts=st.lists(st.integers(0, 70), max_size=12))
def test_requests_are_read_whatever_the_pieces(requests: list[tuple[bytes, Request]], cuts: list[int]) -> None:
    stream = b"".join(sent for sent, _ in requests)
    assert fed(pieces(stream, cuts)) == ([request for _, request in requests], False)


@settings(deadline=None)
@given(locality=localities, padding=st.sampled_from([b"", b"\0\0\0"]), after=plain_requests)
def test_a_locality_with_or_without_padding_leaves_the_next_request_whole(
    locality: bytes, padding: bytes, after: list[tuple[bytes, Request]]
) -> None:
    sent = [b"\0\0\0\x05" + locality + padding, *(part for part, _ in after)]
    wanted = [(ControlCommand.SET_LOCALITY, locality), *(request for _, request in after)]
    assert fed(sent) == (wanted, False)
    assert fed([b"".join(sent)]) == (wanted, False)


@settings(deadline=None)
@given(first=localities, second=localities, padding=st.sampled_from([b"", b"\0\0\0"]))
def test_one_locality_after_another_is_read(first: bytes, second: bytes, padding: bytes) -> None:
    sent = [b"\0\0\0\x05" + first + padding, b"\0\0\0\x05" + second + padding]
    wanted = [(ControlCommand.SET_LOCALITY, first), (ControlCommand.SET_LOCALITY, second)]
    assert fed(sent) == (wanted, False)
    assert fed([b"".join(sent)]) == (wanted, False)


@settings(deadline=None)
@given(locality=localities)
def test_padding_that_comes_after_its_locality_is_not_taken_for_a_request(locality: bytes) -> None:
    wanted = [(ControlCommand.SET_LOCALITY, locality), (ControlCommand.GET_CAPABILITY, b"")]
    assert fed([b"\0\0\0\x05" + locality, b"\0\0\0", GET_CAPABILITY]) == (wanted, False)
    assert fed([b"\0\0\0\x05" + locality, b"\0\0\0" + GET_CAPABILITY]) == (wanted, False)


@settings(deadline=None)
@given(code=st.integers(0, 0xFFFF_FFFF).filter(lambda code: code not in set(ControlCommand)), after=st.binary(max_size=20))
def test_an_unknown_code_loses_the_framing_and_nothing_behind_it_is_believed(code: int, after: bytes) -> None:
    reader = ControlReader()
    assert reader.feed(GET_CAPABILITY + code.to_bytes(4, "big") + after) == [(ControlCommand.GET_CAPABILITY, b"")]
    assert reader.broken
    assert reader.feed(GET_CAPABILITY) == []


@pytest.mark.parametrize("sent", [GET_CAPABILITY[:3], INIT[:4], INIT[:7], SET_LOCALITY_3_OF_TSS[:4]])
def test_half_a_request_waits_for_its_rest(sent: bytes) -> None:
    assert fed([sent]) == ([], False)


@settings(deadline=None)
@given(data=st.binary(max_size=100), cuts=st.lists(st.integers(0, 100), max_size=12))
def test_any_bytes_give_known_requests_with_payloads_of_their_size(data: bytes, cuts: list[int]) -> None:
    sizes = {ControlCommand.INIT: 4, ControlCommand.SET_LOCALITY: 1}
    requests, _broken = fed(pieces(data, cuts))
    assert all(len(payload) == sizes.get(command, 0) for command, payload in requests)
    assert sum(4 + len(payload) for _, payload in requests) <= len(data)


@settings(deadline=None)
@given(
    locality=localities,
    padding=st.sampled_from([b"", b"\0\0\0"]),
    after=plain_requests,
    cuts=st.lists(st.integers(0, 20), max_size=12),
)
def test_padding_is_told_from_the_next_request_however_the_bytes_come(
    locality: bytes, padding: bytes, after: list[tuple[bytes, Request]], cuts: list[int]
) -> None:
    data = ControlCommand.SET_LOCALITY.to_bytes(4, "big") + locality[-1:] + padding + b"".join(sent for sent, _ in after)
    requests, broken = fed(pieces(data, cuts))
    assert not broken
    assert requests[1:] == [request for _, request in after]

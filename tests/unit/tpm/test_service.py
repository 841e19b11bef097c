"""The commands that serve a running instance, as bytes; tpm2-tss writes the responses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss.types import TPM2B_DIGEST, TPML_DIGEST, TPML_PCR_SELECTION

from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import Handle, Tag
from vtpm.tpm.command import HEADER_SIZE, build, error_response, parse_header
from vtpm.tpm.pcr import PcrBank, PcrSelection
from vtpm.tpm.service import (
    hierarchy_change_auth_command,
    parse_pcr_read,
    parse_quote,
    pcr_extend_command,
    pcr_read_command,
    quote_command,
    response_code,
    shutdown_clear_command,
    startup_clear_command,
)

ATTEST = b"\xffTCG\x80\x18 and the rest of it"
SIGNATURE = bytes.fromhex("0018000b0020") + b"r" * 32 + bytes.fromhex("0020") + b"s" * 32
EMPTY_SESSION = bytes.fromhex("0000010000")

digests = st.lists(st.binary(min_size=1, max_size=64), max_size=8)


def pcr_read_response(counter: int, values: list[bytes]) -> bytes:
    selected = TPML_PCR_SELECTION.parse("sha256:0,1,2").marshal()
    content: bytes = TPML_DIGEST([TPM2B_DIGEST(value) for value in values]).marshal()
    return build(0, counter.to_bytes(4, "big") + selected + content)


def quote_response(attest: bytes, signature: bytes) -> bytes:
    parameters = len(attest).to_bytes(2, "big") + attest + signature
    return build(0, len(parameters).to_bytes(4, "big") + parameters + EMPTY_SESSION, Tag.SESSIONS)


def test_startup_and_shutdown_clear_are_what_firmware_sends() -> None:
    assert startup_clear_command() == bytes.fromhex("8001 0000000c 00000144 0000")
    assert shutdown_clear_command() == bytes.fromhex("8001 0000000c 00000145 0000")


def test_a_hierarchy_with_an_empty_auth_is_given_another() -> None:
    assert hierarchy_change_auth_command(Handle.PLATFORM, b"\xaa\xbb") == bytes.fromhex(
        "8002 0000001f 00000129 4000000c"  # header, TPM_RH_PLATFORM
        "00000009 40000009 0000 00 0000"  # TPM_RS_PW, no nonce, no attributes, no password
        "0002 aabb"  # newAuth
    )  # fmt: skip


def test_an_extend_has_a_digest_for_each_bank() -> None:
    command = pcr_extend_command(14, {PcrBank.SHA1: b"\x11" * 20, PcrBank.SHA256: b"\x22" * 32})
    assert command == bytes.fromhex(
        "8002 00000057 00000182 0000000e"  # header, PCR 14
        "00000009 40000009 0000 00 0000"  # TPM_RS_PW, no nonce, no attributes, no password
        "00000002 0004" + "11" * 20 + "000b" + "22" * 32
    )  # fmt: skip


def test_a_pcr_read_is_what_tpm2_tools_send() -> None:
    command = pcr_read_command(PcrSelection(PcrBank.SHA256, (0, 1, 7)))
    assert command == bytes.fromhex("8001 00000014 0000017e 00000001 000b 03 830000")


def test_a_quote_is_signed_with_an_empty_password_and_the_keys_own_scheme() -> None:
    command = quote_command(0x81800003, [PcrSelection(PcrBank.SHA384, (0,))], b"nonce")
    assert parse_header(command).size == len(command)
    assert command == bytes.fromhex(
        "8002 0000002e 00000158 81800003"  # header, key
        "00000009 40000009 0000 00 0000"  # TPM_RS_PW, no nonce, no attributes, no password
        "0005 6e6f6e6365 0010"  # qualifyingData, TPM_ALG_NULL
        "00000001 000c 03 010000"
    )  # fmt: skip


@settings(deadline=None)
@given(counter=st.integers(0, 2**32 - 1), values=digests)
def test_the_digests_of_a_pcr_read_come_back(counter: int, values: list[bytes]) -> None:
    assert parse_pcr_read(pcr_read_response(counter, values)) == (counter, tuple(values))


@settings(deadline=None)
@given(attest=st.binary(max_size=200), signature=st.binary(min_size=1, max_size=200))
def test_attest_and_signature_of_a_quote_come_back_without_the_session(attest: bytes, signature: bytes) -> None:
    assert parse_quote(quote_response(attest, signature)) == (attest, signature)


@pytest.mark.parametrize("rc", [0, 0x100, 0x922, 0x1C4])
def test_the_response_code_is_read(rc: int) -> None:
    assert response_code(error_response(rc)) == rc


def refused_reason(parse: Callable[[bytes], object], response: bytes) -> str:
    with pytest.raises(InvalidArgumentError) as refused:
        parse(response)
    return refused.value.reason


@settings(deadline=None)
@given(data=st.data())
def test_a_pcr_read_cut_in_its_digests_is_refused(data: st.DataObject) -> None:
    whole = pcr_read_response(1, [b"a" * 32, b"b" * 32])
    selection_end = HEADER_SIZE + 4 + 10
    cut = data.draw(st.integers(selection_end, len(whole) - 1))
    assert refused_reason(parse_pcr_read, whole[:cut]) == "RESPONSE_MALFORMED"


def test_a_pcr_read_of_more_digests_than_a_tpm_gives_is_refused() -> None:
    whole = bytearray(pcr_read_response(1, [b"a" * 32] * 8))
    count_at = HEADER_SIZE + 4 + 10
    assert whole[count_at : count_at + 4] == b"\0\0\0\x08"
    whole[count_at + 3] = 9
    assert refused_reason(parse_pcr_read, bytes(whole) + b"\0\x20" + b"a" * 32) == "RESPONSE_MALFORMED"


@settings(deadline=None)
@given(data=st.data())
def test_a_cut_quote_is_refused(data: st.DataObject) -> None:
    whole = quote_response(ATTEST, SIGNATURE)
    cut = data.draw(st.integers(0, len(whole) - len(EMPTY_SESSION) - 1))
    assert refused_reason(parse_quote, whole[:cut]) == "RESPONSE_MALFORMED"


@pytest.mark.parametrize("size", [0, 1, 2, len(ATTEST) + 2, 4096, 0xFFFF_FFFF])
def test_a_quote_whose_parameter_size_leaves_no_signature_or_reaches_too_far_is_refused(size: int) -> None:
    whole = quote_response(ATTEST, SIGNATURE)
    lying = whole[:HEADER_SIZE] + size.to_bytes(4, "big") + whole[HEADER_SIZE + 4 :]
    assert refused_reason(parse_quote, lying) == "RESPONSE_MALFORMED"

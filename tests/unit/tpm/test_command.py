"""Headers of commands and responses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss.constants import TPM2_RC

from vtpm.errors import ErrorKind, InvalidArgumentError
from vtpm.tpm.codes import TPM_RC_COMMAND_SIZE, TPM_RC_FAILURE, TPM_RC_RETRY, CommandCode, Tag
from vtpm.tpm.command import HEADER_SIZE, Header, build, error_response, parse_header

# TPM2_Startup(TPM_SU_CLEAR) as every firmware sends it.
STARTUP_CLEAR = bytes.fromhex("80010000000c000001440000")


def test_startup_is_built_as_firmware_sends_it() -> None:
    assert build(CommandCode.Startup, b"\0\0") == STARTUP_CLEAR


def test_the_header_of_startup_is_read() -> None:
    assert parse_header(STARTUP_CLEAR) == Header(Tag.NO_SESSIONS, 12, CommandCode.Startup)


def test_a_command_with_sessions_carries_their_tag() -> None:
    assert parse_header(build(CommandCode.NV_Write, bytes(20), Tag.SESSIONS)).tag == Tag.SESSIONS


def test_the_size_is_what_the_sender_claims_not_what_came() -> None:
    assert parse_header(bytes.fromhex("8001ffffffff00000144")).size == 0xFFFF_FFFF


@settings(deadline=None)
@given(data=st.binary(max_size=HEADER_SIZE - 1))
def test_a_cut_header_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_header(data)
    assert (refused.value.reason, refused.value.kind) == ("TPM_HEADER_TRUNCATED", ErrorKind.INVALID_ARGUMENT)


@settings(deadline=None)
@given(code=st.integers(0, 0xFFFF_FFFF), body=st.binary(max_size=200), tag=st.sampled_from(Tag))
def test_what_is_built_is_what_is_parsed(code: int, body: bytes, tag: Tag) -> None:
    command = build(code, body, tag)
    assert parse_header(command) == Header(tag, len(command), code)
    assert command[HEADER_SIZE:] == body


@settings(deadline=None)
@given(data=st.binary(min_size=HEADER_SIZE, max_size=64))
def test_any_ten_bytes_are_a_header_and_nothing_is_lost(data: bytes) -> None:
    header = parse_header(data)
    assert header.tag.to_bytes(2, "big") + header.size.to_bytes(4, "big") + header.code.to_bytes(4, "big") == data[:HEADER_SIZE]


@pytest.mark.parametrize(
    ("rc", "theirs"),
    [(TPM_RC_FAILURE, TPM2_RC.FAILURE), (TPM_RC_RETRY, TPM2_RC.RETRY), (TPM_RC_COMMAND_SIZE, TPM2_RC.COMMAND_SIZE)],
)
def test_an_error_response_is_a_header_alone(rc: int, theirs: int) -> None:
    assert error_response(rc) == bytes.fromhex("80010000000a") + int(theirs).to_bytes(4, "big")

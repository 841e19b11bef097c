"""Numbers and names of the standard, checked against tpm2-tss, which wrote them down on its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tpm2_pytss.constants import TPM2_ALG, TPM2_CC, TPM2_ECC, TPM2_RC, TPM2_RH, TPM2_ST

from vtpm.tpm.codes import AlgId, CommandCode, EccCurve, Handle, Tag, command_name, response_code_name

FORMAT_ONE_NAMES = [
    "ASYMMETRIC", "ATTRIBUTES", "HASH", "VALUE", "HIERARCHY", "KEY_SIZE", "MGF", "MODE", "TYPE", "HANDLE", "KDF",
    "RANGE", "AUTH_FAIL", "NONCE", "PP", "SCHEME", "SIZE", "SYMMETRIC", "TAG", "SELECTOR", "INSUFFICIENT", "SIGNATURE",
    "KEY", "POLICY_FAIL", "INTEGRITY", "TICKET", "BAD_AUTH", "EXPIRED", "POLICY_CC", "BINDING", "CURVE", "ECC_POINT",
]  # fmt: skip
FORMAT_ZERO_NAMES = [
    "INITIALIZE", "FAILURE", "SEQUENCE", "PRIVATE", "HMAC", "DISABLED", "EXCLUSIVE", "AUTH_TYPE", "AUTH_MISSING",
    "POLICY", "PCR", "PCR_CHANGED", "UPGRADE", "TOO_MANY_CONTEXTS", "AUTH_UNAVAILABLE", "REBOOT", "UNBALANCED",
    "COMMAND_SIZE", "COMMAND_CODE", "AUTHSIZE", "AUTH_CONTEXT", "NV_RANGE", "NV_SIZE", "NV_LOCKED", "NV_AUTHORIZATION",
    "NV_UNINITIALIZED", "NV_SPACE", "NV_DEFINED", "BAD_CONTEXT", "CPHASH", "PARENT", "NEEDS_TEST", "NO_RESULT",
    "SENSITIVE", "CONTEXT_GAP", "OBJECT_MEMORY", "SESSION_MEMORY", "MEMORY", "SESSION_HANDLES", "OBJECT_HANDLES",
    "LOCALITY", "YIELDED", "CANCELED", "TESTING", "REFERENCE_H0", "REFERENCE_H1", "REFERENCE_H2", "REFERENCE_H3",
    "REFERENCE_H4", "REFERENCE_H5", "REFERENCE_H6", "NOT_USED",
]  # fmt: skip


@pytest.mark.parametrize("command", [code for code in CommandCode if hasattr(TPM2_CC, code.name)], ids=lambda code: code.name)
def test_a_command_code_is_that_of_the_standard(command: CommandCode) -> None:
    assert int(command) == int(getattr(TPM2_CC, command.name))


def test_every_command_that_tpm2_tss_knows_and_guests_use_has_a_name() -> None:
    guests_use = (
        "PCR_Read",
        "PCR_Extend",
        "Quote",
        "NV_Read",
        "NV_Write",
        "CreatePrimary",
        "Startup",
        "Clear",
        "GetCapability",
    )
    assert {command_name(int(getattr(TPM2_CC, name))) for name in guests_use} == {f"TPM2_{name}" for name in guests_use}


def test_an_unknown_command_code_is_shown_in_hexadecimal() -> None:
    assert command_name(0x2000_0001) == "0x20000001"


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *((alg, getattr(TPM2_ALG, alg.name)) for alg in AlgId),
        (EccCurve.NIST_P256, TPM2_ECC.NIST_P256),
        (EccCurve.NIST_P384, TPM2_ECC.NIST_P384),
        (Handle.OWNER, TPM2_RH.OWNER),
        (Handle.NULL, TPM2_RH.NULL),
        (Handle.PASSWORD, TPM2_RH.PW),
        (Handle.LOCKOUT, TPM2_RH.LOCKOUT),
        (Handle.ENDORSEMENT, TPM2_RH.ENDORSEMENT),
        (Handle.PLATFORM, TPM2_RH.PLATFORM),
        (Tag.NO_SESSIONS, TPM2_ST.NO_SESSIONS),
        (Tag.SESSIONS, TPM2_ST.SESSIONS),
        (Tag.ATTEST_QUOTE, TPM2_ST.ATTEST_QUOTE),
    ],
)
def test_a_constant_is_that_of_the_standard(ours: int, theirs: int) -> None:
    assert int(ours) == int(theirs)


@pytest.mark.parametrize("name", FORMAT_ZERO_NAMES)
def test_a_format_zero_response_code_is_called_by_its_name(name: str) -> None:
    assert response_code_name(int(getattr(TPM2_RC, name))) == f"TPM_RC_{name}"


@pytest.mark.parametrize("name", FORMAT_ONE_NAMES)
def test_a_format_one_response_code_says_what_it_is_about(name: str) -> None:
    rc = int(getattr(TPM2_RC, name))
    assert response_code_name(rc) == f"TPM_RC_{name}"
    assert response_code_name(rc | 0x040 | 0x300) == f"TPM_RC_{name} (parameter 3)"
    assert response_code_name(rc | 0x040 | 0xF00) == f"TPM_RC_{name} (parameter 15)"
    assert response_code_name(rc | 0x040 | 0x800) == f"TPM_RC_{name} (parameter 8)"
    assert response_code_name(rc | 0x200) == f"TPM_RC_{name} (handle 2)"
    assert response_code_name(rc | 0x800 | 0x100) == f"TPM_RC_{name} (session 1)"
    assert response_code_name(rc | 0x800 | 0x700) == f"TPM_RC_{name} (session 7)"


def test_success_is_called_success() -> None:
    assert response_code_name(0) == "TPM_RC_SUCCESS"


@pytest.mark.parametrize("rc", [0x102, 0x180, 0x11C4, 0x1_0100, 0x1_01C4, 0xFFFF_FFFF, 0xA0008])
def test_an_unknown_response_code_is_shown_in_hexadecimal(rc: int) -> None:
    assert response_code_name(rc) == f"0x{rc:x}"


@settings(deadline=None)
@given(rc=st.integers(0, 0xFFFF_FFFF))
def test_any_response_code_has_one_line_of_text(rc: int) -> None:
    text = response_code_name(rc)
    assert text.startswith("TPM_RC_") or int(text, 16) == rc
    assert text.isprintable()


@pytest.mark.parametrize(
    ("rc", "name"),
    [(0x910, "REFERENCE_H0"), (0x916, "REFERENCE_H6"), (0x918, "REFERENCE_S0"), (0x91E, "REFERENCE_S6"), (0x920, "NV_RATE"),
     (0x921, "LOCKOUT"), (0x922, "RETRY"), (0x923, "NV_UNAVAILABLE")],
)  # fmt: skip
def test_warnings_have_their_names(rc: int, name: str) -> None:
    assert response_code_name(rc) == f"TPM_RC_{name}"

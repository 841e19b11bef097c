"""Whatever names and models say: it is refused, or stands in the certificate as it was given."""

from __future__ import annotations

import contextlib
import subprocess

import pytest
from asn1crypto import cms
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.pki.given import INSTANCE, NOW, PLATFORM, TPM, an_authority, an_ek
from vtpm.errors import InvalidArgumentError
from vtpm.pki.model import MAX_TEXT, PlatformDescription, TpmDescription, check_text
from vtpm.pki.text import describe, to_pem
from vtpm.tpm.keys import KeyAlgorithm

EXAMPLES = ["", " ", "\0", "a\0b", "x" * 256, "x" * 257, "ä" * 150, "ä" * 300, 'say "hi"', "O'Brien", "a\\b", "a=b,c+d;e", "#1",
            "\u202egnp.exe", "line\nfeed", "\ud800", "日本語 モデル"]  # fmt: skip
texts = st.one_of(st.sampled_from(EXAMPLES), st.text(max_size=300))


def accepted(text: str) -> bool:
    try:
        check_text(text, "it")
    except InvalidArgumentError:
        return False
    return True


@given(texts)
@settings(max_examples=200, deadline=None)
def test_a_model_is_refused_or_read_back(model: str) -> None:
    if not accepted(model):
        with pytest.raises(InvalidArgumentError):
            TpmDescription(TPM.manufacturer, model, TPM.version)
        return
    tpm = TpmDescription(TPM.manufacturer, model, TPM.version)
    der = an_authority().issue_ek(an_ek(KeyAlgorithm.ECC_P256), tpm, now=NOW).der
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    (name,) = names.get_values_for_type(x509.DirectoryName)
    assert [attribute.value for attribute in name] == [tpm.manufacturer, model, tpm.version]
    assert f"TPM model:              {model} (critical)\n" in describe(der, attribute=False)


@given(texts, texts, texts)
@settings(max_examples=100, deadline=None)
def test_a_platform_is_refused_or_read_back(manufacturer: str, model: str, version: str) -> None:
    parts = (manufacturer, model, version)
    if not all(accepted(part) for part in parts):
        with pytest.raises(InvalidArgumentError):
            PlatformDescription(manufacturer, model, version, str(INSTANCE))
        return
    platform = PlatformDescription(manufacturer, model, version, str(INSTANCE))
    authority = an_authority()
    ek = authority.issue_ek(an_ek(KeyAlgorithm.ECC_P256), TPM, now=NOW)
    der = authority.issue_platform(ek, platform, TPM, now=NOW).der
    extensions = cms.AttributeCertificateV2.load(der, strict=True)["ac_info"]["extensions"]
    (alternative,) = [item["extn_value"].parsed for item in extensions if item["extn_id"].native == "subject_alt_name"]
    assert [pair["value"].native for rdn in alternative[0].chosen.chosen for pair in rdn] == [*parts, str(INSTANCE)]
    assert f"platform serial:        {INSTANCE}\n" in describe(der, attribute=True)


def test_limits_are_in_characters() -> None:
    assert accepted("ä" * MAX_TEXT)
    assert not accepted("ä" * (MAX_TEXT + 1))
    refused = ["", " ", "\0", "a\0b", "x" * 257, "ä" * 300, "\u202egnp.exe", "line\nfeed", "\ud800"]
    assert [text for text in EXAMPLES if not accepted(text)] == refused


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_showing_what_is_no_certificate_ends_in_an_error_of_ours(data: bytes) -> None:
    for attribute in (True, False):
        with pytest.raises(InvalidArgumentError) as caught:
            describe(data, attribute=attribute)
        assert caught.value.reason == "CERTIFICATE_UNREADABLE"


_PLATFORM_DER = (
    an_authority()
    .issue_platform(an_authority().issue_ek(an_ek(KeyAlgorithm.ECC_P256), TPM, now=NOW), PLATFORM, TPM, now=NOW)
    .der
)


@given(st.integers(0, len(_PLATFORM_DER) - 1), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_showing_a_damaged_platform_certificate_does_no_harm(index: int, change: int) -> None:
    der = bytearray(_PLATFORM_DER)
    der[index] ^= change
    with contextlib.suppress(InvalidArgumentError):
        text = describe(bytes(der), attribute=True)
        assert all(line.isprintable() for line in text.splitlines())


def test_pem_is_what_openssl_reads() -> None:
    authority = an_authority()
    ek = authority.issue_ek(an_ek(KeyAlgorithm.RSA_2048), TPM, now=NOW)
    command = ["openssl", "x509", "-outform", "DER"]
    pem = to_pem(ek.der, attribute=False).encode()
    assert subprocess.run(command, input=pem, check=True, capture_output=True).stdout == ek.der
    platform = to_pem(authority.issue_platform(ek, PLATFORM, TPM, now=NOW).der, attribute=True)
    assert platform.startswith("-----BEGIN ATTRIBUTE CERTIFICATE-----\n")

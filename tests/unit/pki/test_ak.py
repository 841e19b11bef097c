"""AK certificates: short-lived, with the SPIFFE id and the UUID of their instance."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID

from tests.unit.pki.given import INSTANCE, NOW, TPM, an_ak, an_authority, an_ek, openssl, write_chain
from vtpm.errors import InvalidArgumentError
from vtpm.pki.model import IssuingPolicy
from vtpm.tpm.keys import KeyAlgorithm


@pytest.mark.parametrize("algorithm", [KeyAlgorithm.ECC_P256, KeyAlgorithm.RSA_2048])
def test_fields(tmp_path: Path, algorithm: KeyAlgorithm) -> None:
    authority = an_authority()
    issued = authority.issue_ak(an_ak(algorithm), INSTANCE, now=NOW)
    certificate = x509.load_der_x509_certificate(issued.der)
    extensions = {extension.oid: extension for extension in certificate.extensions}
    assert certificate.subject.rfc4514_string() == f"CN={INSTANCE}"
    names = extensions[ExtensionOID.SUBJECT_ALTERNATIVE_NAME].value
    # One URI, no more: else it is no X.509-SVID.
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://vtpm.internal/instance/{INSTANCE}"]
    (other,) = names.get_values_for_type(x509.OtherName)
    assert other.type_id.dotted_string == "1.3.6.1.5.5.7.8.3"
    assert f"urn:uuid:{INSTANCE}".encode() in other.value
    assert [oid.dotted_string for oid in extensions[ExtensionOID.EXTENDED_KEY_USAGE].value] == ["2.23.133.8.3"]
    usage = extensions[ExtensionOID.KEY_USAGE]
    assert usage.critical
    assert usage.value.digital_signature
    assert not usage.value.key_agreement
    assert not usage.value.key_encipherment
    assert extensions[ExtensionOID.BASIC_CONSTRAINTS].value == x509.BasicConstraints(ca=False, path_length=None)
    assert certificate.not_valid_after_utc == NOW + dt.timedelta(hours=24)
    assert certificate.not_valid_before_utc == NOW - dt.timedelta(minutes=5)

    root, issuing = write_chain(tmp_path, authority.chain)
    leaf = tmp_path / "ak.pem"
    leaf.write_bytes(certificate.public_bytes(Encoding.PEM))
    at = str(int(NOW.timestamp()))
    assert "OK" in openssl("verify", "-x509_strict", "-attime", at, "-CAfile", str(root), "-untrusted", str(issuing), str(leaf))


@pytest.mark.parametrize("kind", ["AK", *KeyAlgorithm])
def test_cryptographys_verifier_trusts_it(kind: str) -> None:
    """With its rules for CAs as they are, and none of its own for the end: those are for TLS, and ask for a TLS usage."""
    authority = an_authority()
    issued = (
        authority.issue_ak(an_ak(), INSTANCE, now=NOW)
        if kind == "AK"
        else authority.issue_ek(an_ek(KeyAlgorithm(kind)), TPM, now=NOW)
    )
    leaf = x509.load_der_x509_certificate(issued.der)
    policy = x509.verification
    builder = policy.PolicyBuilder().store(policy.Store([authority.chain[-1]]))
    builder = builder.extension_policies(
        ca_policy=policy.ExtensionPolicy.webpki_defaults_ca(), ee_policy=policy.ExtensionPolicy.permit_all()
    )
    verified = builder.time(NOW).build_client_verifier().verify(leaf, [authority.chain[0]])
    assert verified.chain == [leaf, *authority.chain]
    with pytest.raises(policy.VerificationError):
        builder.time(issued.not_after + dt.timedelta(hours=1)).build_client_verifier().verify(leaf, [authority.chain[0]])


def test_a_lifetime_and_a_trust_domain_of_ones_own() -> None:
    policy = IssuingPolicy(trust_domain="vms.example.org", ak_lifetime=dt.timedelta(hours=1))
    issued = an_authority(policy).issue_ak(an_ak(), INSTANCE, now=NOW)
    names = x509.load_der_x509_certificate(issued.der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://vms.example.org/instance/{INSTANCE}"]
    assert issued.not_after - NOW == dt.timedelta(hours=1)


def test_an_ek_gets_no_ak_certificate() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        an_authority().issue_ak(an_ek(KeyAlgorithm.ECC_P256), INSTANCE, now=NOW)
    assert caught.value.reason == "CERTIFIED_KEY_NO_AK"


def test_serial_numbers_do_not_come_again() -> None:
    authority = an_authority()
    serials = {authority.issue_ak(an_ak(), INSTANCE, now=NOW).serial for _ in range(50)}
    assert len(serials) == 50
    assert max(serials) > 1 << 140

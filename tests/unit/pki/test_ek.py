"""EK certificates, field by field against the TCG EK Credential Profile 2.5, section 3."""

from __future__ import annotations

import datetime as dt
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_public_key
from cryptography.x509.oid import ExtensionOID

from tests.unit.pki.given import NOW, TPM, URLS, an_authority, an_ek, ca_pair, openssl, write_chain
from vtpm.errors import FailedPreconditionError, InvalidArgumentError
from vtpm.pki.model import IssuedCertificate, IssuingPolicy, TpmDescription
from vtpm.tpm.keys import KeyAlgorithm, public_pem

ALL = list(KeyAlgorithm)


def issued(algorithm: KeyAlgorithm, policy: IssuingPolicy | None = None) -> IssuedCertificate:
    return an_authority(policy).issue_ek(an_ek(algorithm), TPM, now=NOW)


@pytest.mark.parametrize("algorithm", ALL)
def test_it_certifies_this_key(algorithm: KeyAlgorithm) -> None:
    certificate = x509.load_der_x509_certificate(issued(algorithm).der)
    assert certificate.public_key() == load_pem_public_key(public_pem(an_ek(algorithm)).encode())


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("policy", [None, URLS])
def test_openssl_and_certtool_trust_it(tmp_path: Path, algorithm: KeyAlgorithm, policy: IssuingPolicy | None) -> None:
    authority = an_authority(policy)
    root, issuing = write_chain(tmp_path, authority.chain)
    certificate = tmp_path / "ek.pem"
    der = authority.issue_ek(an_ek(algorithm), TPM, now=NOW).der
    certificate.write_text(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM).decode())
    assert "OK" in openssl("verify", "-x509_strict", "-CAfile", str(root), "-untrusted", str(issuing), str(certificate))
    bundle = tmp_path / "bundle.pem"
    bundle.write_text(certificate.read_text() + issuing.read_text() + root.read_text())
    command = ["certtool", "--verify", f"--load-ca-certificate={root}", f"--infile={bundle}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Verified. The certificate is trusted." in done.stdout


@pytest.mark.parametrize("algorithm", ALL)
def test_fields_are_those_of_the_profile(algorithm: KeyAlgorithm) -> None:
    certificate = x509.load_der_x509_certificate(issued(algorithm).der)
    _, issuing = ca_pair()
    assert certificate.version is x509.Version.v3
    assert 1 <= certificate.serial_number < 1 << 159
    assert certificate.subject == x509.Name([])
    assert certificate.issuer == issuing.certificate.subject
    extensions = {extension.oid: extension for extension in certificate.extensions}

    alternative = extensions[ExtensionOID.SUBJECT_ALTERNATIVE_NAME]
    assert alternative.critical  # as the subject is empty
    (name,) = alternative.value
    assert isinstance(name, x509.DirectoryName)
    assert [(attribute.oid.dotted_string, attribute.value) for attribute in name.value] == [
        ("2.23.133.2.1", "id:49424D00"),
        ("2.23.133.2.2", "libtpms"),
        ("2.23.133.2.3", "id:20240125"),
    ]
    # Each a UTF8String: its tag, length and text.
    assert b"\x0c\x07libtpms" in alternative.value.public_bytes()
    assert alternative.value.public_bytes().count(b"\x0c\x0bid:") == 2

    constraints = extensions[ExtensionOID.BASIC_CONSTRAINTS]
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=False, path_length=None)

    usage = extensions[ExtensionOID.KEY_USAGE]
    assert usage.critical
    is_rsa = isinstance(certificate.public_key(), rsa.RSAPublicKey)
    assert (usage.value.key_encipherment, usage.value.key_agreement) == (is_rsa, not is_rsa)
    assert not usage.value.digital_signature
    assert not usage.value.key_cert_sign

    extended = extensions[ExtensionOID.EXTENDED_KEY_USAGE]
    assert not extended.critical
    assert [oid.dotted_string for oid in extended.value] == ["2.23.133.8.1"]

    authority_key = extensions[ExtensionOID.AUTHORITY_KEY_IDENTIFIER]
    assert not authority_key.critical
    own = issuing.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    assert authority_key.value.key_identifier == own == issued(algorithm).issuer_key_id

    directory = extensions[ExtensionOID.SUBJECT_DIRECTORY_ATTRIBUTES]
    assert not directory.critical
    # SEQUENCE { SEQUENCE { 2.23.133.2.16, SET { SEQUENCE { "2.0", 0, 164 } } } }
    assert directory.value.value.hex() == "3019301706056781050210310e300c0c03322e30020100020200a4"
    assert len(extensions) == 6


def test_places_and_policy_are_named_where_configured() -> None:
    certificate = x509.load_der_x509_certificate(issued(KeyAlgorithm.RSA_2048, URLS).der)
    key_id = an_authority().key_id.hex()
    (access,) = certificate.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    assert access.access_method.dotted_string == "1.3.6.1.5.5.7.48.2"
    assert access.access_location.value == f"http://pki.example:8080/vtpm/ca/{key_id}.cer"
    (point,) = certificate.extensions.get_extension_for_class(x509.CRLDistributionPoints).value
    assert point.full_name is not None
    assert [name.value for name in point.full_name] == [f"http://pki.example:8080/vtpm/crl/{key_id}.crl"]
    (policy,) = certificate.extensions.get_extension_for_class(x509.CertificatePolicies).value
    assert (policy.policy_identifier.dotted_string, policy.policy_qualifiers) == (
        "1.3.6.1.4.1.55555.1",
        ["https://example.org/cps"],
    )


def test_it_never_outlives_its_ca() -> None:
    policy = IssuingPolicy(ek_lifetime=dt.timedelta(days=36500))
    _, issuing = ca_pair()
    certificate = issued(KeyAlgorithm.ECC_P256, policy)
    assert certificate.not_after == issuing.certificate.not_valid_after_utc
    assert x509.load_der_x509_certificate(certificate.der).not_valid_after_utc == certificate.not_after


def test_it_is_like_swtpm_localcas(tmp_path: Path) -> None:
    """The same TPM certified by swtpm's own CA: what both have is the same to the byte."""
    options, config = tmp_path / "options", tmp_path / "conf"
    options.write_text("")
    files = {"statedir": ".", "signingkey": "key.pem", "issuercert": "cert.pem", "certserial": "serial"}
    config.write_text("".join(f"{key} = {tmp_path / value}\n" for key, value in files.items()))
    numbers = x509.load_der_x509_certificate(issued(KeyAlgorithm.RSA_2048).der).public_key()
    assert isinstance(numbers, rsa.RSAPublicKey)
    command = (
        f"swtpm_localca --type ek --ek {numbers.public_numbers().n:x} --dir {tmp_path} --tpm2 --tpm-spec-family 2.0"
        " --tpm-spec-level 0 --tpm-spec-revision 164 --tpm-manufacturer id:49424D00 --tpm-model libtpms"
        f" --tpm-version id:20240125 --configfile {config} --optsfile {options} --logfile {tmp_path / 'log'}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    theirs = {e.oid: e for e in x509.load_der_x509_certificate((tmp_path / "ek.cert").read_bytes()).extensions}
    ours = {e.oid: e for e in x509.load_der_x509_certificate(issued(KeyAlgorithm.RSA_2048).der).extensions}
    assert set(ours) == set(theirs)
    for oid in set(ours) - {ExtensionOID.AUTHORITY_KEY_IDENTIFIER}:
        assert ours[oid].value.public_bytes() == theirs[oid].value.public_bytes(), oid
        assert ours[oid].critical == theirs[oid].critical, oid


@pytest.mark.parametrize(
    "change", [{"manufacturer": "IBM"}, {"version": "1.2"}, {"model": ""}, {"manufacturer": "id:49424D00\n"}]
)
def test_descriptions_out_of_form_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        TpmDescription(**{"manufacturer": "id:49424D00", "model": "m", "version": "id:00000001", **change})  # type: ignore[arg-type]
    assert caught.value.reason == "CERTIFICATE_TEXT_INVALID"


@pytest.mark.parametrize(("days", "reason"), [(-1, "CA_NOT_YET_VALID"), (40 * 365, "CA_EXPIRED")])
def test_nothing_is_issued_outside_the_cas_time(days: int, reason: str) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        an_authority().issue_ek(an_ek(KeyAlgorithm.ECC_P256), TPM, now=NOW + dt.timedelta(days=days))
    assert caught.value.reason == reason


def test_a_public_area_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        an_authority().issue_ek(b"\x00\x01nonsense", TpmDescription("id:49424D00", "m", "id:00000001"), now=NOW)
    assert caught.value.reason == "PUBLIC_AREA_INVALID"

"""CRLs (RFC 5280, 5), checked by openssl and cryptography."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from tests.unit.pki.given import INSTANCE, NOW, TPM, an_ak, an_authority, an_ek, openssl, write_chain
from vtpm.errors import InvalidArgumentError
from vtpm.pki.model import Revocation, RevocationReason
from vtpm.tpm.keys import KeyAlgorithm


def test_an_empty_crl() -> None:
    authority = an_authority()
    crl = x509.load_der_x509_crl(authority.crl([], number=7, now=NOW))
    key = authority.certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert crl.is_signature_valid(key)
    assert len(crl) == 0
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 7
    assert crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier == authority.key_id
    assert (crl.last_update_utc, crl.next_update_utc) == (NOW, NOW + dt.timedelta(hours=24))


@pytest.mark.parametrize("reason", list(RevocationReason))
def test_every_reason_is_read_back(reason: RevocationReason) -> None:
    crl = x509.load_der_x509_crl(an_authority().crl([Revocation(1 << 158, NOW, reason.name)], number=1, now=NOW))
    (entry,) = crl
    assert entry.serial_number == 1 << 158
    assert entry.revocation_date_utc == NOW
    if reason is RevocationReason.unspecified:
        assert len(entry.extensions) == 0
    else:
        assert entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.value == reason.name


def test_an_unknown_reason_is_refused() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        an_authority().crl([Revocation(1, NOW, "certificateHold")], number=1, now=NOW)
    assert caught.value.reason == "REVOCATION_REASON_UNKNOWN"
    assert "keyCompromise" in caught.value.remedy


def test_openssl_refuses_the_revoked_and_trusts_the_rest(tmp_path: Path) -> None:
    authority = an_authority()
    root, issuing = write_chain(tmp_path, authority.chain)
    revoked = authority.issue_ek(an_ek(KeyAlgorithm.ECC_P256), TPM, now=NOW)
    good = authority.issue_ak(an_ak(), INSTANCE, now=NOW)
    crl = tmp_path / "crl.pem"
    crl.write_bytes(
        x509.load_der_x509_crl(
            authority.crl([Revocation(revoked.serial, NOW, "keyCompromise")], number=1, now=NOW)
        ).public_bytes(Encoding.PEM)
    )
    verdicts = {}
    for name, certificate in (("revoked", revoked), ("good", good)):
        path = tmp_path / f"{name}.pem"
        path.write_bytes(x509.load_der_x509_certificate(certificate.der).public_bytes(Encoding.PEM))
        arguments = ["-crl_check", "-CRLfile", str(crl), "-CAfile", str(root), "-untrusted", str(issuing), str(path)]
        try:
            verdicts[name] = openssl("verify", "-attime", str(int(NOW.timestamp())), *arguments)
        except AssertionError as error:
            verdicts[name] = str(error)
    assert "certificate revoked" in verdicts["revoked"]
    assert verdicts["good"].strip().endswith("OK")

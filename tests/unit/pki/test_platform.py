"""Platform certificates: read and checked as attribute certificates by another implementation (RFC 5755)."""

from __future__ import annotations

import datetime as dt

import pytest
from asn1crypto import cms, core
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.pki.given import NOW, PLATFORM, TPM, URLS, an_authority, an_ek, ca_pair, openssl
from vtpm.pki.model import IssuedCertificate, IssuingPolicy
from vtpm.tpm.keys import KeyAlgorithm


def issued(policy: IssuingPolicy | None = None) -> tuple[IssuedCertificate, IssuedCertificate]:
    authority = an_authority(policy)
    ek = authority.issue_ek(an_ek(KeyAlgorithm.RSA_2048), TPM, now=NOW)
    return ek, authority.issue_platform(ek, PLATFORM, TPM, now=NOW)


def parsed(der: bytes) -> cms.AttributeCertificateV2:
    return cms.AttributeCertificateV2.load(der, strict=True)


def attributes_of(der: bytes) -> dict[str, bytes]:
    """Type → encoded value."""
    found = {}
    for attribute in parsed(der)["ac_info"]["attributes"]:
        (value,) = attribute["values"]
        found[attribute["type"].dotted] = value.dump()
    return found


def test_its_signature_is_the_issuing_cas() -> None:
    _, platform = issued()
    certificate = parsed(platform.der)
    _, issuing = ca_pair()
    key = issuing.certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    info, signature = certificate["ac_info"].dump(), certificate["signature"].native
    key.verify(signature, info, ec.ECDSA(hashes.SHA384()))
    with pytest.raises(InvalidSignature):
        key.verify(signature, info[:-1] + bytes([info[-1] ^ 1]), ec.ECDSA(hashes.SHA384()))
    assert certificate["signature_algorithm"].native == certificate["ac_info"]["signature"].native
    assert certificate["signature_algorithm"]["algorithm"].native == "sha384_ecdsa"


def test_holder_is_the_ek_certificate() -> None:
    ek, platform = issued()
    info = parsed(platform.der)["ac_info"]
    base = info["holder"]["base_certificate_id"]
    endorsement = x509.load_der_x509_certificate(ek.der)
    assert base["serial"].native == endorsement.serial_number == ek.serial
    assert base["issuer"][0].chosen.untag().dump() == endorsement.issuer.public_bytes()
    assert info["holder"]["entity_name"].native is None


def test_fields_are_those_of_the_profile() -> None:
    ek, platform = issued()
    info = parsed(platform.der)["ac_info"]
    assert info["version"].native == "v2"
    issuer = info["issuer"].chosen["issuer_name"]
    assert issuer[0].chosen.untag().dump() == ca_pair()[1].certificate.subject.public_bytes()
    assert info["serial_number"].native == platform.serial != ek.serial
    validity = info["att_cert_validity_period"]
    assert (validity["not_before_time"].native, validity["not_after_time"].native) == (platform.not_before, platform.not_after)
    assert platform.not_after <= ek.not_after
    assert platform.not_before <= NOW < platform.not_after

    found = attributes_of(platform.der)
    # PC Client Platform Firmware Profile 1.05.23, class 1; this profile 1.1.19; rtmType virtual.
    assert found["2.23.133.2.17"].hex() == "30113009020101020105020117" + "040400000001"
    assert found["2.23.133.2.23"].hex() == "3009020101020101020113"
    assert found["2.23.133.2.25"].hex() == "3007" + "060567810508" + "02"
    assert found["2.23.133.2.19"].hex() == "3003820105"
    configuration = core.Sequence.load(found["2.23.133.5.1.7.2"])
    assert configuration[0].tag == 2
    assert b"libtpms" in configuration.dump()

    extensions = {item["extn_id"].native: item for item in info["extensions"]}
    assert set(extensions) == {"certificate_policies", "subject_alt_name", "authority_key_identifier"}
    assert not any(item["critical"].native for item in extensions.values())
    name = extensions["subject_alt_name"]["extn_value"].parsed[0].chosen
    assert isinstance(name, asn1_x509.Name)
    pairs = [(pair["type"].dotted, pair["value"].native) for rdn in name.chosen for pair in rdn]
    assert pairs == [
        ("2.23.133.5.1.1", PLATFORM.manufacturer),
        ("2.23.133.5.1.4", PLATFORM.model),
        ("2.23.133.5.1.5", PLATFORM.version),
        ("2.23.133.5.1.6", PLATFORM.serial),
    ]
    key = extensions["authority_key_identifier"]["extn_value"].parsed["key_identifier"].native
    assert key == platform.issuer_key_id == an_authority().key_id
    (policy,) = extensions["certificate_policies"]["extn_value"].parsed
    assert policy["policy_identifier"].native == "any_policy"
    (notice,) = policy["policy_qualifiers"]
    assert notice["qualifier"]["explicit_text"].native == "TCG Trusted Platform Endorsement"


def test_places_and_policy_are_named_where_configured() -> None:
    _, platform = issued(URLS)
    extensions = {item["extn_id"].native: item["extn_value"].parsed for item in parsed(platform.der)["ac_info"]["extensions"]}
    key_id = platform.issuer_key_id.hex()
    assert extensions["authority_information_access"].native[0]["access_location"] == (
        f"http://pki.example:8080/vtpm/ca/{key_id}.cer"
    )
    assert f"/vtpm/crl/{key_id}.crl" in str(extensions["crl_distribution_points"].native)
    assert extensions["certificate_policies"].native[0]["policy_identifier"] == "1.3.6.1.4.1.55555.1"


def test_it_does_not_outlive_the_ek_certificate() -> None:
    authority = an_authority()
    ek = authority.issue_ek(an_ek(KeyAlgorithm.RSA_2048), TPM, now=NOW)
    later = authority.issue_platform(ek, PLATFORM, TPM, now=NOW + dt.timedelta(days=3000))
    assert later.not_after == ek.not_after


def test_openssl_reads_its_structure() -> None:
    _, platform = issued()
    assert "2.23.133.5.1.7.2" in openssl("asn1parse", "-inform", "DER", given=platform.der)

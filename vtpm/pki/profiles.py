"""Extensions and names of EK and AK certificates (TCG EK Credential Profile 2.5, section 3; RFC 5280)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, rsa

from vtpm.pki import der, oids
from vtpm.pki.model import IssuingPolicy, PlatformDescription, TpmDescription

# KeyUsage: bit 0 is digitalSignature, 2 keyEncipherment, 4 keyAgreement. DER leaves out the zeros at the end.
_DIGITAL_SIGNATURE: Final = der.bits(b"\x80", 7)
_KEY_ENCIPHERMENT: Final = der.bits(b"\x20", 5)
_KEY_AGREEMENT: Final = der.bits(b"\x08", 3)
PLATFORM_NOTICE: Final = "TCG Trusted Platform Endorsement"


def extension(oid: str, value: bytes, *, critical: bool = False) -> bytes:
    """Extension around an encoded `value`."""
    return der.sequence(der.oid(oid), der.TRUE if critical else b"", der.octets(value))


def attribute(oid: str, value: bytes) -> bytes:
    """Attribute of one value."""
    return der.sequence(der.oid(oid), der.set_of(value))


def name(*pairs: tuple[str, str]) -> bytes:
    """Name: one RelativeDistinguishedName with a UTF8String for each (OID, text)."""
    return der.sequence(*(der.set_of(der.sequence(der.oid(oid), der.utf8(text))) for oid, text in pairs))


def directory_name(encoded_name: bytes) -> bytes:
    """GeneralName of the form directoryName."""
    return der.tagged(4, encoded_name)


def uri(text: str) -> bytes:
    """GeneralName of the form uniformResourceIdentifier."""
    return der.tagged_primitive(6, text.encode("ascii"))


BASIC_CONSTRAINTS: Final = extension(oids.BASIC_CONSTRAINTS, der.sequence(), critical=True)
_EK_USAGE: Final = extension(oids.EXTENDED_KEY_USAGE, der.sequence(der.oid(oids.EK_CERTIFICATE)))
_AK_USAGE: Final = extension(oids.EXTENDED_KEY_USAGE, der.sequence(der.oid(oids.AK_CERTIFICATE)))
_SIGNATURE_USAGE: Final = extension(oids.KEY_USAGE, _DIGITAL_SIGNATURE, critical=True)


@dataclass(frozen=True, slots=True)
class IssuerExtensions:
    """What every certificate of an issuer has in common, encoded once: AuthorityKeyIdentifier, AIA and CRL distribution point
    where there is a base URL, policies where there is one."""

    common: bytes
    policies: bytes
    platform_policies: bytes


def crl_path(key_id: bytes) -> str:
    """Path of an issuer's CRL below the base URL."""
    return f"/crl/{key_id.hex()}.crl"


def certificate_path(key_id: bytes) -> str:
    """Path of an issuer's certificate below the base URL."""
    return f"/ca/{key_id.hex()}.cer"


def authority_key_id(key_id: bytes) -> bytes:
    """AuthorityKeyIdentifier with the key identifier alone."""
    return extension(oids.AUTHORITY_KEY_ID, der.sequence(der.tagged_primitive(0, key_id)))


def issuer_extensions(key_id: bytes, policy: IssuingPolicy) -> IssuerExtensions:
    """Encode what certificates of the issuer `key_id` have in common."""
    parts = [authority_key_id(key_id)]
    if base := policy.base_url.rstrip("/"):
        access = der.sequence(der.oid(oids.CA_ISSUERS), uri(base + certificate_path(key_id)))
        parts.append(extension(oids.AUTHORITY_INFO_ACCESS, der.sequence(access)))
        point = der.sequence(der.tagged(0, der.tagged(0, uri(base + crl_path(key_id)))))
        parts.append(extension(oids.CRL_DISTRIBUTION_POINTS, der.sequence(point)))
    qualifiers = [der.sequence(der.oid(oids.CPS_URI), der.ia5(policy.policy_uri))] if policy.policy_uri else []
    policies = _policies(policy.policy_oid, qualifiers) if policy.policy_oid else b""
    notice = der.sequence(der.oid(oids.USER_NOTICE), der.sequence(der.utf8(PLATFORM_NOTICE)))
    platform = _policies(policy.policy_oid or oids.ANY_POLICY, [*qualifiers, notice])
    return IssuerExtensions(b"".join(parts), policies, platform)


def _policies(policy: str, qualifiers: Sequence[bytes]) -> bytes:
    information = der.sequence(der.oid(policy), der.sequence(*qualifiers) if qualifiers else b"")
    return extension(oids.CERTIFICATE_POLICIES, der.sequence(information))


def ek_extensions(key: rsa.RSAPublicKey | ec.EllipticCurvePublicKey, tpm: TpmDescription, issuer: IssuerExtensions) -> bytes:
    """Extensions of an EK certificate, whose subject is empty: the SubjectAltName is critical and names the TPM."""
    tpm_name = name((oids.TPM_MANUFACTURER, tpm.manufacturer), (oids.TPM_MODEL, tpm.model), (oids.TPM_VERSION, tpm.version))
    specification = der.sequence(der.utf8(tpm.family), der.integer(tpm.level), der.integer(tpm.revision))
    usage = _KEY_ENCIPHERMENT if isinstance(key, rsa.RSAPublicKey) else _KEY_AGREEMENT
    return der.sequence(
        issuer.common,
        issuer.policies,
        extension(oids.SUBJECT_ALT_NAME, der.sequence(directory_name(tpm_name)), critical=True),
        BASIC_CONSTRAINTS,
        extension(oids.SUBJECT_DIRECTORY_ATTRIBUTES, der.sequence(attribute(oids.TPM_SPECIFICATION, specification))),
        extension(oids.KEY_USAGE, usage, critical=True),
        _EK_USAGE,
    )


def spiffe_id(trust_domain: str, instance: uuid.UUID) -> str:
    """The instance's SPIFFE id."""
    return f"spiffe://{trust_domain}/instance/{instance}"


def ak_subject(instance: uuid.UUID) -> bytes:
    """Subject of an AK certificate: the instance's UUID as common name."""
    return name((oids.COMMON_NAME, str(instance)))


def ak_extensions(instance: uuid.UUID, trust_domain: str, issuer: IssuerExtensions) -> bytes:
    """Extensions of an AK certificate.

    An X.509-SVID has exactly one URI (SPIFFE X509-SVID, 2), which is the SPIFFE id. The UUID stands beside it as a permanent
    identifier (RFC 4043) with its URN.
    """
    identifier = der.sequence(der.utf8(instance.urn))
    other_name = der.tagged(0, der.oid(oids.PERMANENT_IDENTIFIER) + der.tagged(0, identifier))
    names = der.sequence(uri(spiffe_id(trust_domain, instance)), other_name)
    return der.sequence(
        issuer.common,
        issuer.policies,
        extension(oids.SUBJECT_ALT_NAME, names),
        BASIC_CONSTRAINTS,
        _SIGNATURE_USAGE,
        _AK_USAGE,
    )


def platform_name(platform: PlatformDescription) -> bytes:
    """Name of a platform, for the SubjectAltName of its certificate."""
    return name(
        (oids.PLATFORM_MANUFACTURER, platform.manufacturer),
        (oids.PLATFORM_MODEL, platform.model),
        (oids.PLATFORM_VERSION, platform.version),
        (oids.PLATFORM_SERIAL, platform.serial),
    )

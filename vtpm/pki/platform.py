"""Platform certificates: X.509 attribute certificates (RFC 5755) by the TCG Platform Certificate Profile 1.1."""

from __future__ import annotations

import datetime as dt
from typing import Final

from vtpm.pki import der, oids
from vtpm.pki.model import PlatformDescription, TpmDescription
from vtpm.pki.profiles import IssuerExtensions, attribute, directory_name, extension, platform_name

_V2: Final = der.integer(1)
# MeasurementRootType: the root of trust for measurement of a VM is software of its host.
_RTM_VIRTUAL: Final = 5
# PC Client Platform Firmware Profile 1.05 revision 23; platform class 1 is the PC client.
_PLATFORM_SPECIFICATION: Final = attribute(
    oids.PLATFORM_SPECIFICATION,
    der.sequence(der.sequence(der.integer(1), der.integer(5), der.integer(23)), der.octets(b"\0\0\0\1")),
)
# This profile: 1.1 revision 19.
_CREDENTIAL_SPECIFICATION: Final = attribute(
    oids.CREDENTIAL_SPECIFICATION, der.sequence(der.integer(1), der.integer(1), der.integer(19))
)
_CREDENTIAL_TYPE: Final = attribute(oids.CREDENTIAL_TYPE, der.sequence(der.oid(oids.PLATFORM_ATTRIBUTE_CERTIFICATE)))
# The defaults (version 0, not certified by ISO 9000) are left out, as DER wants.
_TBB_SECURITY_ASSERTIONS: Final = attribute(
    oids.TBB_SECURITY_ASSERTIONS, der.sequence(der.tagged_primitive(2, der.enumerated_content(_RTM_VIRTUAL)))
)
_ATTRIBUTES: Final = _PLATFORM_SPECIFICATION + _CREDENTIAL_SPECIFICATION + _CREDENTIAL_TYPE + _TBB_SECURITY_ASSERTIONS


def attribute_certificate_info(
    *,
    holder_issuer: bytes,
    holder_serial: int,
    issuer: bytes,
    algorithm: bytes,
    serial: int,
    not_before: dt.datetime,
    not_after: dt.datetime,
    platform: PlatformDescription,
    tpm: TpmDescription,
    extensions: IssuerExtensions,
) -> bytes:
    """Return the AttributeCertificateInfo, which is what is signed, DER.

    The holder is the EK certificate, by its issuer's Name and its serial number (baseCertificateID).
    """
    base = der.sequence(directory_name(holder_issuer)) + der.integer(holder_serial)
    return der.sequence(
        _V2,
        der.sequence(der.tagged(0, base)),
        der.tagged(0, der.sequence(directory_name(issuer))),
        algorithm,
        der.integer(serial),
        der.sequence(der.generalized_time(not_before), der.generalized_time(not_after)),
        der.sequence(_ATTRIBUTES, _configuration(tpm)),
        der.sequence(
            extensions.platform_policies,
            extension(oids.SUBJECT_ALT_NAME, der.sequence(directory_name(platform_name(platform)))),
            extensions.common,
        ),
    )


def _configuration(tpm: TpmDescription) -> bytes:
    """PlatformConfiguration, version 2: which TPM the platform has, as platformProperties."""
    properties = (("TPM manufacturer", tpm.manufacturer), ("TPM model", tpm.model), ("TPM version", tpm.version))
    encoded = b"".join(der.sequence(der.utf8(key), der.utf8(value)) for key, value in properties)
    return attribute(oids.PLATFORM_CONFIGURATION_V2, der.sequence(der.tagged(2, encoded)))

"""What goes into certificates, and what comes out, as values."""

from __future__ import annotations

import datetime as dt
import enum
import re
from dataclasses import dataclass
from typing import Final

from vtpm.errors import InvalidArgumentError

# STRMAX of the TCG's ASN.1, in characters.
MAX_TEXT: Final = 256
_HEX_ID: Final = re.compile(r"id:[0-9A-F]{8}(?:[0-9A-F]{8})?\Z")


class CertificateKind(enum.StrEnum):
    """What a certificate speaks of."""

    EK = "EK"
    AK = "AK"
    PLATFORM = "PLATFORM"


class RevocationReason(enum.IntEnum):
    """CRLReason (RFC 5280, 5.3.1), but for those that need a hold or a delta CRL."""

    unspecified = 0
    keyCompromise = 1  # noqa: N815  # RFC 5280's names
    cACompromise = 2  # noqa: N815
    affiliationChanged = 3  # noqa: N815
    superseded = 4
    cessationOfOperation = 5  # noqa: N815
    privilegeWithdrawn = 9  # noqa: N815
    aACompromise = 10  # noqa: N815


def check_text(value: str, what: str) -> str:
    """Return `value` if it can be a UTF8String of the TCG's profiles: 1 to 256 printable characters.

    What is not printable could hide in a certificate what its reader should see: NUL, line ends, changes of writing direction.

    Raises:
        InvalidArgumentError: CERTIFICATE_TEXT_INVALID.
    """
    if 1 <= len(value) <= MAX_TEXT and value.isprintable() and not value.isspace():
        return value
    raise InvalidArgumentError(
        "CERTIFICATE_TEXT_INVALID",
        f"{what} must be 1 to {MAX_TEXT} printable characters, not blank",
        remedy="leave out control characters, and shorten it",
    )


def _check_id(value: str, what: str) -> None:
    if not _HEX_ID.match(value):
        raise InvalidArgumentError(
            "CERTIFICATE_TEXT_INVALID", f"{what} must be `id:` and 8 or 16 upper-case hexadecimal digits, not {value[:40]!r}"
        )


@dataclass(frozen=True, slots=True)
class TpmDescription:
    """The TPM, for its EK's certificate (EK Credential Profile 2.5, 3.1.2 and 3.1.3).

    `manufacturer` and `version` are TPM_PT_MANUFACTURER and TPM_PT_FIRMWARE_VERSION as `id:` and hexadecimal digits; `family`,
    `level` and `revision` are those of the TPM 2.0 Library Specification.

    Raises:
        InvalidArgumentError: CERTIFICATE_TEXT_INVALID.
    """

    manufacturer: str
    model: str
    version: str
    family: str = "2.0"
    level: int = 0
    revision: int = 164

    def __post_init__(self) -> None:
        _check_id(self.manufacturer, "the TPM's manufacturer")
        _check_id(self.version, "the TPM's version")
        check_text(self.model, "the TPM's model")
        check_text(self.family, "the TPM specification's family")


@dataclass(frozen=True, slots=True)
class PlatformDescription:
    """The platform (the VM), for its platform certificate. `serial` is the instance's UUID.

    Raises:
        InvalidArgumentError: CERTIFICATE_TEXT_INVALID.
    """

    manufacturer: str
    model: str
    version: str
    serial: str

    def __post_init__(self) -> None:
        for field in ("manufacturer", "model", "version", "serial"):
            check_text(getattr(self, field), f"the platform's {field}")


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """A signed certificate: X.509, or an X.509 attribute certificate for PLATFORM. `serial` is random, 1 to 2^159 - 1; times
    are aware, in UTC and whole seconds; `issuer_key_id` is the issuing CA's SubjectKeyIdentifier."""

    kind: CertificateKind
    serial: int
    der: bytes
    not_before: dt.datetime
    not_after: dt.datetime
    issuer_key_id: bytes


@dataclass(frozen=True, slots=True)
class Revocation:
    """An entry of a CRL. `reason` is a name of RevocationReason."""

    serial: int
    time: dt.datetime
    reason: str


@dataclass(frozen=True, slots=True)
class IssuingPolicy:
    """What the operator decides of certificates; defaults as in vtpm.config.

    `base_url` is where the CA's certificate and CRL can be had over HTTP, empty: nowhere, and certificates name no place.
    """

    base_url: str = ""
    trust_domain: str = "vtpm.internal"
    ek_lifetime: dt.timedelta = dt.timedelta(days=3650)
    ak_lifetime: dt.timedelta = dt.timedelta(hours=24)
    crl_lifetime: dt.timedelta = dt.timedelta(hours=24)
    policy_oid: str = ""
    policy_uri: str = ""

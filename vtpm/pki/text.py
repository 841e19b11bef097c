"""Certificates for people to read, and their PEM. Attribute certificates too, which few tools can show."""

from __future__ import annotations

import base64
import datetime as dt
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from vtpm.errors import InvalidArgumentError
from vtpm.pki import oids

_NAMES: Final = {
    oids.TPM_MANUFACTURER: "TPM manufacturer",
    oids.TPM_MODEL: "TPM model",
    oids.TPM_VERSION: "TPM version",
    oids.PLATFORM_MANUFACTURER: "platform manufacturer",
    oids.PLATFORM_MODEL: "platform model",
    oids.PLATFORM_VERSION: "platform version",
    oids.PLATFORM_SERIAL: "platform serial",
    oids.EK_CERTIFICATE: "TCG EK certificate",
    oids.AK_CERTIFICATE: "TCG AK certificate",
}
_MAX_DEPTH: Final = 16


def to_pem(der: bytes, *, attribute: bool) -> str:
    """Return a certificate as PEM (RFC 7468); `attribute` for an attribute certificate."""
    return pem(der, "ATTRIBUTE CERTIFICATE" if attribute else "CERTIFICATE")


def pem(der: bytes, label: str) -> str:
    """Return `der` as PEM under a label."""
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"


def describe(der: bytes, *, attribute: bool) -> str:
    """Return a certificate's fields as lines of text.

    Raises:
        InvalidArgumentError: CERTIFICATE_UNREADABLE.
    """
    try:
        lines = _attribute_lines(der) if attribute else _certificate_lines(der)
        # What a certificate says may not steer the terminal it is shown on.
        return "".join("".join(c if c.isprintable() else "\ufffd" for c in line) + "\n" for line in lines)
    except (ValueError, IndexError, OverflowError):
        raise InvalidArgumentError("CERTIFICATE_UNREADABLE", "this is no certificate that can be shown") from None


def _line(name: str, value: object) -> str:
    return f"{name + ':':<24}{value}"


def _certificate_lines(der: bytes) -> Iterator[str]:
    certificate = x509.load_der_x509_certificate(der)
    yield _line("serial", f"{certificate.serial_number:x}")
    yield _line("issuer", certificate.issuer.rfc4514_string())
    yield _line("subject", certificate.subject.rfc4514_string() or "(empty)")
    yield _line("not before", _time(certificate.not_valid_before_utc))
    yield _line("not after", _time(certificate.not_valid_after_utc))
    match certificate.public_key():
        case rsa.RSAPublicKey() as key:
            yield _line("key", f"RSA {key.key_size}")
        case ec.EllipticCurvePublicKey() as key:
            yield _line("key", f"ECC {key.curve.name}")
    for extension in certificate.extensions:
        mark = " (critical)" if extension.critical else ""
        for name, value in _extension(extension.value):
            yield _line(name, f"{value}{mark}")


def _extension(value: x509.ExtensionType) -> Iterator[tuple[str, str]]:
    match value:
        case x509.SubjectAlternativeName():
            for general in value:
                if isinstance(general, x509.DirectoryName):
                    for attribute in general.value:
                        dotted = attribute.oid.dotted_string
                        yield _NAMES.get(dotted, dotted), str(attribute.value)
                elif isinstance(general, x509.UniformResourceIdentifier):
                    yield "URI", general.value
                elif isinstance(general, x509.OtherName):
                    yield "permanent identifier", _texts(_parse(general.value)[0])
        case x509.KeyUsage():
            known = ("digital_signature", "key_encipherment", "key_agreement", "key_cert_sign", "crl_sign")
            yield "key usage", ", ".join(name for name in known if getattr(value, name))
        case x509.ExtendedKeyUsage():
            yield "extended key usage", ", ".join(_NAMES.get(o.dotted_string, o.dotted_string) for o in value)
        case x509.BasicConstraints():
            yield "CA", str(value.ca).lower()
        case x509.AuthorityKeyIdentifier():
            yield "issuer's key id", (value.key_identifier or b"").hex()
        case x509.AuthorityInformationAccess():
            for access in value:
                yield "issuer's certificate", str(access.access_location.value)
        case x509.CRLDistributionPoints():
            for point in value:
                yield "CRL", ", ".join(str(name.value) for name in point.full_name or ())
        case x509.CertificatePolicies():
            yield "policy", ", ".join(item.policy_identifier.dotted_string for item in value)


# ---- attribute certificates ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Element:
    tag: int
    content: bytes
    parts: tuple[_Element, ...]


def _parse(data: bytes, depth: int = 0) -> tuple[_Element, ...]:
    if depth > _MAX_DEPTH:
        raise ValueError
    found, offset = [], 0
    while offset < len(data):
        tag, size, offset = data[offset], data[offset + 1], offset + 2
        if size & 0x80:
            count = size & 0x7F
            size, offset = int.from_bytes(data[offset : offset + count], "big"), offset + count
        content = data[offset : offset + size]
        if len(content) != size:
            raise ValueError
        found.append(_Element(tag, content, _parse(content, depth + 1) if tag & 0x20 else ()))
        offset += size
    return tuple(found)


def _oid(content: bytes) -> str:
    arcs, value = [], 0
    for byte in content:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)
    return ".".join(str(arc) for arc in (first, arcs[0] - 40 * first, *arcs[1:]))


def _texts(element: _Element) -> str:
    """Every UTF8String below an element."""
    own = [element.content.decode()] if element.tag == 0x0C else []
    return ", ".join(own + [text for text in map(_texts, element.parts) if text])


def _pairs(name: _Element) -> Iterator[tuple[str, str]]:
    for relative in name.parts:
        for pair in relative.parts:
            # Other issuers have values here that are no text.
            yield _oid(pair.parts[0].content), pair.parts[1].content.decode(errors="replace")


def _name(general_names: _Element) -> str:
    pairs = _pairs(general_names.parts[0].parts[0])
    return ",".join(f"{'CN' if dotted == oids.COMMON_NAME else dotted}={value}" for dotted, value in pairs)


def _attribute_lines(der: bytes) -> Iterator[str]:
    info = _parse(der)[0].parts[0].parts
    _version, holder, issuer, _algorithm, serial, validity, attributes, extensions = info
    base = holder.parts[0].parts
    yield _line("serial", f"{int.from_bytes(serial.content, 'big'):x}")
    yield _line("issuer", _name(issuer.parts[0]))
    yield _line("holder's issuer", _name(base[0]))
    yield _line("holder's serial", f"{int.from_bytes(base[1].content, 'big'):x}")
    for name, element in zip(("not before", "not after"), validity.parts, strict=True):
        yield _line(name, _time(dt.datetime.strptime(element.content.decode(), "%Y%m%d%H%M%SZ").replace(tzinfo=dt.UTC)))
    for attribute in attributes.parts:
        if _oid(attribute.parts[0].content) == oids.PLATFORM_CONFIGURATION_V2:
            for item in attribute.parts[1].parts[0].parts[0].parts:
                yield _line(item.parts[0].content.decode(), item.parts[1].content.decode())
    for extension in extensions.parts:
        dotted, value = _oid(extension.parts[0].content), _parse(extension.parts[-1].content)[0]
        if dotted == oids.SUBJECT_ALT_NAME:
            for key, text in _pairs(value.parts[0].parts[0]):
                yield _line(_NAMES.get(key, key), text)
        elif dotted == oids.AUTHORITY_KEY_ID:
            yield _line("issuer's key id", value.parts[0].content.hex())
        elif dotted == oids.CERTIFICATE_POLICIES:
            yield _line("policy", ", ".join(_oid(item.parts[0].content) for item in value.parts))
        elif dotted in (oids.AUTHORITY_INFO_ACCESS, oids.CRL_DISTRIBUTION_POINTS):
            name = "CRL" if dotted == oids.CRL_DISTRIBUTION_POINTS else "issuer's certificate"
            yield _line(name, ", ".join(_uris(value)))


def _uris(element: _Element) -> Iterator[str]:
    if element.tag == 0x86:
        yield element.content.decode()
    for part in element.parts:
        yield from _uris(part)


def _time(moment: dt.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"

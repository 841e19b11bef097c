"""What an operator brings as a CA: each thing that is wrong with it is refused by name."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from tests.unit.pki.given import NOW, ca_pair
from vtpm.errors import InvalidArgumentError
from vtpm.pki.checks import check_authority, load_certificates, load_private_key

DAY = dt.timedelta(days=1)
ROOT_KEY = ec.generate_private_key(ec.SECP384R1())
KEY = ec.generate_private_key(ec.SECP384R1())


def a_usage(**changes: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
        " encipher_only decipher_only"
    )
    usages = {**dict.fromkeys(names.split(), False), "key_cert_sign": True, "crl_sign": True, **changes}
    return x509.KeyUsage(**usages)


def a_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])


def a_certificate(
    *,
    subject: str = "issuing",
    issuer: str = "root",
    key: Any = KEY,
    signed_by: Any = ROOT_KEY,
    ca: bool | None = True,
    path_length: int | None = 0,
    usage: x509.KeyUsage | None = None,
    with_usage: bool = True,
    since: dt.datetime = NOW - DAY,
    until: dt.datetime = NOW + 100 * DAY,
    algorithm: Any = None,
) -> x509.Certificate:
    builder = (
        x509.CertificateBuilder()
        .subject_name(a_name(subject))
        .issuer_name(a_name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(since)
        .not_valid_after(until)
    )
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=path_length if ca else None), critical=True)
    if with_usage:
        builder = builder.add_extension(usage or a_usage(), critical=True)
    return builder.sign(signed_by, algorithm or hashes.SHA384())


def a_root(**changes: Any) -> x509.Certificate:
    values: dict[str, Any] = {"subject": "root", "key": ROOT_KEY, "path_length": 1, "until": NOW + 200 * DAY}
    return a_certificate(**{**values, **changes})


def checked(certificate: x509.Certificate, *others: x509.Certificate, key: Any = KEY) -> tuple[x509.Certificate, ...]:
    return check_authority(
        certificate, others, key.public_key(), now=NOW, subject="ca.pem", chain_subject="chain.pem", key_subject="ca.key"
    )


def refused(call: Callable[[], object]) -> InvalidArgumentError:
    with pytest.raises(InvalidArgumentError) as caught:
        call()
    assert caught.value.remedy or caught.value.reason == "CA_KEY_UNSUPPORTED"
    return caught.value


def test_a_good_chain_is_put_in_order() -> None:
    middle_key = ec.generate_private_key(ec.SECP256R1())
    middle = a_certificate(subject="middle", key=middle_key, path_length=1)
    issuing = a_certificate(issuer="middle", signed_by=middle_key, algorithm=hashes.SHA256())
    root = a_root(path_length=None)
    stranger = a_root(subject="stranger", issuer="stranger")
    assert checked(issuing, root, stranger, middle) == (issuing, middle, root)


def test_a_ca_that_is_its_own_root() -> None:
    own = a_root(path_length=0)
    assert checked(own, key=ROOT_KEY) == (own,)


def test_an_rsa_root_of_2048_bits_may_stand_above() -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    root = a_root(key=key, signed_by=key)
    issuing = a_certificate(signed_by=key)
    assert checked(issuing, root) == (issuing, root)


WRONG: dict[str, tuple[str, str, Callable[[], object]]] = {
    "key of another": ("CA_KEY_MISMATCH", "ca.key", lambda: checked(a_certificate(), a_root(), key=ROOT_KEY)),
    "no basic constraints": ("CA_NOT_A_CA", "ca.pem", lambda: checked(a_certificate(ca=None), a_root())),
    "CA:FALSE": ("CA_NOT_A_CA", "ca.pem", lambda: checked(a_certificate(ca=False), a_root())),
    "no keyCertSign": (
        "CA_KEY_USAGE",
        "ca.pem",
        lambda: checked(a_certificate(usage=a_usage(key_cert_sign=False)), a_root()),
    ),
    "no cRLSign": ("CA_KEY_USAGE", "ca.pem", lambda: checked(a_certificate(usage=a_usage(crl_sign=False)), a_root())),
    "no key usage": ("CA_KEY_USAGE", "ca.pem", lambda: checked(a_certificate(with_usage=False), a_root())),
    "expired": ("CA_EXPIRED", "ca.pem", lambda: checked(a_certificate(until=NOW), a_root())),
    "clock behind": ("CA_NOT_YET_VALID", "ca.pem", lambda: checked(a_certificate(since=NOW + DAY), a_root())),
    "expired root": ("CA_EXPIRED", "chain.pem", lambda: checked(a_certificate(), a_root(until=NOW - DAY / 2))),
    "root not a CA": ("CA_NOT_A_CA", "chain.pem", lambda: checked(a_certificate(), a_root(ca=False))),
    "outlives its root": (
        "CA_OUTLIVES_ISSUER",
        "ca.pem",
        lambda: checked(a_certificate(until=NOW + 300 * DAY), a_root()),
    ),
    "no root": ("CA_CHAIN_INCOMPLETE", "chain.pem", lambda: checked(a_certificate())),
    "root of the same name": (
        "CA_CHAIN_INVALID",
        "chain.pem",
        lambda: checked(a_certificate(), a_root(key=KEY, signed_by=KEY)),
    ),
    "root not signed by itself": ("CA_CHAIN_INVALID", "chain.pem", lambda: checked(a_certificate(), a_root(signed_by=KEY))),
    "SHA-224": (
        "CA_SIGNATURE_WEAK",
        "chain.pem",
        lambda: checked(_weakly_signed(), a_root()),
    ),
    "root allows no CA": ("CA_PATH_LENGTH", "chain.pem", lambda: checked(a_certificate(), a_root(path_length=0))),
    "no name": (
        "CA_NAME_EMPTY",
        "ca.pem",
        lambda: checked(a_certificate(subject="", issuer="", key=KEY, signed_by=KEY)),
    ),
    "a CA between allows none": (
        "CA_PATH_LENGTH",
        "chain.pem",
        lambda: _too_long(),
    ),
}


def _weakly_signed() -> x509.Certificate:
    return a_certificate(algorithm=hashes.SHA224())


def _too_long() -> object:
    middle_key = ec.generate_private_key(ec.SECP384R1())
    middle = a_certificate(subject="middle", key=middle_key, path_length=0)
    issuing = a_certificate(issuer="middle", signed_by=middle_key)
    return checked(issuing, middle, a_root(path_length=0))


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_hold_is_refused_with_the_file_and_the_reason(case: str) -> None:
    reason, subject, call = WRONG[case]
    error = refused(call)
    assert (error.reason, error.subject) == (reason, subject)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (rsa.generate_private_key(public_exponent=65537, key_size=2048), "CA_KEY_WEAK"),
        (ec.generate_private_key(ec.SECP224R1()), "CA_KEY_UNSUPPORTED"),
        (ec.generate_private_key(ec.SECP256K1()), "CA_KEY_UNSUPPORTED"),
        (ed25519.Ed25519PrivateKey.generate(), "CA_KEY_UNSUPPORTED"),
    ],
)
def test_weak_and_unsupported_keys_are_refused(key: Any, reason: str) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert refused(lambda: load_private_key(pem, None, "ca.key")).reason == reason
    assert refused(lambda: checked(a_certificate(key=key), a_root(), key=key)).reason == reason


def test_keys_in_every_form_are_read() -> None:
    for encoding in (Encoding.PEM, Encoding.DER):
        plain = KEY.private_bytes(encoding, PrivateFormat.PKCS8, NoEncryption())
        encrypted = KEY.private_bytes(encoding, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
        traditional = KEY.private_bytes(encoding, PrivateFormat.TraditionalOpenSSL, NoEncryption())
        for data, passphrase in ((plain, None), (plain, b"needless"), (encrypted, b"secret"), (traditional, None)):
            assert load_private_key(data, passphrase, "ca.key").public_key() == KEY.public_key()


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
def test_an_encrypted_key_needs_its_passphrase(encoding: Encoding) -> None:
    encrypted = KEY.private_bytes(encoding, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    missing = refused(lambda: load_private_key(encrypted, None, "ca.key"))
    assert (missing.reason, missing.subject) == ("CA_KEY_ENCRYPTED", "ca.key")
    assert "--passphrase-file" in missing.remedy
    wrong = refused(lambda: load_private_key(encrypted, b"guess", "ca.key"))
    assert wrong.reason == "CA_KEY_PASSPHRASE_WRONG"
    assert "guess" not in str(wrong)


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", bytes(1 << 19)]
)
def test_what_is_no_key_or_certificate_is_refused(data: bytes) -> None:
    assert refused(lambda: load_private_key(data, None, "ca.key")).reason == "CA_KEY_UNREADABLE"
    error = refused(lambda: load_certificates(data, "ca.pem"))
    assert (error.reason, error.subject) == ("CA_CERTIFICATE_UNREADABLE", "ca.pem")


def test_certificate_and_key_that_were_swapped_are_refused() -> None:
    _, issuing = ca_pair()
    key = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    certificate = issuing.certificate.public_bytes(Encoding.PEM)
    assert refused(lambda: load_certificates(key, "ca.pem")).reason == "CA_CERTIFICATE_UNREADABLE"
    assert refused(lambda: load_private_key(certificate, None, "ca.key")).reason == "CA_KEY_UNREADABLE"


def test_der_and_many_in_one_pem_are_read() -> None:
    root, issuing = (item.certificate for item in ca_pair())
    both = issuing.public_bytes(Encoding.PEM) + b"\n# the root\n" + root.public_bytes(Encoding.PEM)
    assert load_certificates(both, "ca.pem") == [issuing, root]
    assert load_certificates(issuing.public_bytes(Encoding.DER), "ca.der") == [issuing]
    assert refused(lambda: load_certificates(both * 5, "ca.pem")).reason == "CA_CERTIFICATE_UNREADABLE"

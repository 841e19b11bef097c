"""A CA's key in a PKCS#11 token: SoftHSM."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from tests.support.softhsm import MODULE, PIN, Token, make_token
from tests.unit.pki.given import INSTANCE, NOW, an_ak, ca_pair, openssl
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, VtpmError
from vtpm.pki.authority import Authority, new_serial
from vtpm.pki.making import make_request
from vtpm.pki.model import IssuingPolicy
from vtpm.pki.pkcs11 import PIN_VARIABLE, Pkcs11Signer, parse_uri, read_pin
from vtpm.pki.signer import CaPublicKey, signature_hash


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Token]:
    made = make_token(tmp_path_factory.mktemp("softhsm"))
    made.add_key("issuing", "01", ec.generate_private_key(ec.SECP384R1()))
    made.add_key("rsa", "02", rsa.generate_private_key(public_exponent=65537, key_size=3072))
    made.add_key("p256", "03", ec.generate_private_key(ec.SECP256R1()))
    made.add_key("weak", "04", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    # The module reads this once, when it is loaded.
    os.environ.update(made.environment)
    yield made
    for name in made.environment:
        del os.environ[name]


def a_signer(token: Token, uri: str, public: CaPublicKey | None = None, *, pin_file: str | None = None) -> Pkcs11Signer:
    return Pkcs11Signer(MODULE, uri, str(token.pin_file) if pin_file is None else pin_file, public)


def a_chain(public: CaPublicKey) -> list[x509.Certificate]:
    """The key in the token certified by the root."""
    root, _ = ca_pair()
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "in a token")]))
        .issuer_name(root.certificate.subject)
        .public_key(public)
        .serial_number(new_serial())
        .not_valid_before(NOW - dt.timedelta(minutes=30))
        .not_valid_after(NOW + dt.timedelta(days=90))
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    assert isinstance(root.key, ec.EllipticCurvePrivateKey)
    return [builder.sign(root.key, signature_hash(root.key.public_key())), root.certificate]


@pytest.mark.parametrize("label", ["issuing", "rsa", "p256"])
def test_what_the_token_signs_verifies(token: Token, label: str) -> None:
    signer = a_signer(token, f"pkcs11:token=ca;object={label}")
    assert isinstance(signer.public_key, rsa.RSAPublicKey if label == "rsa" else ec.EllipticCurvePublicKey)
    chain = a_chain(signer.public_key)
    authority = Authority(chain, signer, IssuingPolicy())
    leaf = x509.load_der_x509_certificate(authority.issue_ak(an_ak(), INSTANCE, now=NOW).der)
    leaf.verify_directly_issued_by(chain[0])
    crl = x509.load_der_x509_crl(authority.crl([], number=1, now=NOW))
    assert crl.is_signature_valid(signer.public_key)


def test_a_request_for_its_key(token: Token, tmp_path: Path) -> None:
    signer = a_signer(token, "pkcs11:token=ca;id=%01;type=private")
    (tmp_path / "csr.der").write_bytes(make_request(signer, "in a token"))
    output = openssl("req", "-inform", "DER", "-in", str(tmp_path / "csr.der"), "-verify", "-noout", "-pubkey")
    pem = signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    assert "verify OK" in output
    assert pem in output


def test_many_threads_share_a_token(token: Token) -> None:
    signer = a_signer(token, "pkcs11:token=ca;object=issuing")
    other = a_signer(token, "pkcs11:token=ca;object=p256")
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: (other if n % 2 else signer).sign(b"%d" % n), range(64)))
    for n, signature in enumerate(made):
        key = (other if n % 2 else signer).public_key
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, b"%d" % n, ec.ECDSA(signature_hash(key)))


def test_a_lost_session_is_opened_again(token: Token) -> None:
    signer = a_signer(token, "pkcs11:token=ca;object=issuing")
    signer._session.close()
    key = signer.public_key
    assert isinstance(key, ec.EllipticCurvePublicKey)
    key.verify(signer.sign(b"again"), b"again", ec.ECDSA(signature_hash(key)))


def test_a_key_that_is_not_the_certificates_is_refused(token: Token) -> None:
    _, issuing = ca_pair()
    public = issuing.certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    with pytest.raises(InvalidArgumentError) as caught:
        a_signer(token, "pkcs11:token=ca;object=issuing", public)
    assert caught.value.reason == "CA_KEY_MISMATCH"


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("pkcs11:token=nowhere;object=issuing", "PKCS11_TOKEN_NOT_FOUND"),
        ("pkcs11:token=ca;object=nothing", "PKCS11_KEY_NOT_FOUND"),
        ("pkcs11:token=ca;object=weak", "CA_KEY_WEAK"),
    ],
)
def test_what_is_not_there_is_named(token: Token, uri: str, reason: str) -> None:
    with pytest.raises(VtpmError) as caught:
        a_signer(token, uri)
    assert (caught.value.reason, caught.value.subject) == (reason, uri)


def test_a_module_that_is_none_is_named(token: Token, tmp_path: Path) -> None:
    for module in (str(tmp_path / "none.so"), "/etc/hostname"):
        with pytest.raises(FailedPreconditionError) as caught:
            Pkcs11Signer(module, "pkcs11:token=ca;object=issuing", str(token.pin_file))
        assert caught.value.reason == "PKCS11_MODULE_FAILED"
    with pytest.raises(FailedPreconditionError) as missing:
        Pkcs11Signer("", "pkcs11:token=ca;object=issuing", str(token.pin_file))
    assert missing.value.reason == "PKCS11_UNAVAILABLE"
    assert "ca_pkcs11_module" in missing.value.remedy


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "token=ca;object=issuing",
        "pkcs11:",
        "pkcs11:token=ca",
        "pkcs11:object=issuing",
        "pkcs11:token=ca;token=b;object=x",
        "pkcs11:token=ca;object=issuing;colour=red",
        "pkcs11:token=ca;object=issuing?pin-value=1234",
        "pkcs11:token=ca;object=issuing?module-path=/tmp/evil.so",
        "pkcs11:token=ca;object=%ff",
        "pkcs11:token=ca;object=" + "x" * 1024,
        "pkcs11:token=ca\n;object=issuing",
    ],
)
def test_uris_that_are_refused(uri: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        parse_uri(uri)
    assert caught.value.reason == "PKCS11_URI_INVALID"
    assert "1234" not in str(caught.value)


def test_uris_are_decoded() -> None:
    where = parse_uri("pkcs11:token=my%20ca;id=%00%ff;serial=12")
    assert (where.token, where.identifier, where.serial, where.label) == ("my ca", b"\x00\xff", b"12", "")


def test_the_pin_comes_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "pin"
    file.write_text(PIN + "\n")
    assert read_pin(str(file), {PIN_VARIABLE: "other"}) == PIN
    assert read_pin("", {PIN_VARIABLE: PIN}) == PIN
    for pin_file, reason in (("", "PKCS11_PIN_MISSING"), (str(tmp_path / "none"), "PKCS11_PIN_UNREADABLE")):
        with pytest.raises(FailedPreconditionError) as caught:
            read_pin(pin_file, {})
        assert caught.value.reason == reason
    file.write_text("")
    with pytest.raises(FailedPreconditionError):
        read_pin(str(file), {})

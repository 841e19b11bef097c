"""The host's CA over a real store and key file: made, restarted, rotated, brought by the operator, damaged."""

from __future__ import annotations

import datetime as dt
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from tests.unit.pki.given import INSTANCE, TPM, an_ak, an_ek
from tests.unit.store.given import open_store, sign_anew
from vtpm.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    KeyProviderError,
    NotFoundError,
    SealedStateError,
    VtpmError,
)
from vtpm.instance.authority import AuthorityOptions, HostAuthority, ImportedAuthority
from vtpm.instance.authority_key import rewrap_authority_key
from vtpm.pki.making import NewCa, make_issuing, make_root
from vtpm.seal.file_provider import FileKeyProvider
from vtpm.store.store import Store
from vtpm.tpm.keys import KeyAlgorithm

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
MANUAL = AuthorityOptions(mode="manual")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'vtpm.db'}")
    yield opened
    opened.close()


@pytest.fixture
def keys(tmp_path: Path, store: Store) -> FileKeyProvider:
    return FileKeyProvider(state_dir=tmp_path, options={}, create=store.is_empty())


@pytest.fixture
def host(store: Store, keys: FileKeyProvider) -> HostAuthority:
    return HostAuthority.open(store, keys, AuthorityOptions())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def key_pem(ca: NewCa, passphrase: bytes = b"") -> bytes:
    protection = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return ca.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


def operators_ca(now: dt.datetime = NOW) -> tuple[NewCa, NewCa]:
    root = make_root("Operator's root", now=now)
    return root, make_issuing(root, "Operator's issuing", now=now)


def brought(root: NewCa, issuing: NewCa) -> ImportedAuthority:
    return ImportedAuthority(pem(issuing.certificate), pem(root.certificate), key_pem(issuing))


def reason_of(error: pytest.ExceptionInfo[VtpmError]) -> str:
    return error.value.reason


# ---- made here -----------------------------------------------------------------------------------------------------------


def test_a_ca_is_made_at_the_first_start_and_found_at_the_next(
    host: HostAuthority, store: Store, keys: FileKeyProvider
) -> None:
    again = HostAuthority.open(store, keys, AuthorityOptions())
    assert again.required().chain == host.required().chain
    root = host.required().chain[-1]
    issuing = host.required().certificate
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 1)
    assert issuing.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    for certificate in (root, issuing):
        assert certificate.signature_hash_algorithm is not None
        assert certificate.signature_hash_algorithm.name == "sha384"
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical
        assert usage.value.key_cert_sign
        assert usage.value.crl_sign
        assert not usage.value.digital_signature
    assert issuing.not_valid_after_utc <= root.not_valid_after_utc


def test_two_hosts_have_cas_of_different_names(host: HostAuthority, tmp_path: Path) -> None:
    other = open_store(f"sqlite:///{tmp_path / 'other.db'}")
    second = HostAuthority.open(other, FileKeyProvider(state_dir=tmp_path / "..", options={"path": str(tmp_path / "k2")}, create=True), AuthorityOptions())  # fmt: skip  # noqa: E501
    other.close()
    assert {c.subject for c in host.required().chain}.isdisjoint(c.subject for c in second.required().chain)


def test_manual_makes_none(store: Store, keys: FileKeyProvider) -> None:
    host = HostAuthority.open(store, keys, MANUAL)
    assert host.current is None
    with pytest.raises(FailedPreconditionError) as caught:
        host.required()
    assert reason_of(caught) == "CA_MISSING"
    assert host.init("Mine", replace=False).certificate.subject.rfc4514_string().startswith("CN=Mine issuing CA ")


def test_private_keys_are_on_disk_sealed_only(host: HostAuthority, store: Store, tmp_path: Path) -> None:
    secrets = []
    for record in store.authorities.list():
        key = host._unsealed(record)
        secrets.append(key.private_numbers().private_value.to_bytes(48, "big"))  # type: ignore[union-attr]
    assert len(secrets) == 2
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert not any(secret in stored for secret in secrets)


def test_a_second_init_needs_to_be_meant(host: HostAuthority) -> None:
    before = host.required()
    with pytest.raises(AlreadyExistsError) as caught:
        host.init("Again", replace=False)
    assert reason_of(caught) == "CA_EXISTS"
    assert host.required() is before
    assert host.init("Again", replace=True).chain[-1] != before.chain[-1]


def test_the_key_of_a_root_that_has_retired_is_destroyed(host: HostAuthority, store: Store, tmp_path: Path) -> None:
    (old,) = [record.key for record in store.authorities.list() if record.role == "ROOT"]
    host.init("Again", replace=True)
    roots = {record.state: record.key for record in store.authorities.list() if record.role == "ROOT"}
    assert roots["RETIRED"] == b""
    assert roots["CURRENT"]
    store.close()
    assert old not in (tmp_path / "vtpm.db").read_bytes()


# ---- rotation ------------------------------------------------------------------------------------------------------------


def test_a_retired_ca_goes_on_signing_its_crl(host: HostAuthority, store: Store, keys: FileKeyProvider) -> None:
    old = host.required()
    ek = old.issue_ek(an_ek(KeyAlgorithm.ECC_P256), TPM, now=NOW)
    new = host.rotate()
    assert new.key_id != old.key_id
    assert new.chain[-1] == old.chain[-1], "the root stays"
    for found in (host, HostAuthority.open(store, keys, AuthorityOptions())):
        assert [(info.state, info.key_id) for info in found.infos()] == [("CURRENT", new.key_id), ("RETIRED", old.key_id)]
        crl = x509.load_der_x509_crl(found.issuer(ek.issuer_key_id).crl([], number=9, now=NOW))
        assert crl.is_signature_valid(old.certificate.public_key())  # type: ignore[arg-type]
        assert found.certificate(old.key_id) == old.certificate
    with pytest.raises(NotFoundError):
        host.issuer(b"nobody")


def test_rotation_of_a_ca_whose_root_is_elsewhere_is_refused(host: HostAuthority) -> None:
    host.install(brought(*operators_ca()))
    with pytest.raises(FailedPreconditionError) as caught:
        host.rotate()
    assert reason_of(caught) == "CA_ROOT_ELSEWHERE"
    assert "vtpm ca csr" in caught.value.remedy


# ---- the operator's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", [b"", b"open sesame"])
def test_an_operators_ca_comes_as_files(host: HostAuthority, store: Store, keys: FileKeyProvider, passphrase: bytes) -> None:
    root, issuing = operators_ca()
    given = ImportedAuthority(pem(issuing.certificate), pem(root.certificate), key_pem(issuing, passphrase), passphrase)
    made = host.install(given)
    assert made.chain == (issuing.certificate, root.certificate)
    assert HostAuthority.open(store, keys, AuthorityOptions()).required().chain == made.chain
    assert [info.state for info in host.infos()] == ["CURRENT", "RETIRED"]
    with pytest.raises(AlreadyExistsError) as caught:
        host.install(given)
    assert reason_of(caught) == "CA_IN_FORCE"


def test_a_request_is_signed_by_openssl_and_comes_back(
    host: HostAuthority, store: Store, keys: FileKeyProvider, tmp_path: Path
) -> None:
    root, _ = operators_ca()
    files = {"root.pem": pem(root.certificate), "root.key": key_pem(root), "csr.der": host.request("Site 7")}
    files["ext"] = (
        b"basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n"
        b"subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    )
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = (
        "openssl x509 -req -inform DER -in csr.der -CA root.pem -CAkey root.key -days 300 -sha384 -extfile ext -out ca.pem"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    # The daemon may be stopped while the request is away.
    later = HostAuthority.open(store, keys, AuthorityOptions())
    made = later.install(ImportedAuthority((tmp_path / "ca.pem").read_bytes(), pem(root.certificate)))
    assert made.certificate.subject.rfc4514_string() == "CN=Site 7"
    assert made.issue_ak(an_ak(), INSTANCE, now=dt.datetime.now(dt.UTC)).der
    assert all(record.state != "PENDING" for record in store.authorities.list())


def test_a_certificate_without_a_key_here_is_refused(host: HostAuthority) -> None:
    root, issuing = operators_ca()
    host.request("")
    with pytest.raises(FailedPreconditionError) as caught:
        host.install(ImportedAuthority(pem(issuing.certificate), pem(root.certificate)))
    assert reason_of(caught) == "CA_KEY_MISSING"


@pytest.mark.parametrize(
    ("change", "reason", "subject"),
    [
        ("other key", "CA_KEY_MISMATCH", "key"),
        ("no chain", "CA_CHAIN_INCOMPLETE", "certificate"),
        ("encrypted", "CA_KEY_ENCRYPTED", "key"),
        ("nonsense", "CA_CERTIFICATE_UNREADABLE", "chain"),
        ("clock behind", "CA_NOT_YET_VALID", "certificate"),
    ],
)
def test_what_is_refused_changes_nothing(host: HostAuthority, store: Store, change: str, reason: str, subject: str) -> None:
    root, issuing = operators_ca()
    certificate, chain, key = pem(issuing.certificate), pem(root.certificate), key_pem(issuing)
    now = NOW
    match change:
        case "other key":
            key = key_pem(root)
        case "no chain":
            chain = b""
        case "encrypted":
            key = key_pem(issuing, b"secret")
        case "nonsense":
            chain = b"nonsense"
        case _:
            now = NOW - dt.timedelta(days=1)
    before = store.authorities.list()
    with pytest.raises(InvalidArgumentError) as caught:
        host.install(ImportedAuthority(certificate, chain, key), now=now)
    assert (caught.value.reason, caught.value.subject) == (reason, subject)
    assert store.authorities.list() == before


# ---- starts that are refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("days", "reason"), [(-1, "CA_NOT_YET_VALID"), (21 * 365, "CA_EXPIRED")])
def test_a_start_outside_the_cas_time_is_refused(
    host: HostAuthority, store: Store, keys: FileKeyProvider, days: int, reason: str
) -> None:
    moment = NOW + dt.timedelta(days=days)
    with pytest.raises(VtpmError) as caught:
        HostAuthority.open(store, keys, AuthorityOptions(), now=moment)
    assert reason_of(caught) == reason
    assert host.required().key_id.hex() in caught.value.subject
    assert "ca = manual" in caught.value.remedy
    # That starts, without a CA in force, and the operator can bring another.
    assert HostAuthority.open(store, keys, MANUAL, now=moment).current is None


def test_sealed_keys_that_were_swapped_are_refused(
    host: HostAuthority, store: Store, keys: FileKeyProvider, tmp_path: Path
) -> None:
    assert host.current is not None
    with sqlite3.connect(tmp_path / "vtpm.db") as database:
        database.execute("UPDATE authorities SET key = (SELECT key FROM authorities WHERE role = 'ROOT')")
    with pytest.raises(SealedStateError) as caught:
        HostAuthority.open(store, keys, AuthorityOptions())
    assert reason_of(caught) == "ROW_MAC_MISMATCH"
    # And if the row were believed, its secret would not be.
    sign_anew(store)
    with pytest.raises(SealedStateError) as caught:
        HostAuthority.open(store, keys, AuthorityOptions())
    assert reason_of(caught) == "SECRET_AUTHENTICATION_FAILED"


def test_a_chain_that_was_swapped_is_refused(host: HostAuthority, store: Store, keys: FileKeyProvider, tmp_path: Path) -> None:
    root, issuing = operators_ca()
    with sqlite3.connect(tmp_path / "vtpm.db") as database:
        chain = pem(issuing.certificate, root.certificate).decode()
        database.execute("UPDATE authorities SET chain = ? WHERE role = 'ISSUING'", (chain,))
    with pytest.raises(VtpmError) as caught:
        HostAuthority.open(store, keys, AuthorityOptions())
    assert reason_of(caught) == "ROW_MAC_MISMATCH"
    sign_anew(store)
    with pytest.raises(VtpmError) as caught:
        HostAuthority.open(store, keys, AuthorityOptions())
    assert reason_of(caught) == "CA_KEY_MISMATCH"


def test_the_key_file_is_missed_even_if_there_are_no_instances(host: HostAuthority, store: Store, tmp_path: Path) -> None:
    (tmp_path / "keys.json").unlink()
    with pytest.raises(KeyProviderError) as caught:
        FileKeyProvider(state_dir=tmp_path, options={}, create=store.is_empty())
    assert reason_of(caught) == "KEY_FILE_MISSING"


def test_the_key_file_of_another_store_is_named(host: HostAuthority, store: Store, tmp_path: Path) -> None:
    other = FileKeyProvider(state_dir=tmp_path, options={"path": str(tmp_path / "other.json")}, create=True)
    with pytest.raises(KeyProviderError) as caught:
        HostAuthority.open(store, other, MANUAL)
    assert reason_of(caught) == "KEY_UNKNOWN"
    assert "of the certificate authority was wrapped" in caught.value.message
    assert "ca = none" in caught.value.remedy


def test_key_rotation_wraps_the_cas_data_key_anew(
    host: HostAuthority, store: Store, keys: FileKeyProvider, tmp_path: Path
) -> None:
    key_id = keys.begin_rotation()
    assert rewrap_authority_key(store.authorities, keys, key_id) == 1
    assert rewrap_authority_key(store.authorities, keys, key_id) == 0
    keys.finish_rotation()
    fresh = FileKeyProvider(state_dir=tmp_path, options={}, create=False)
    assert HostAuthority.open(store, fresh, AuthorityOptions()).required().chain == host.required().chain

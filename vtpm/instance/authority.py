"""The host's certificate authority: made by itself at the first start, or the operator's own; its keys sealed in the store.

At most one issuing CA is in force. Those before it have retired: they issue nothing, and sign their CRLs until what they issued
has expired.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)

from vtpm.errors import AlreadyExistsError, FailedPreconditionError, InvalidArgumentError, NotFoundError, VtpmError
from vtpm.instance.authority_key import open_authority_key
from vtpm.pki.authority import Authority, subject_key_id
from vtpm.pki.checks import check_authority, check_time, load_certificates, load_private_key, same_key
from vtpm.pki.making import NewCa, make_issuing, make_request, make_root, new_ca_key
from vtpm.pki.model import IssuingPolicy, check_text
from vtpm.pki.pkcs11 import Pkcs11Signer
from vtpm.pki.signer import CaPrivateKey, KeySigner, Signer
from vtpm.seal.keys import KeyProvider
from vtpm.seal.secret import seal_secret, unseal_secret
from vtpm.store.authorities import REFUSED
from vtpm.store.macs import REASON, mismatch
from vtpm.store.model import AuthorityRecord
from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.authority")

_SEALED: Final = "SEALED"
_PKCS11: Final = "PKCS11"
CA_SETTING: Final = "set ca = auto, or: vtpm ca init, vtpm ca import"


@dataclass(frozen=True, slots=True)
class AuthorityOptions:
    """The settings of the CA. `mode` auto makes one where there is none, manual leaves that to the operator, none is no CA."""

    mode: Literal["auto", "manual", "none"] = "auto"
    name: str = "vTPM"
    policy: IssuingPolicy = field(default_factory=IssuingPolicy)
    pkcs11_module: str = ""
    pkcs11_pin_file: str = ""


@dataclass(frozen=True, slots=True)
class ImportedAuthority:
    """What an operator brings. `key` is PEM or DER, `pkcs11` the URI of a key in a token; neither: the key is that of the
    request that was handed out."""

    certificate: bytes
    chain: bytes = b""
    key: bytes = field(default=b"", repr=False)
    passphrase: bytes = field(default=b"", repr=False)
    pkcs11: str = ""


@dataclass(frozen=True, slots=True)
class AuthorityInfo:
    """An issuing CA, for people: `state` is CURRENT or RETIRED, `signer` SEALED or PKCS11."""

    key_id: bytes
    state: str
    signer: str
    chain: tuple[x509.Certificate, ...]


class HostAuthority:
    """Thread-safe; calls block. `current` is what issues now, and changes when the operator changes the CA: do not keep it."""

    def __init__(self, store: Store, data_key: bytes, options: AuthorityOptions) -> None:
        self._store = store.authorities
        self._data_key = data_key
        self._options = options
        self._lock = threading.Lock()
        self._issuers: dict[bytes, tuple[AuthorityInfo, Authority]] = {}
        self._certificates: dict[bytes, x509.Certificate] = {}
        self.current: Authority | None = None

    @classmethod
    def open(
        cls, store: Store, keys: KeyProvider, options: AuthorityOptions, *, now: dt.datetime | None = None
    ) -> HostAuthority:
        """Load the CA, and make one where there is none and the options say so.

        Raises:
            VtpmError: the CA can't be used: its reason says why. Nothing is replaced (invariant 7).
        """
        now = now or dt.datetime.now(dt.UTC)
        host = cls(store, open_authority_key(store.authorities, keys), options)
        host._load(now)
        if host.current is None and options.mode == "auto":
            host.init(options.name, replace=False, now=now)
        return host

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def required(self) -> Authority:
        """Return what issues now.

        Raises:
            FailedPreconditionError: CA_MISSING.
        """
        if self.current is None:
            raise FailedPreconditionError("CA_MISSING", "there is no certificate authority in force", remedy=CA_SETTING)
        return self.current

    def issuer(self, key_id: bytes) -> Authority:
        """Return an issuing CA, in force or retired.

        Raises:
            NotFoundError: CA_NOT_FOUND.
        """
        found = self._issuers.get(key_id)
        if found is None:
            raise NotFoundError("CA_NOT_FOUND", "there is no such issuing CA", subject=key_id.hex(), remedy="vtpm ca show")
        return found[1]

    def issuer_certificate(self, key_id: bytes) -> x509.Certificate | None:
        """Return the certificate of an issuing CA, in force or retired; also of one whose key can't be used just now."""
        return self._certificates.get(key_id)

    def infos(self) -> Sequence[AuthorityInfo]:
        """Return the issuing CAs, that in force first."""
        return sorted((info for info, _ in self._issuers.values()), key=lambda info: info.state != "CURRENT")

    def certificate(self, key_id: bytes) -> x509.Certificate | None:
        """Return the certificate of an issuing CA or of one above it, by its SubjectKeyIdentifier."""
        for info, _ in list(self._issuers.values()):
            for certificate in info.chain:
                if subject_key_id(certificate) == key_id:
                    return certificate
        return None

    # ---- making ----------------------------------------------------------------------------------------------------------

    def init(self, name: str, *, replace: bool, now: dt.datetime | None = None) -> Authority:
        """Make a root and an issuing CA, and put it in force.

        Raises:
            AlreadyExistsError: CA_EXISTS, and `replace` is not set.
            InvalidArgumentError: CERTIFICATE_TEXT_INVALID.
        """
        moment = now or dt.datetime.now(dt.UTC)
        with self._lock:
            if self.current is not None and not replace:
                raise AlreadyExistsError(
                    "CA_EXISTS",
                    "there is a certificate authority in force",
                    subject=self.current.certificate.subject.rfc4514_string(),
                    remedy="vtpm ca rotate makes a new issuing CA under its root; vtpm ca init --replace a new root",
                )
            root = make_root(_ca_name(name or self._options.name, "root"), now=moment)
            issuing = make_issuing(root, _ca_name(name or self._options.name, "issuing"), now=moment)
            chain = (issuing.certificate, root.certificate)
            self._install(
                [self._sealed_record("ROOT", chain[1:], root.key), self._sealed_record("ISSUING", chain, issuing.key)]
            )
            return self._reload(moment)

    def rotate(self, *, now: dt.datetime | None = None) -> Authority:
        """Make a new issuing CA under the present root. The old one retires.

        Raises:
            FailedPreconditionError: CA_ROOT_ELSEWHERE, the root's key is not here.
        """
        moment = now or dt.datetime.now(dt.UTC)
        with self._lock:
            root = next((r for r in self._store.list() if (r.role, r.state) == ("ROOT", "CURRENT")), None)
            if root is None:
                raise FailedPreconditionError(
                    "CA_ROOT_ELSEWHERE",
                    "the root's key is not here, so a new issuing CA must be certified elsewhere",
                    remedy="vtpm ca csr, have it signed, then vtpm ca import --cert; or vtpm ca init --replace",
                )
            (certificate,) = load_certificates(root.chain.encode(), "root")
            made_root = NewCa(certificate, self._unsealed(root))
            check_time(certificate, moment, "root")
            issuing = make_issuing(made_root, _ca_name(self._options.name, "issuing"), now=moment)
            self._install([self._sealed_record("ISSUING", (issuing.certificate, certificate), issuing.key)])
            return self._reload(moment)

    def request(self, name: str, pkcs11: str = "") -> bytes:
        """Return a certification request (PKCS#10, DER) for a new issuing CA.

        Its key is made here and kept sealed until the certificate comes back, or is the one in a token. A request before it
        that is still open is forgotten.

        Raises:
            InvalidArgumentError, FailedPreconditionError, UnavailableError: as vtpm.pki.pkcs11, CERTIFICATE_TEXT_INVALID.
        """
        subject = name or _ca_name(self._options.name, "issuing")
        with self._lock:
            if pkcs11:
                return make_request(self._token(pkcs11), subject)
            key = new_ca_key()
            request = make_request(KeySigner(key), subject)
            self._store.discard_pending()
            self._store.install([self._sealed_record("ISSUING", (), key, state="PENDING")])
        log.info("authority.requested", subject=subject)
        return request

    def install(self, given: ImportedAuthority, *, now: dt.datetime | None = None) -> Authority:
        """Put the operator's own CA in force, after every check (vtpm.pki.checks). The one before retires.

        Errors have `certificate`, `chain` or `key` as their subject, or the key's URI.

        Raises:
            InvalidArgumentError: a part can't be used.
            FailedPreconditionError: CA_KEY_MISSING, or the token can't be used.
            AlreadyExistsError: CA_IN_FORCE.
        """
        moment = now or dt.datetime.now(dt.UTC)
        first, *more = load_certificates(given.certificate, "certificate")
        others = [*more, *(load_certificates(given.chain, "chain") if given.chain else ())]
        with self._lock:
            # What hangs together with the present root need not bring it along.
            others += [certificate for info in self.infos() for certificate in info.chain[1:]]
            key_id = subject_key_id(first)
            fulfilled: AuthorityRecord | None = None
            identifier = uuid.uuid4()
            if given.pkcs11:
                signer: Signer = self._token(given.pkcs11)
                sealed, kind = given.pkcs11.encode(), _PKCS11
            else:
                if given.key:
                    key = load_private_key(given.key, given.passphrase or None, "key")
                else:
                    fulfilled = self._pending_for(first)
                    key = self._unsealed(fulfilled)
                signer, kind = KeySigner(key, "key"), _SEALED
                sealed = self._seal(identifier, key)
            above = "chain" if given.chain else "certificate"
            chain = check_authority(
                first, others, signer.public_key, now=moment, subject="certificate", chain_subject=above, key_subject="key"
            )
            if key_id in self._issuers and self._issuers[key_id][0].state == "CURRENT":
                raise AlreadyExistsError("CA_IN_FORCE", "this CA is in force already", subject="certificate")
            record = AuthorityRecord(identifier, "ISSUING", "CURRENT", key_id, _pem(chain), kind, sealed)
            self._store.install([record], fulfilled=fulfilled.id if fulfilled else None)
            log.info("authority.imported", subject=chain[0].subject.rfc4514_string(), key_id=key_id.hex(), signer=kind)
            return self._reload(moment)

    def _pending_for(self, certificate: x509.Certificate) -> AuthorityRecord:
        for record in self._store.list():
            if record.state == "PENDING" and same_key(self._unsealed(record).public_key(), certificate.public_key()):  # type: ignore[arg-type]
                return record
        raise FailedPreconditionError(
            "CA_KEY_MISSING",
            "no key is given, and the certificate is not for the key of the last request",
            subject="certificate",
            remedy="give --key or --pkcs11, or the certificate that was made for vtpm ca csr",
        )

    # ---- keys and records ------------------------------------------------------------------------------------------------

    def _token(self, uri: str) -> Pkcs11Signer:
        return Pkcs11Signer(self._options.pkcs11_module, uri, self._options.pkcs11_pin_file)

    def _seal(self, identifier: uuid.UUID, key: CaPrivateKey) -> bytes:
        plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return seal_secret(self._data_key, _purpose(identifier), plain)

    def _unsealed(self, record: AuthorityRecord) -> CaPrivateKey:
        plain = unseal_secret(self._data_key, _purpose(record.id), record.key)
        return load_der_private_key(plain, None)  # type: ignore[return-value]  # it was checked when it was sealed

    def _sealed_record(
        self, role: str, chain: tuple[x509.Certificate, ...], key: CaPrivateKey, state: str = "CURRENT"
    ) -> AuthorityRecord:
        identifier = uuid.uuid4()
        key_id = subject_key_id(chain[0]) if chain else b""
        return AuthorityRecord(identifier, role, state, key_id, _pem(chain), _SEALED, self._seal(identifier, key))

    def _install(self, records: Sequence[AuthorityRecord]) -> None:
        self._store.install(records)
        for record in records:
            log.info("authority.made", role=record.role, key_id=record.key_id.hex())

    # ---- loading ---------------------------------------------------------------------------------------------------------

    def _reload(self, now: dt.datetime) -> Authority:
        self._load(now)
        return self.required()

    def _load(self, now: dt.datetime) -> None:
        issuers: dict[bytes, tuple[AuthorityInfo, Authority]] = {}
        certificates: dict[bytes, x509.Certificate] = {}
        current: Authority | None = None
        for record in self._store.list():
            if record.state == REFUSED:
                # Nothing of it is known, so it may be the one in force.
                self._refused()
                continue
            if record.role != "ISSUING" or record.state == "PENDING":
                continue
            with self._tolerated(record):
                certificate = load_certificates(record.chain.encode(), "certificate")[0]
                certificates[subject_key_id(certificate)] = certificate
                authority = self._loaded(record, now)
                issuers[authority.key_id] = (
                    AuthorityInfo(authority.key_id, record.state, record.signer, authority.chain),
                    authority,
                )
                if record.state == "CURRENT":
                    current = authority
        self._issuers, self._certificates, self.current = issuers, certificates, current

    def _refused(self) -> None:
        """The row of an authority is not as it was written: it signs nothing, and in auto mode no other is made in its place.

        Raises:
            SealedStateError: ROW_MAC_MISMATCH.
        """
        if self._options.mode == "auto":
            error = mismatch("authorities", "the store's certificate authority")
            error.remedy = f"{error.remedy}; to start without a CA: ca = manual"
            raise error
        log.warning("authority.unusable", state=REFUSED, reason=REASON)

    @contextlib.contextmanager
    def _tolerated(self, record: AuthorityRecord) -> Iterator[None]:
        """A retired CA that can't be used hinders nobody; nor, in manual mode, does the one in force."""
        try:
            yield
        except VtpmError as error:
            if record.state == "CURRENT" and self._options.mode == "auto":
                if not error.subject or error.subject == "certificate":
                    error.subject = f"the store's certificate authority {record.key_id.hex()}"
                error.remedy = f"{error.remedy}; to start without a CA: ca = manual".removeprefix("; ")
                raise
            log.warning("authority.unusable", key_id=record.key_id.hex(), state=record.state, reason=error.reason)

    def _loaded(self, record: AuthorityRecord, now: dt.datetime) -> Authority:
        first, *others = load_certificates(record.chain.encode(), "certificate")
        signer: Signer
        if record.signer == _PKCS11:
            signer = Pkcs11Signer(
                self._options.pkcs11_module,
                record.key.decode(),
                self._options.pkcs11_pin_file,
                first.public_key(),  # type: ignore[arg-type]  # checked right below
            )
        else:
            signer = KeySigner(self._unsealed(record))
        if record.state == "CURRENT":
            chain = check_authority(first, others, signer.public_key, now=now, subject="certificate")
        else:
            # What it issued may be checked as long as it lasts; only its CRL is signed with it.
            chain = (first, *others)
            if not same_key(signer.public_key, first.public_key()):  # type: ignore[arg-type]
                raise InvalidArgumentError("CA_KEY_MISMATCH", "certificate and key do not belong together")
        return Authority(chain, signer, self._options.policy)


def _purpose(identifier: uuid.UUID) -> str:
    return f"certificate authority {identifier}"


def _pem(chain: Sequence[x509.Certificate]) -> str:
    return "".join(certificate.public_bytes(Encoding.PEM).decode() for certificate in chain)


def _ca_name(name: str, role: str) -> str:
    """A name that no other CA has, as some verifiers find a certificate's issuer by name alone."""
    return f"{check_text(name, 'the CA')} {role} CA {uuid.uuid4().hex[:8]}"

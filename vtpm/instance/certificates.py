"""Issued certificates: listing, revocation, and the CRLs that tell of it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Final

import structlog
from cryptography.hazmat.primitives.serialization import Encoding

from vtpm.errors import InvalidArgumentError, NotFoundError
from vtpm.instance.authority import HostAuthority
from vtpm.pki.model import Revocation, RevocationReason
from vtpm.pki.profiles import certificate_path, crl_path
from vtpm.store.model import CertificateRecord
from vtpm.store.store import Store

log: Final = structlog.get_logger("vtpm.certificates")

# Who asks over HTTP again and again gets what was made a moment ago.
_FRESH_S: Final = 5.0
_LOOK_S: Final = 60.0
# Of rows that the service did not write; who can write the store could fill it with them.
_MOST_REFUSED: Final = 10_000
# Revoked certificates stay on the CRL a little beyond their end: clocks differ.
_AFTER_EXPIRY: Final = dt.timedelta(days=7)


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    der: bytes
    entries: tuple[tuple[int, dt.datetime, str], ...]
    made_at: dt.datetime
    looked_at: float


class CertificateDesk:
    """What is asked about certificates. Thread-safe; calls block."""

    def __init__(self, store: Store, authority: HostAuthority) -> None:
        self._store = store
        self._certificates = store.certificates
        self.authority = authority
        self._lock = threading.Lock()
        self._crls: dict[bytes, _Made] = {}
        # Serial numbers of rows that the service did not write, and since when that is known.
        self._refused_since: dict[int, dt.datetime] = {}
        self._looked_at = -_LOOK_S

    def list(self, ref: str, *, history: bool) -> Sequence[CertificateRecord]:
        """Return an instance's certificates: those in force, or all that are recorded, newest first. `ref` may be the id of an
        instance that was deleted.

        Raises:
            NotFoundError: INSTANCE_NOT_FOUND.
        """
        instance = self._instance(ref)
        return self._certificates.history(instance) if history else self._certificates.current(instance)

    def _instance(self, ref: str) -> uuid.UUID:
        try:
            return self._store.get(ref).id
        except NotFoundError:
            try:
                identifier = uuid.UUID(ref.removeprefix("instances/"))
            except ValueError:
                identifier = None
            if identifier is None or not self._certificates.history(identifier):
                raise
            return identifier

    def revoke(self, which: str | Sequence[int], reason: str, *, now: dt.datetime | None = None) -> Sequence[CertificateRecord]:
        """Revoke an instance's certificates, or those of these serial numbers; return those that were not revoked before.

        Raises:
            InvalidArgumentError: REVOCATION_REASON_UNKNOWN.
            NotFoundError: INSTANCE_NOT_FOUND, or CERTIFICATE_NOT_FOUND.
        """
        reason = reason or RevocationReason.unspecified.name
        if reason not in RevocationReason.__members__:
            raise InvalidArgumentError(
                "REVOCATION_REASON_UNKNOWN",
                f"{reason[:40]!r} is no reason to revoke a certificate",
                remedy=f"one of {', '.join(RevocationReason.__members__)}",
            )
        moment = (now or dt.datetime.now(dt.UTC)).replace(microsecond=0)
        if isinstance(which, str):
            revoked = self._certificates.revoke(self._instance(which), reason, moment)
        else:
            known = {record.serial for record in self._certificates.by_serials(which)}
            if missing := [serial for serial in which if serial not in known]:
                raise NotFoundError(
                    "CERTIFICATE_NOT_FOUND", "no certificate of this serial number was issued here", subject=f"{missing[0]:x}"
                )
            revoked = self._certificates.revoke(list(which), reason, moment)
        for record in revoked:
            log.info(
                "certificate.revoked",
                serial=f"{record.serial:x}",
                instance=str(record.instance),
                kind=record.kind,
                revocation_reason=reason,
            )
        return revoked

    def crl(self, key_id: bytes | None = None, *, fresh: bool = True, now: dt.datetime | None = None) -> bytes:
        """Return the CRL of an issuing CA, in force or retired; default: the one in force. DER.

        It is made anew when something was revoked and when half its time has passed. Without `fresh` it may be seconds old.

        Raises:
            NotFoundError: CA_NOT_FOUND.
            FailedPreconditionError: CA_MISSING.
        """
        authority = self.authority.required() if key_id is None else self.authority.issuer(key_id)
        moment = (now or dt.datetime.now(dt.UTC)).replace(microsecond=0)
        with self._lock:
            made = self._crls.get(authority.key_id)
            half = authority.policy.crl_lifetime / 2
            young = made is not None and made.made_at <= moment < made.made_at + half
            if made is not None and young and not fresh and time.monotonic() - made.looked_at < _FRESH_S:
                return made.der
            revoked = self._certificates.revoked(authority.key_id, moment - _AFTER_EXPIRY)
            entries = tuple((r.serial, r.revoked_at or moment, r.revocation_reason) for r in revoked)
            entries += self._refused({r.serial for r in revoked}, moment, fresh=fresh)
            if made is not None and young and made.entries == entries:
                self._crls[authority.key_id] = dataclasses.replace(made, looked_at=time.monotonic())
                return made.der
            number = self._certificates.next_crl_number()
            der = authority.crl([Revocation(*entry) for entry in entries], number=number, now=moment)
            self._crls[authority.key_id] = _Made(der, entries, moment, time.monotonic())
        log.info("crl.made", issuer=authority.key_id.hex(), number=number, revoked=len(entries))
        return der

    def _refused(self, named: set[int], moment: dt.datetime, *, fresh: bool) -> tuple[tuple[int, dt.datetime, str], ...]:
        """Return entries for what the store says, and the service did not write: nobody makes a certificate valid that way.

        Who changed the row may have changed whose it is, so every CA's CRL names it. All rows are looked at now and then.
        """
        now_s = time.monotonic()
        if fresh or now_s - self._looked_at >= _LOOK_S:
            self._looked_at = now_s
            found = self._certificates.refused()
            self._refused_since = {serial: self._refused_since.get(serial, moment) for serial in found[:_MOST_REFUSED]}
        return tuple((serial, since, "unspecified") for serial, since in self._refused_since.items() if serial not in named)

    def published(self, path: str) -> tuple[str, bytes] | None:
        """Return what `path` of the distribution point holds, with its media type; None where there is nothing."""
        for info in self.authority.infos():
            if path == crl_path(info.key_id):
                return "application/pkix-crl", self.crl(info.key_id, fresh=False)
        name = path.removeprefix("/ca/").removesuffix(".cer")
        try:
            key_id = bytes.fromhex(name)
        except ValueError:
            return None
        certificate = self.authority.certificate(key_id)
        if certificate is None or path != certificate_path(key_id):
            return None
        return "application/pkix-cert", certificate.public_bytes(Encoding.DER)

    def forget_expired(self, *, now: dt.datetime | None = None) -> int:
        """Forget certificates that no CRL needs to name any more; return how many."""
        return self._certificates.forget_expired((now or dt.datetime.now(dt.UTC)) - _AFTER_EXPIRY)

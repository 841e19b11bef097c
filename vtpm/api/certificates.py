"""CertificateService over the instance room."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from vtpm.api.convert import instance_ref, timestamp
from vtpm.api.drain import Drain
from vtpm.api.v1 import certificate_pb2 as pb
from vtpm.api.v1.certificate_pb2_grpc import CertificateServiceServicer
from vtpm.errors import FailedPreconditionError, InvalidArgumentError
from vtpm.instance.authority import CA_SETTING, AuthorityInfo, HostAuthority, ImportedAuthority
from vtpm.pki.authority import Authority
from vtpm.store.model import CertificateRecord

_MAX_SERIALS: Final = 1000
_MAX_SERIAL_DIGITS: Final = 40
_Result = TypeVar("_Result")


class Certificates(Protocol):
    """What the service needs of vtpm.instance.certificates.CertificateDesk; calls block."""

    @property
    def authority(self) -> HostAuthority:
        """The host's CA."""

    def list(self, ref: str, *, history: bool) -> Sequence[CertificateRecord]:
        """An instance's certificates."""

    def revoke(self, which: str | Sequence[int], reason: str) -> Sequence[CertificateRecord]:
        """Revoke an instance's certificates, or those of these serial numbers."""

    def crl(self, key_id: bytes | None = None) -> bytes:
        """An issuing CA's CRL."""


class CertificateServicer(CertificateServiceServicer):
    """Certificates and the CA; `certificates` is None where there is none (ca = none)."""

    def __init__(self, certificates: Certificates | None, drain: Drain) -> None:
        self._certificates = certificates
        self._drain = drain

    @property
    def _desk(self) -> Certificates:
        if self._certificates is None:
            raise FailedPreconditionError("CA_DISABLED", "this daemon has no certificate authority", remedy=CA_SETTING)
        return self._certificates

    async def _do(self, work: Callable[[], _Result]) -> _Result:
        """Run `work` in a thread, to its end, even if its caller goes."""
        return await self._drain.complete(asyncio.to_thread(work))

    async def GetAuthority(self, request: pb.GetAuthorityRequest, context: Any) -> pb.GetAuthorityResponse:
        infos = await asyncio.to_thread(self._desk.authority.infos)
        return pb.GetAuthorityResponse(authorities=[_authority(info) for info in infos])

    async def InitAuthority(self, request: pb.InitAuthorityRequest, context: Any) -> pb.Authority:
        authority = self._desk.authority
        return await self._changed(lambda: authority.init(request.name, replace=request.replace))

    async def ImportAuthority(self, request: pb.ImportAuthorityRequest, context: Any) -> pb.Authority:
        authority = self._desk.authority
        given = ImportedAuthority(request.certificate, request.chain, request.key, request.passphrase, request.pkcs11_uri)
        if given.key and given.pkcs11:
            raise InvalidArgumentError("CA_KEY_TWICE", "a CA has one key: give a file or a PKCS#11 URI")
        return await self._changed(lambda: authority.install(given))

    async def RotateAuthority(self, request: pb.RotateAuthorityRequest, context: Any) -> pb.Authority:
        return await self._changed(self._desk.authority.rotate)

    async def _changed(self, change: Callable[[], Authority]) -> pb.Authority:
        await self._do(change)
        return _authority((await asyncio.to_thread(self._desk.authority.infos))[0])

    async def RequestAuthority(self, request: pb.RequestAuthorityRequest, context: Any) -> pb.RequestAuthorityResponse:
        authority = self._desk.authority
        return pb.RequestAuthorityResponse(csr=await self._do(lambda: authority.request(request.name, request.pkcs11_uri)))

    async def GetCrl(self, request: pb.GetCrlRequest, context: Any) -> pb.GetCrlResponse:
        key_id = _hex(request.key_id, "key_id") if request.key_id else None
        return pb.GetCrlResponse(crl=await self._do(lambda: self._desk.crl(key_id)))

    async def ListCertificates(self, request: pb.ListCertificatesRequest, context: Any) -> pb.ListCertificatesResponse:
        ref, desk = instance_ref(request.instance), self._desk
        records = await asyncio.to_thread(lambda: desk.list(ref, history=request.history))
        return pb.ListCertificatesResponse(certificates=[certificate_to_proto(record) for record in records])

    async def RevokeCertificates(self, request: pb.RevokeCertificatesRequest, context: Any) -> pb.RevokeCertificatesResponse:
        if bool(request.instance) == bool(request.serials) or len(request.serials) > _MAX_SERIALS:
            raise InvalidArgumentError(
                "REVOCATION_AMBIGUOUS", f"give an instance, or serial numbers (at most {_MAX_SERIALS}), and not both"
            )
        which: str | list[int] = (
            instance_ref(request.instance) if request.instance else [_serial(text) for text in request.serials]
        )
        desk = self._desk
        revoked = await self._do(lambda: desk.revoke(which, request.reason))
        return pb.RevokeCertificatesResponse(certificates=[certificate_to_proto(record) for record in revoked])


def certificate_to_proto(record: CertificateRecord) -> pb.Certificate:
    """Write a certificate's record down."""
    message = pb.Certificate(
        serial=f"{record.serial:x}",
        instance=f"instances/{record.instance}",
        kind=record.kind,
        algorithm=record.algorithm,
        der=record.der,
        not_before=timestamp(record.not_before),
        not_after=timestamp(record.not_after),
        issuer_key_id=record.issuer_key_id.hex(),
        revocation_reason=record.revocation_reason,
        current=record.current,
    )
    if record.revoked_at is not None:
        message.revoke_time.CopyFrom(timestamp(record.revoked_at))
    return message


def _authority(info: AuthorityInfo) -> pb.Authority:
    certificate: x509.Certificate = info.chain[0]
    return pb.Authority(
        key_id=info.key_id.hex(),
        state=info.state,
        signer=info.signer,
        subject=certificate.subject.rfc4514_string(),
        not_before=timestamp(certificate.not_valid_before_utc),
        not_after=timestamp(certificate.not_valid_after_utc),
        chain=[one.public_bytes(Encoding.PEM).decode() for one in info.chain],
    )


def _hex(text: str, what: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidArgumentError("HEX_INVALID", f"{what} is hexadecimal", subject=text[:80]) from None


def _serial(text: str) -> int:
    digits = text.replace(":", "").removeprefix("0x")
    if not digits or len(digits) > _MAX_SERIAL_DIGITS or not all(c in "0123456789abcdefABCDEF" for c in digits):
        raise InvalidArgumentError("SERIAL_INVALID", "a serial number is hexadecimal, at most 40 digits", subject=text[:80])
    return int(digits, 16)

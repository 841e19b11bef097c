"""ActivationService over the instance room."""

# ruff: noqa: N802, D102 -- the proto names the methods and says what they do.

from __future__ import annotations

from typing import Any, Final, Protocol

from cryptography.hazmat.primitives.serialization import Encoding

from vtpm.api.access import Access
from vtpm.api.convert import timestamp
from vtpm.api.drain import Drain
from vtpm.api.v1 import activation_pb2 as pb
from vtpm.api.v1.activation_pb2_grpc import ActivationServiceServicer
from vtpm.errors import InvalidArgumentError
from vtpm.instance.activation import Begun, Certified

_MAX_PUBLIC_SIZE: Final = 4096
_MAX_SECRET_SIZE: Final = 64
_MAX_TEXT: Final = 64


class ActivationDesk(Protocol):
    """What the service needs of vtpm.instance.activation.Activations."""

    async def begin(self, ref: str, ak_public: bytes, ek_algorithm: str) -> Begun:
        """A credential for a guest's key."""

    async def complete(self, ref: str, activation: str, secret: bytes) -> Certified:
        """The certificate, on proof."""


class ActivationServicer(ActivationServiceServicer):
    """Certifies AKs of guests; `access` says of which."""

    def __init__(self, desk: ActivationDesk, drain: Drain, access: Access) -> None:
        self._desk = desk
        self._drain = drain
        self._access = access

    async def BeginAkCertificate(self, request: pb.BeginAkCertificateRequest, context: Any) -> pb.BeginAkCertificateResponse:
        ref = self._access.instance(request.instance)
        if not 0 < len(request.ak_public) <= _MAX_PUBLIC_SIZE or len(request.ek_algorithm) > _MAX_TEXT:
            raise InvalidArgumentError("PUBLIC_AREA_INVALID", "the request needs the TPMT_PUBLIC of an AK")
        begun = await self._desk.begin(ref, request.ak_public, request.ek_algorithm)
        return pb.BeginAkCertificateResponse(
            activation=begun.activation,
            credential_blob=begun.credential.blob,
            encrypted_secret=begun.credential.encrypted_secret,
            ek_handle=begun.ek.handle,
            ek_algorithm=begun.ek.algorithm,
            expire_time=timestamp(begun.expires),
        )

    async def CompleteAkCertificate(
        self, request: pb.CompleteAkCertificateRequest, context: Any
    ) -> pb.CompleteAkCertificateResponse:
        ref = self._access.instance(request.instance)
        if len(request.activation) > _MAX_TEXT or len(request.secret) > _MAX_SECRET_SIZE:
            raise InvalidArgumentError("ACTIVATION_INVALID", "this names no activation, or is no secret of one")
        certified = await self._drain.complete(self._desk.complete(ref, request.activation, request.secret))
        record = certified.record
        return pb.CompleteAkCertificateResponse(
            certificate=record.der,
            chain=[one.public_bytes(Encoding.PEM).decode() for one in certified.chain],
            not_after=timestamp(record.not_after),
            serial=f"{record.serial:x}",
        )

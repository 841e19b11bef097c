"""`vtpm ak certify`: in a guest, have an AK in its TPM certified by the service."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from vtpm.api.v1 import activation_pb2 as pb
from vtpm.cli.client import Client
from vtpm.cli.context import connected
from vtpm.cli.tpm import write_file
from vtpm.errors import EngineError, InvalidArgumentError
from vtpm.tpm.keys import KeyAlgorithm, ObjectAttribute, ek_template, parse_public

app = typer.Typer(no_args_is_help=True, help="Attestation keys of a guest's own.")


@app.callback()
def _group() -> None:
    """Attestation keys of a guest's own."""


@app.command()
def certify(
    key: Annotated[str, typer.Argument(help="Persistent handle of the AK, such as 0x81010003.", show_default=False)],
    tcti: Annotated[str, typer.Option(help="The guest's TPM, as tpm2-tools name it.")] = "device:/dev/tpmrm0",
    instance: Annotated[str, typer.Option(help="Name or id; not needed on a guest socket.")] = "",
    ek: Annotated[str, typer.Option(help="EK to prove it against, such as ECC_P256. Default: the first.")] = "",
    out: Annotated[Path | None, typer.Option(help="File for certificate and chain, PEM. Default: standard output.")] = None,
) -> None:
    """Prove an AK to the service (TPM2_ActivateCredential) and get its certificate.

    On a guest: vtpm --address unix:/…/guest.sock ak certify 0x81010003
    """
    handle = _handle(key)
    with connected() as client, _tpm(tcti) as esapi:
        text = _certify(client, esapi, handle, instance, ek)
    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text.encode())


def _handle(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise InvalidArgumentError("HANDLE_INVALID", "a handle is hexadecimal", subject=text[:80]) from None


@contextlib.contextmanager
def _tpm(tcti: str) -> Iterator[Any]:
    from tpm2_pytss import ESAPI, TCTILdr
    from tpm2_pytss.TSS2_Exception import TSS2_Exception

    name, _, conf = tcti.partition(":")
    try:
        with TCTILdr(name, conf or None) as connection, ESAPI(connection) as esapi:
            yield esapi
    except TSS2_Exception as error:
        raise EngineError(
            "TPM_FAILED",
            f"the guest's TPM or the way to it failed: {error}",
            subject=tcti,
            remedy="check --tcti and the handle",
        ) from None


def _certify(client: Client, esapi: Any, handle: int, instance: str, ek: str) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding
    from tpm2_pytss.constants import ESYS_TR
    from tpm2_pytss.types import TPM2B_ENCRYPTED_SECRET, TPM2B_ID_OBJECT

    ak = esapi.tr_from_tpmpublic(handle)
    public = esapi.read_public(ak)[0].publicArea.marshal()
    request = pb.BeginAkCertificateRequest(instance=instance, ak_public=public, ek_algorithm=ek)
    begun: pb.BeginAkCertificateResponse = client.call(client.activation.BeginAkCertificate, request)
    with _ek(esapi, begun) as (ek_object, session):
        secret = esapi.activate_credential(
            ak,
            ek_object,
            TPM2B_ID_OBJECT(credential=begun.credential_blob),
            TPM2B_ENCRYPTED_SECRET(secret=begun.encrypted_secret),
            session1=ESYS_TR.PASSWORD,
            session2=session,
        )
    answer = pb.CompleteAkCertificateRequest(instance=instance, activation=begun.activation, secret=bytes(secret))
    done: pb.CompleteAkCertificateResponse = client.call(client.activation.CompleteAkCertificate, answer)
    certificate = x509.load_der_x509_certificate(done.certificate).public_bytes(Encoding.PEM).decode()
    return certificate + "".join(done.chain)


@contextlib.contextmanager
def _ek(esapi: Any, begun: pb.BeginAkCertificateResponse) -> Iterator[tuple[Any, Any]]:
    """The EK and the session that uses it; whatever is made for it is flushed."""
    from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE
    from tpm2_pytss.types import TPM2B_PUBLIC, TPM2B_SENSITIVE_CREATE, TPMT_PUBLIC, TPMT_SYM_DEF

    template = ek_template(KeyAlgorithm(begun.ek_algorithm))
    with contextlib.ExitStack() as stack:
        if begun.ek_handle:
            ek = esapi.tr_from_tpmpublic(begun.ek_handle)
        else:
            # The guest has removed it; its template makes the same again.
            public = TPM2B_PUBLIC(TPMT_PUBLIC.unmarshal(template)[0])
            ek, *_ = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), public, ESYS_TR.ENDORSEMENT)
            stack.callback(esapi.flush_context, ek)
        if ObjectAttribute.USER_WITH_AUTH in parse_public(template).attributes:
            yield ek, ESYS_TR.PASSWORD
            return
        symmetric = TPMT_SYM_DEF(algorithm=TPM2_ALG.NULL)
        session = esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, symmetric, TPM2_ALG.SHA256)
        stack.callback(esapi.flush_context, session)
        esapi.policy_secret(ESYS_TR.ENDORSEMENT, session, b"", b"", b"", 0)
        yield ek, session

"""`vtpm ca`: the host's certificate authority."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from vtpm import files
from vtpm.api.v1 import certificate_pb2 as pb
from vtpm.cli import output
from vtpm.cli.certificates import CertificateFormat, print_certificates, write
from vtpm.cli.context import OutputOption, connected, say
from vtpm.cli.output import Format
from vtpm.cli.tpm import write_file
from vtpm.errors import InvalidArgumentError, VtpmError

app = typer.Typer(no_args_is_help=True, help="The certificate authority.")
_MAX_FILE: Final = 256 << 10

Pkcs11Option = Annotated[str, typer.Option("--pkcs11", help="URI of a key in a token: pkcs11:token=…;object=…")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="Beginning of the CA's names; default: the daemon's ca_name.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Also if there is a CA in force, which then retires.")] = False,
    form: OutputOption = Format.TABLE,
) -> None:
    """Make a root and an issuing CA and put it in force."""
    _changed("InitAuthority", pb.InitAuthorityRequest(name=name, replace=replace), form)


@app.command("import")
def import_ca(
    cert: Annotated[Path, typer.Option(help="Certificate of the issuing CA, PEM or DER.")],
    key: Annotated[Path | None, typer.Option(help="Its private key, PEM or DER. Without: that of vtpm ca csr.")] = None,
    chain: Annotated[Path | None, typer.Option(help="Certificates above it up to the root, PEM.")] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help="File with the passphrase of the key.")] = None,
    pkcs11: Pkcs11Option = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Put your own CA in force."""
    given = {"certificate": cert, "chain": chain, "key": key}
    content = {name: _read(path) if path is not None else b"" for name, path in given.items()}
    passphrase = _read(passphrase_file).removesuffix(b"\n").removesuffix(b"\r") if passphrase_file is not None else b""
    request = pb.ImportAuthorityRequest(**content, passphrase=passphrase, pkcs11_uri=pkcs11)
    _changed("ImportAuthority", request, form, {name: str(path) for name, path in given.items() if path is not None})


@app.command()
def rotate(form: OutputOption = Format.TABLE) -> None:
    """Make a new issuing CA under the present root; the old one goes on signing its CRL."""
    _changed("RotateAuthority", pb.RotateAuthorityRequest(), form)


@app.command()
def csr(
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    name: Annotated[str, typer.Option(help="Common name of the subject.")] = "",
    written: Annotated[CertificateFormat, typer.Option("--format", help="pem or der.")] = CertificateFormat.PEM,
    pkcs11: Pkcs11Option = "",
) -> None:
    """Make a request for an issuing CA's certificate, to be signed by your own root; then: vtpm ca import --cert."""
    with connected() as client:
        request = pb.RequestAuthorityRequest(name=name, pkcs11_uri=pkcs11)
        made: pb.RequestAuthorityResponse = client.call(client.certificates.RequestAuthority, request)
    write(_encoded(made.csr, "CERTIFICATE REQUEST", written), out)


@app.command()
def show(
    out: Annotated[Path | None, typer.Option(help="Directory to write root.pem and issuing.pem to.")] = None,
    form: OutputOption = Format.TABLE,
) -> None:
    """Show the CA in force and those that have retired."""
    with connected() as client:
        made: pb.GetAuthorityResponse = client.call(client.certificates.GetAuthority, pb.GetAuthorityRequest())
    if out is not None:
        if not made.authorities or made.authorities[0].state != "CURRENT":
            raise InvalidArgumentError("CA_MISSING", "there is no certificate authority in force", remedy="vtpm ca init")
        chain = made.authorities[0].chain
        write_file(out / "root.pem", chain[-1].encode())
        # A CA that is its own root is both.
        write_file(out / "issuing.pem", "".join(chain[:-1] or chain).encode())
        say(f"wrote root.pem and issuing.pem to {out}")
        return
    if form is not Format.TABLE:
        output.emit([_value(authority) for authority in made.authorities], form)
        return
    heads = ("KEY ID", "STATE", "SIGNER", "SUBJECT", "NOT AFTER")
    output.table(
        heads, ((one.key_id, one.state, one.signer, one.subject, one.not_after.ToJsonString()) for one in made.authorities)
    )


@app.command()
def crl(
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
    key_id: Annotated[str, typer.Option(help="Key id of the issuing CA; default: the one in force.")] = "",
    written: Annotated[CertificateFormat, typer.Option("--format", help="pem or der.")] = CertificateFormat.PEM,
) -> None:
    """Get an issuing CA's CRL."""
    with connected() as client:
        made: pb.GetCrlResponse = client.call(client.certificates.GetCrl, pb.GetCrlRequest(key_id=key_id))
    write(_encoded(made.crl, "X509 CRL", written), out)


@app.command()
def revoke(
    instance: Annotated[str, typer.Argument(help="Name or id; all of its certificates.", show_default=False)] = "",
    serial: Annotated[list[str] | None, typer.Option(help="Serial number in hexadecimal; may be given more than once.")] = None,
    reason: Annotated[str, typer.Option(help="RFC 5280's name: keyCompromise, superseded, …")] = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Revoke an instance's certificates, or some by serial number."""
    with connected() as client:
        request = pb.RevokeCertificatesRequest(instance=instance, serials=serial or [], reason=reason)
        made: pb.RevokeCertificatesResponse = client.call(client.certificates.RevokeCertificates, request)
    print_certificates(made.certificates, form)
    say(f"revoked {len(made.certificates)}; vtpm ca crl gives the CRL that names them")


def _changed(method: str, request: Any, form: Format, files: Mapping[str, str] | None = None) -> None:
    try:
        with connected() as client:
            made: pb.Authority = client.call(getattr(client.certificates, method), request)
    except VtpmError as error:
        # The daemon knows what it was given, not from which file.
        error.subject = (files or {}).get(error.subject, error.subject)
        raise
    value = _value(made)
    if form is Format.TABLE:
        del value["chain"]
        output.mapping(value)
    else:
        output.emit(value, form)


def _value(authority: pb.Authority) -> dict[str, object]:
    return {
        "key_id": authority.key_id,
        "state": authority.state,
        "signer": authority.signer,
        "subject": authority.subject,
        "not_before": authority.not_before.ToJsonString(),
        "not_after": authority.not_after.ToJsonString(),
        "chain": list(authority.chain),
    }


def _encoded(der: bytes, label: str, written: CertificateFormat) -> bytes:
    if written is CertificateFormat.DER:
        return der
    if written is CertificateFormat.TEXT:
        raise InvalidArgumentError("FORMAT_UNSUPPORTED", "this is written as pem or der", remedy="pipe it to openssl for text")
    from vtpm.pki.text import pem

    return pem(der, label).encode()


def _read(path: Path) -> bytes:
    try:
        content = files.read(path, _MAX_FILE, follow=True)
    except OSError as error:
        raise InvalidArgumentError("FILE_UNREADABLE", f"can't be read: {error.strerror}", subject=str(path)) from None
    if not content:
        raise InvalidArgumentError("FILE_UNREADABLE", "is empty", subject=str(path))
    return content

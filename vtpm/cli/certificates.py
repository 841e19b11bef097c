"""`vtpm instance cert`: an instance's certificates."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from vtpm.api.v1 import certificate_pb2 as pb
from vtpm.cli import output
from vtpm.cli.context import NameArgument, OutputOption, connected
from vtpm.cli.output import Format
from vtpm.cli.tpm import write_file
from vtpm.errors import InvalidArgumentError, NotFoundError

_PLATFORM: Final = "PLATFORM"


class Kind(enum.StrEnum):
    """What can be asked for."""

    EK_RSA = "ek-rsa"
    EK_ECC = "ek-ecc"
    AK = "ak"
    GUEST_AK = "guest-ak"
    PLATFORM = "platform"


class CertificateFormat(enum.StrEnum):
    """How a certificate is written."""

    PEM = "pem"
    DER = "der"
    TEXT = "text"


_WANTED: Final[dict[Kind, Callable[[pb.Certificate], bool]]] = {
    Kind.EK_RSA: lambda one: one.kind == "EK" and one.algorithm.startswith("RSA"),
    Kind.EK_ECC: lambda one: one.kind == "EK" and one.algorithm.startswith("ECC"),
    Kind.AK: lambda one: one.kind == "AK",
    Kind.GUEST_AK: lambda one: one.kind == "GUEST_AK",
    Kind.PLATFORM: lambda one: one.kind == _PLATFORM,
}


def register(app: typer.Typer) -> None:
    """Add `cert` to `vtpm instance`."""
    app.command("cert")(cert)


def cert(
    name: NameArgument,
    kind: Annotated[Kind | None, typer.Option(help="Print this certificate; without: list all.")] = None,
    algorithm: Annotated[str, typer.Option(help="Which key, if there are several of a kind: such as ecc_p384.")] = "",
    written: Annotated[CertificateFormat, typer.Option("--format", help="How to write it.")] = CertificateFormat.PEM,
    out: Annotated[Path | None, typer.Option(help="File to write it to; default: standard output.")] = None,
    history: Annotated[bool, typer.Option("--history", help="List also those that were replaced.")] = False,
    form: OutputOption = Format.TABLE,
) -> None:
    """List an instance's certificates, or print one."""
    with connected() as client:
        request = pb.ListCertificatesRequest(instance=name, history=history and kind is None)
        made: pb.ListCertificatesResponse = client.call(client.certificates.ListCertificates, request)
    if kind is None:
        print_certificates(made.certificates, form)
        return
    one = _choose(made.certificates, name, kind, algorithm.upper())
    attribute = one.kind == _PLATFORM
    if written is CertificateFormat.DER:
        content = one.der
    else:
        from vtpm.pki.text import describe, to_pem

        render = to_pem if written is CertificateFormat.PEM else describe
        content = render(one.der, attribute=attribute).encode()
    write(content, out)


def write(content: bytes, out: Path | None) -> None:
    """Write to a file or to standard output."""
    if out is not None:
        write_file(out, content)
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)


def _choose(certificates: Sequence[pb.Certificate], name: str, kind: Kind, algorithm: str) -> pb.Certificate:
    found = [one for one in certificates if _WANTED[kind](one) and one.algorithm.startswith(algorithm)]
    if not found:
        raise NotFoundError(
            "CERTIFICATE_NOT_FOUND",
            f"there is no such certificate ({kind})",
            subject=name,
            remedy=f"vtpm instance cert {name} lists those that there are",
        )
    if len(found) > 1:
        raise InvalidArgumentError(
            "CERTIFICATE_AMBIGUOUS",
            f"there are several: {', '.join(one.algorithm.lower() for one in found)}",
            subject=name,
            remedy=f"say which with --algorithm {found[0].algorithm.lower()}",
        )
    return found[0]


def print_certificates(certificates: Sequence[pb.Certificate], form: Format) -> None:
    """Print a list of certificates."""
    if form is not Format.TABLE:
        output.emit([_value(one) for one in certificates], form)
        return
    heads = ("KIND", "KEY", "SERIAL", "NOT AFTER", "STATE")
    rows = ((one.kind, one.algorithm, one.serial, one.not_after.ToJsonString(), _state(one)) for one in certificates)
    output.table(heads, rows)


def _state(one: pb.Certificate) -> str:
    if one.HasField("revoke_time"):
        return f"revoked ({one.revocation_reason})"
    return "in force" if one.current else "replaced"


def _value(one: pb.Certificate) -> dict[str, object]:
    return {
        "serial": one.serial,
        "instance": one.instance.removeprefix("instances/"),
        "kind": one.kind,
        "algorithm": one.algorithm,
        "not_before": one.not_before.ToJsonString(),
        "not_after": one.not_after.ToJsonString(),
        "issuer_key_id": one.issuer_key_id,
        "current": one.current,
        "revoke_time": one.revoke_time.ToJsonString() if one.HasField("revoke_time") else None,
        "revocation_reason": one.revocation_reason,
    }

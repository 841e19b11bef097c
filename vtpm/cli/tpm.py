"""`vtpm quote`, `pcrs`, `measure`, `eventlog`, `execute`: one instance's TPM."""

from __future__ import annotations

import errno
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from vtpm import files
from vtpm.api.v1 import tpm_pb2 as pb
from vtpm.cli import output
from vtpm.cli.context import NameArgument, OutputOption, connected, say
from vtpm.cli.output import Format
from vtpm.errors import InvalidArgumentError
from vtpm.tpm.codes import response_code_name
from vtpm.tpm.command import HEADER_SIZE, parse_header
from vtpm.tpm.eventlog import parse_event_log
from vtpm.tpm.pcr import PcrBank, PcrSelection, parse_selection, to_tpm2_tools_pcrs

_DEFAULT_PCRS: Final = "sha256:0-7"
_MAX_FILE_SIZE: Final = 1 << 20
_MAX_TEXT: Final = 60
_SHORT_DIGEST: Final = 16
_ORIGINS: Final = {pb.SERVICE: "service", pb.OPERATOR: "operator", pb.GUEST: "guest", pb.VMM: "vmm"}

PcrsOption = Annotated[str, typer.Option(help="Such as sha256:0-7,10+sha384:all")]


def register(app: typer.Typer) -> None:
    """Add these commands to the top level."""
    for command in (quote, pcrs, measure, execute):
        app.command()(command)


def _to_proto(selections: Sequence[PcrSelection]) -> list[pb.PcrSelection]:
    return [pb.PcrSelection(hash_algorithm=item.bank.hash_name, indices=item.indices) for item in selections]


def _hex(text: str, what: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InvalidArgumentError("HEX_INVALID", f"{what} must be hexadecimal", subject=text[:80]) from None


def write_file(path: Path, content: bytes) -> None:
    """Write `path` as one step, so that nobody finds half a file.

    Raises:
        InvalidArgumentError: FILE_UNWRITABLE.
    """
    try:
        # For everybody whom the umask lets read.
        files.replace(path, content, mode=0o666, make=0o777)
    except OSError as error:
        raise InvalidArgumentError("FILE_UNWRITABLE", f"can't be written: {error.strerror}", subject=str(path)) from None


def quote(
    name: NameArgument,
    out: Annotated[Path, typer.Option(help="Directory to write quote.msg, quote.sig, ak.pem and pcrs.bin to.")],
    pcrs: PcrsOption = _DEFAULT_PCRS,
    nonce: Annotated[str, typer.Option(help="qualifyingData in hexadecimal, at most 64 bytes; choose it fresh.")] = "",
) -> None:
    """Sign PCRs and a nonce with the instance's AK; the files are what tpm2_checkquote takes."""
    selections = parse_selection(pcrs)
    request = pb.QuoteRequest(instance=name, selections=_to_proto(selections), nonce=_hex(nonce, "--nonce"))
    with connected() as client:
        made: pb.QuoteResponse = client.call(client.tpm.Quote, request)
    write_file(out / "quote.msg", made.attest)
    write_file(out / "quote.sig", made.signature)
    write_file(out / "ak.pem", made.ak_public_pem.encode())
    write_file(out / "pcrs.bin", to_tpm2_tools_pcrs(selections, [value.digest for value in made.values]))
    say(f"wrote quote.msg, quote.sig, ak.pem and pcrs.bin to {out}")


def pcrs(
    name: NameArgument,
    pcrs: Annotated[str, typer.Option(help="Such as sha256:0-7,10+sha384:all; default: all that is allocated.")] = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Read PCRs."""
    selections = _to_proto(parse_selection(pcrs)) if pcrs else []
    with connected() as client:
        made: pb.ReadPcrsResponse = client.call(client.tpm.ReadPcrs, pb.ReadPcrsRequest(instance=name, selections=selections))
    _print_values(made.values, form)


def _print_values(values: Sequence[pb.PcrValue], form: Format) -> None:
    if form is Format.TABLE:
        output.table(("PCR", "VALUE"), ((f"{value.hash_algorithm}:{value.index}", value.digest.hex()) for value in values))
        return
    banks: dict[str, dict[str, str]] = {}
    for value in values:
        banks.setdefault(value.hash_algorithm, {})[str(value.index)] = value.digest.hex()
    output.emit(banks, form)


def measure(
    name: NameArgument,
    pcr: Annotated[int, typer.Argument(min=0, max=23, help="PCR index.")],
    file: Annotated[Path, typer.Argument(help="What to measure; - for standard input.")],
    event: Annotated[str, typer.Option(help="Text recorded with the event; default: the file's name.")] = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Extend a PCR with a file's digests and record the event."""
    try:
        given = str(file) == "-"
        data = sys.stdin.buffer.read(_MAX_FILE_SIZE + 1) if given else files.read(file, _MAX_FILE_SIZE, follow=True)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise _too_large(file) from None
        raise InvalidArgumentError("FILE_UNREADABLE", f"can't be read: {error.strerror}", subject=str(file)) from None
    if len(data) > _MAX_FILE_SIZE:
        raise _too_large(file)
    text = event or (file.name if str(file) != "-" else "stdin")
    with connected() as client:
        request = pb.MeasureRequest(instance=name, pcr=pcr, data=data, event_data=text.encode())
        made: pb.MeasureResponse = client.call(client.tpm.Measure, request)
    _print_values(made.values, form)


def _too_large(file: Path) -> InvalidArgumentError:
    return InvalidArgumentError(
        "DATA_TOO_LARGE", "at most 1 MiB can be measured", subject=str(file), remedy="measure its digest"
    )


def eventlog(
    name: NameArgument,
    out: Annotated[Path | None, typer.Option(help="File to write the TCG event log to, for tpm2_eventlog.")] = None,
    form: Annotated[
        Format | None, typer.Option("--output", "-o", help="Default: a table on a terminal, else the TCG event log itself.")
    ] = None,
) -> None:
    """Get what was measured since the last reset, and who measured it: service, operator, guest or VMM."""
    with connected() as client:
        made: pb.GetEventLogResponse = client.call(client.tpm.GetEventLog, pb.GetEventLogRequest(instance=name))
    if out is not None:
        write_file(out, made.event_log)
        if form is None:
            return
    if form is None and not sys.stdout.isatty():
        sys.stdout.buffer.write(made.event_log)
        return
    events = _events(made)
    if form is None or form is Format.TABLE:
        output.table(("ORIGIN", "PCR", "TYPE", "DIGEST", "EVENT"), (_row(event) for event in events))
    else:
        output.emit(events, form)


def _events(made: pb.GetEventLogResponse) -> list[dict[str, Any]]:
    """Return the events in the order of the log. What the service does not know the origin of is `unknown`."""
    events = parse_event_log(made.event_log)
    banks = {bank.alg_id: bank.hash_name for bank in PcrBank}
    known = made.origins if len(made.origins) == len(events) else [pb.EVENT_ORIGIN_UNSPECIFIED] * len(events)
    return [
        {
            "origin": _ORIGINS.get(origin, "unknown"),
            "pcr": event.pcr,
            "type": f"0x{event.event_type:08x}",
            "digests": {banks.get(alg, f"0x{alg:04x}"): digest.hex() for alg, digest in event.digests.items()},
            "text": _printable(event.data),
            "data": event.data.hex(),
        }
        for event, origin in zip(events, known, strict=True)
    ]


def _row(event: Mapping[str, Any]) -> tuple[str, ...]:
    digest = next(iter(event["digests"].values()), "")
    return event["origin"], str(event["pcr"]), event["type"], digest[:_SHORT_DIGEST], event["text"]


def _printable(data: bytes) -> str:
    """What a guest wrote, on one line and without anything that a terminal obeys."""
    text = data.decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "." for char in text[:_MAX_TEXT])


def execute(
    name: NameArgument,
    command: Annotated[str, typer.Argument(help="A whole TPM 2.0 command in hexadecimal.")],
    locality: Annotated[int, typer.Option(min=0, max=4)] = 0,
) -> None:
    """Run one raw TPM command and print the response in hexadecimal; its TPM_RC goes to standard error."""
    request = pb.ExecuteRequest(instance=name, command=_hex(command, "the command"), locality=locality)
    with connected() as client:
        made: pb.ExecuteResponse = client.call(client.tpm.Execute, request)
    sys.stdout.write(made.response.hex() + "\n")
    if len(made.response) >= HEADER_SIZE:
        say(response_code_name(parse_header(made.response).code))

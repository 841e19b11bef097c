"""`vtpm eventlog` and `vtpm pcr`: what was measured, why it differs, and what will be measured.

Nothing of gRPC is imported here: a log in a file needs no daemon. The readers are imported when a command runs.
"""

from __future__ import annotations

import enum
import errno
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vtpm import files
from vtpm.cli import exits, output
from vtpm.cli.context import OutputOption, connected, say
from vtpm.cli.output import Format
from vtpm.cli.tpm import eventlog as get_log
from vtpm.errors import InvalidArgumentError

if TYPE_CHECKING:
    from vtpm.eventlog.reading import AnyLog
    from vtpm.eventlog.values import UnverifiedLog

app = typer.Typer(no_args_is_help=True, help="Event logs: what was measured, in words.")
pcr_app = typer.Typer(no_args_is_help=True, help="PCR values of a boot that has not happened yet.")
app.command("get")(get_log)

_MAX_FILE_SIZE: Final = 256 << 20
_MAX_REFERENCE_SIZE: Final = 16 << 20
_REFERENCE: Final = re.compile(rb"(?m)^[ \t{]*[\"']?(pcrs|events)[\"']?[ \t]*:")
_READ_ERROR: Final = "can't be read"


class LogFormatName(enum.StrEnum):
    """`--format`: what a log is read as when its bytes do not say so."""

    TCG = "tcg"
    CCEL = "ccel"
    IMA = "ima"
    IMA_ASCII = "ima-ascii"
    CEL_TLV = "cel-tlv"
    CEL_JSON = "cel-json"
    SYSTEMD = "systemd"


BankOption = Annotated[str, typer.Option(help="PCR bank; default: sha256 if the log has it, or else its last one.")]
FormatOption = Annotated[LogFormatName | None, typer.Option("--format", help="Default: as the log's first bytes show.")]
LogArgument = Annotated[str, typer.Argument(help="A file, - for standard input, or an instance's name.", show_default=False)]


@app.command()
def show(
    log: LogArgument,
    pcr: Annotated[str, typer.Option(help="Registers to show, such as 0-7,11.")] = "",
    events: Annotated[bool, typer.Option("--events", help="Every event; the default.")] = False,
    pcrs: Annotated[bool, typer.Option("--pcrs", help="The values that the log leads to.")] = False,
    boot: Annotated[bool, typer.Option("--boot", help="How the machine was booted, and Secure Boot.")] = False,
    bank: BankOption = "",
    kind: FormatOption = None,
    form: OutputOption = Format.TABLE,
) -> None:
    """Show an event log in words; what the log says is not proven until its PCRs are quoted."""
    from vtpm.cli import eventlog_views as views
    from vtpm.eventlog.ima import UnverifiedImaLog

    if events + pcrs + boot > 1:
        raise InvalidArgumentError("VIEW_INVALID", "give one of --events, --pcrs and --boot")
    read = _read(_load(log), kind)
    wanted = _registers(pcr)
    if isinstance(read, UnverifiedImaLog):
        if boot:
            raise InvalidArgumentError("VIEW_INVALID", "an IMA list says nothing of the boot", subject=log)
        alg = views.ima_bank(read, bank)
        made = views.ima_values(read, alg, wanted) if pcrs else views.ima_entries(read, wanted)
    else:
        alg = views.bank_of(read, bank)
        view = views.boot if boot else views.values if pcrs else views.events
        made = view(read, alg, wanted)
    _print(made, form)
    for line in views.notes(read):
        say(line)


@app.command()
def explain(
    log: LogArgument,
    against: Annotated[str, typer.Option(help="Another log, or a YAML or JSON file of reference values.", show_default=False)],
    pcr: Annotated[str, typer.Option(help="Registers to compare, such as 0-7,11; default: all.")] = "",
    bank: BankOption = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Name what a log differs in from another log or from reference values; exits with 11 if it differs."""
    from vtpm.cli import eventlog_views as views
    from vtpm.eventlog.explain import explain as compare
    from vtpm.eventlog.explain import explain_reference
    from vtpm.eventlog.reference import parse_reference

    ours = _tcg(_load(log), log)
    other = _load(against)
    value = _reference_value(other)
    alg = views.bank_of(ours, bank)
    if value is not None:
        found = explain_reference(ours, parse_reference(value), alg)
    else:
        found = compare(ours, _tcg(other, against), alg)
    wanted = _registers(pcr)
    found = tuple(item for item in found if wanted is None or item.register in wanted)
    if form is Format.TABLE:
        sys.stdout.writelines(line + "\n" for line in views.differences_text(found))
    else:
        output.emit(views.differences(found), form)
    if found:
        raise typer.Exit(exits.DIFFERENT)


@pcr_app.command()
def predict(
    uki: Annotated[Path | None, typer.Option(help="A unified kernel image.")] = None,
    kernel: Annotated[Path | None, typer.Option(help="A bare kernel.")] = None,
    initrd: Annotated[Path | None, typer.Option(help="The kernel's initrd.")] = None,
    cmdline: Annotated[str | None, typer.Option(help="The kernel's command line.")] = None,
    base: Annotated[str, typer.Option(help="The log of an earlier boot of the same machine, or an instance's name.")] = "",
    bank: Annotated[str, typer.Option(help="PCR bank.")] = "sha256",
    form: OutputOption = Format.TABLE,
) -> None:
    """Predict the PCRs of a boot from the files that will be booted."""
    from vtpm.cli import eventlog_views as views
    from vtpm.eventlog.predict import predict_kernel, predict_uki
    from vtpm.tpm.pcr import PcrBank

    if (uki is None) == (kernel is None) or (uki is not None and (initrd is not None or cmdline is not None)):
        raise InvalidArgumentError("PREDICTION_INVALID", "give --uki alone, or --kernel with its --initrd and --cmdline")
    alg = PcrBank.from_name(bank).alg_id
    earlier = _tcg(_load(base), base) if base else None
    if uki is not None:
        made = predict_uki(_file(uki), alg, earlier)
    else:
        assert kernel is not None
        made = predict_kernel(_file(kernel), _file(initrd) if initrd else None, cmdline, alg, earlier)
    _print(views.prediction(made), form)
    for assumption in made.assumptions:
        say(f"assumed: {assumption}")


def _print(made: Any, form: Format) -> None:
    if form is not Format.TABLE:
        output.emit(made.value, form)
        return
    for title, head, rows in made.tables:
        if title:
            sys.stdout.write(f"{title}\n")
        output.table(head, rows)


def _load(place: str) -> bytes:
    """Return a log by its file's name, from standard input, or of an instance; a file of that name goes before an instance."""
    if place == "-":
        return _bounded(sys.stdin.buffer.read(_MAX_FILE_SIZE + 1), place)
    path = Path(place)
    if path.exists() or "/" in place:
        return _file(path)
    from vtpm.api.v1 import tpm_pb2 as pb

    with connected() as client:
        made: pb.GetEventLogResponse = client.call(client.tpm.GetEventLog, pb.GetEventLogRequest(instance=place))
    return made.event_log


def _file(path: Path) -> bytes:
    try:
        return files.read(path, _MAX_FILE_SIZE, follow=True)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise _too_large(str(path)) from None
        raise InvalidArgumentError("FILE_UNREADABLE", f"{_READ_ERROR}: {error.strerror}", subject=str(path)) from None


def _bounded(data: bytes, place: str) -> bytes:
    if len(data) > _MAX_FILE_SIZE:
        raise _too_large(place)
    return data


def _too_large(place: str) -> InvalidArgumentError:
    return InvalidArgumentError("FILE_TOO_LARGE", "is larger than 256 MiB", subject=place)


def _read(data: bytes, kind: LogFormatName | None) -> AnyLog:
    from vtpm.eventlog.reading import read_log
    from vtpm.eventlog.values import LogFormat

    return read_log(data, LogFormat[kind.name] if kind else None)


def _tcg(data: bytes, place: str) -> UnverifiedLog:
    from vtpm.eventlog.values import UnverifiedLog

    read = _read(data, None)
    if not isinstance(read, UnverifiedLog) or not read.banks:
        raise InvalidArgumentError("EVENT_LOG_INVALID", "is no log that can be compared", subject=place)
    return read


def _reference_value(data: bytes) -> Any:
    """Return the mapping that a file of reference values is; none for a log."""
    import yaml

    if len(data) > _MAX_REFERENCE_SIZE or _REFERENCE.search(data[:65536]) is None:
        return None
    try:
        # An alias may stand for much more than its text: reference values need none.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(data.decode())):
            raise InvalidArgumentError("REFERENCE_INVALID", "the file of reference values has YAML aliases")
        value = yaml.safe_load(data)
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return None
    return value if isinstance(value, dict) and ("pcrs" in value or "events" in value) else None


def _registers(text: str) -> frozenset[int] | None:
    from vtpm.tpm.pcr import parse_selection

    return frozenset(parse_selection(f"sha256:{text}")[0].indices) if text else None

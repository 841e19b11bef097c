"""`vtpm instance …`."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Annotated, Any, Final

import typer

from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli import exits, output
from vtpm.cli.client import Client
from vtpm.cli.context import EtagOption, NameArgument, NamesArgument, OutputOption, connected, describe, say
from vtpm.cli.output import Format
from vtpm.errors import ErrorKind, InvalidArgumentError, VtpmError

app = typer.Typer(no_args_is_help=True, help="Create, run and delete instances.")

_ALGORITHMS: Final = {"rsa2048": pb.RSA_2048, "rsa3072": pb.RSA_3072, "p256": pb.ECC_P256, "p384": pb.ECC_P384}
_CREATIONS_AT_ONCE: Final = 8
_CREATE_TRIES: Final = 5
_STARTUPS: Final = {"clear": pb.STARTUP_CLEAR, "none": pb.STARTUP_NONE}

StartupOption = Annotated[
    str, typer.Option(help="clear: TPM2_Startup(CLEAR) is sent, for use without firmware; none: left to the VM's firmware.")
]
LabelOption = Annotated[list[str], typer.Option("--label", "-l", help="KEY=VALUE; may be given more than once.")]


def _choices(text: str, table: dict[str, Any], what: str) -> list[Any]:
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in table:
            raise InvalidArgumentError("PROFILE_INVALID", f"{what} must be of {', '.join(table)}", subject=name)
    return [table[name] for name in names]


def parse_labels(pairs: list[str]) -> dict[str, str]:
    """Return labels written as KEY=VALUE."""
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidArgumentError("LABELS_INVALID", "a label is KEY=VALUE", subject=pair)
        labels[key] = value
    return labels


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Name of the new instance.")] = "",
    count: Annotated[int, typer.Option(min=0, max=100_000, help="How many to create, named PREFIX1, PREFIX2, …")] = 0,
    prefix: Annotated[str, typer.Option(help="Beginning of their names.")] = "",
    label: LabelOption = [],  # noqa: B006  # Typer copies it
    ek: Annotated[str, typer.Option(help="EKs, of rsa2048, rsa3072, p256, p384. Default: rsa2048,p384")] = "",
    ak: Annotated[str, typer.Option(help="AK: p256 or rsa2048. Default: p256")] = "",
    pcr_banks: Annotated[str, typer.Option(help="Of sha1, sha256, sha384, sha512. Default: sha256,sha384")] = "",
    engine: Annotated[str, typer.Option(help="libtpms or tpm_server. Default: the daemon's")] = "",
    nv_layout: Annotated[str, typer.Option(help="Where certificates are in NV: tcg, azure or gce. Default: tcg")] = "",
    platform_model: Annotated[str, typer.Option(help="Model in the platform certificate. Default: the daemon's")] = "",
    platform_manufacturer: Annotated[str, typer.Option(help="Manufacturer there. Default: the daemon's")] = "",
    platform_version: Annotated[str, typer.Option(help="Version there. Default: the daemon's")] = "",
    start: Annotated[bool, typer.Option("--start", help="Power on at once.")] = False,
    form: OutputOption = Format.TABLE,
) -> None:
    """Create an instance, or many with --count and --prefix."""
    if bool(count) != bool(prefix) or bool(name) == bool(count):
        raise InvalidArgumentError("USAGE", "give one NAME, or --count together with --prefix")
    ak_choice = _choices(ak, {key: _ALGORITHMS[key] for key in ("p256", "rsa2048")}, "--ak")
    banks = {bank.lower(): value for bank, value in pb.PcrBank.items() if value}
    profile = pb.Profile(
        ek_algorithms=_choices(ek, _ALGORITHMS, "--ek"),
        ak_algorithm=ak_choice[0] if ak_choice else pb.KEY_ALGORITHM_UNSPECIFIED,
        pcr_banks=_choices(pcr_banks, banks, "--pcr-banks"),
    )
    layouts = {layout.lower(): value for layout, value in pb.NvLayout.items() if value}
    if chosen := _choices(nv_layout, layouts, "--nv-layout"):
        profile.nv_layout = chosen[0]
    platform = pb.Platform(manufacturer=platform_manufacturer, model=platform_model, version=platform_version)
    names = [name] if name else [f"{prefix}{number}" for number in range(1, count + 1)]
    requests = [
        pb.CreateInstanceRequest(
            name=item,
            labels=parse_labels(label),
            profile=profile,
            engine=engine,
            request_id=str(uuid.uuid4()),
            platform=platform,
        )
        for item in names
    ]
    with connected() as client:

        def one(request: pb.CreateInstanceRequest) -> pb.Instance:
            made = create_one(client, request)
            return _start(client, made.id) if start else made

        if not count:
            output.instance(one(requests[0]), form)
            return
        _create_many(requests, one)


def _start(client: Client, instance: str) -> pb.Instance:
    started: pb.Instance = client.call(client.instances.StartInstance, pb.StartInstanceRequest(instance=instance))
    return started


def create_one(client: Client, request: pb.CreateInstanceRequest) -> pb.Instance:
    """Create; a daemon that is away for a moment is asked again, safely, as the request carries its id."""
    for attempt in range(_CREATE_TRIES):
        try:
            made: pb.Instance = client.call(client.instances.CreateInstance, request)
            return made
        except VtpmError as error:
            if error.kind is not ErrorKind.UNAVAILABLE or attempt == _CREATE_TRIES - 1 or error.reason == "DAEMON_UNREACHABLE":
                raise
            time.sleep(0.2 * 2**attempt)
    raise AssertionError


def _create_many(requests: list[pb.CreateInstanceRequest], one: Callable[[pb.CreateInstanceRequest], pb.Instance]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    failures: list[tuple[str, VtpmError]] = []
    columns = (TextColumn("creating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress,
        ThreadPoolExecutor(_CREATIONS_AT_ONCE) as threads,
    ):
        task = progress.add_task("creating", total=len(requests))
        pending = {threads.submit(one, request): request.name for request in requests}
        for future in as_completed(pending):
            try:
                future.result()
            except VtpmError as error:
                failures.append((pending[future], error))
                if error.reason == "DAEMON_UNREACHABLE":
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise
            progress.advance(task)
    sys.stdout.write(f"created {len(requests) - len(failures)} of {len(requests)}\n")
    for name, failure in failures[:20]:
        say(f"{describe(failure)} [{name}]")
    if failures:
        raise SystemExit(exits.PARTIAL)


def _all(client: Client, filter_text: str) -> Iterator[pb.Instance]:
    token = ""
    while True:
        request = pb.ListInstancesRequest(page_size=1000, page_token=token, filter=filter_text)
        page: pb.ListInstancesResponse = client.call(client.instances.ListInstances, request)
        yield from page.instances
        token = page.next_page_token
        if not token:
            return


@app.command("list")
def list_instances(
    filter_text: Annotated[str, typer.Option("--filter", help="Such as: state=ON AND labels.team=web AND name:web-")] = "",
    limit: Annotated[int, typer.Option(min=0, help="At most so many; 0: all.")] = 0,
    form: OutputOption = Format.TABLE,
) -> None:
    """List instances."""
    with connected() as client:
        found = []
        for instance in _all(client, filter_text):
            found.append(instance)
            if limit and len(found) >= limit:
                break
    output.instances(found, form)


@app.command()
def show(name: NameArgument, form: OutputOption = Format.TABLE) -> None:
    """Show one instance."""
    with connected() as client:
        output.instance(client.call(client.instances.GetInstance, pb.GetInstanceRequest(instance=name)), form)


def _each(names: list[str], call: Callable[[Client, str], pb.Instance | None], form: Format) -> None:
    """Do it for each; one that fails does not keep the others from it."""
    results: list[pb.Instance] = []
    failures: list[VtpmError] = []
    with connected() as client:
        for name in names:
            try:
                if (result := call(client, name)) is not None:
                    results.append(result)
            except VtpmError as error:
                if len(names) == 1 or error.reason == "DAEMON_UNREACHABLE":
                    raise
                failures.append(error)
    if len(names) == 1 and results:
        output.instance(results[0], form)
    elif results:
        output.instances(results, form)
    for failure in failures:
        say(describe(failure))
    if failures:
        raise SystemExit(exits.PARTIAL)


def _startup(text: str) -> pb.Startup.ValueType:
    chosen = _choices(text, _STARTUPS, "--startup")
    return chosen[0] if chosen else pb.STARTUP_CLEAR


@app.command()
def start(
    names: NamesArgument, startup: StartupOption = "clear", etag: EtagOption = "", form: OutputOption = Format.TABLE
) -> None:
    """Power on."""
    mode = _startup(startup)
    _each(
        names,
        lambda client, name: client.call(
            client.instances.StartInstance, pb.StartInstanceRequest(instance=name, startup=mode, etag=etag)
        ),
        form,
    )


@app.command()
def stop(
    names: Annotated[list[str], typer.Argument(help="Names or ids.", show_default=False)] = [],  # noqa: B006  # Typer copies it
    everything: Annotated[bool, typer.Option("--all", help="Every instance that is ON.")] = False,
    etag: EtagOption = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Power off; PCRs, sessions and what else is volatile is dropped."""
    if bool(names) == everything:
        raise InvalidArgumentError("USAGE", "name instances, or give --all")
    if everything:
        with connected() as client:
            names = [instance.name for instance in _all(client, "state=ON")]
    _each(
        names,
        lambda client, name: client.call(client.instances.StopInstance, pb.StopInstanceRequest(instance=name, etag=etag)),
        form,
    )


@app.command()
def reset(
    names: NamesArgument, startup: StartupOption = "clear", etag: EtagOption = "", form: OutputOption = Format.TABLE
) -> None:
    """_TPM_Init, as at a reset of the VM; also brings a FAILED instance back."""
    mode = _startup(startup)
    _each(
        names,
        lambda client, name: client.call(
            client.instances.ResetInstance, pb.ResetInstanceRequest(instance=name, startup=mode, etag=etag)
        ),
        form,
    )


@app.command()
def hibernate(names: NamesArgument, form: OutputOption = Format.TABLE) -> None:
    """Put an instance that is ON into the store now, PCRs, sessions and all; the next command wakes it."""
    _each(
        names,
        lambda client, name: client.call(client.instances.HibernateInstance, pb.HibernateInstanceRequest(instance=name)),
        form,
    )


@app.command()
def delete(
    names: NamesArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    etag: EtagOption = "",
) -> None:
    """Delete for good: without its data key the sealed state can't be opened by anybody."""
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidArgumentError("CONFIRMATION_NEEDED", "deletion can't be undone", remedy="give --yes")
        typer.confirm(f"Delete {', '.join(names)} for good?", abort=True)

    def one(client: Client, name: str) -> None:
        client.call(client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=name, etag=etag))

    _each(names, one, Format.TABLE)


@app.command()
def label(
    name: NameArgument,
    changes: Annotated[list[str], typer.Argument(help="KEY=VALUE to set, KEY- to remove.", show_default=False)],
    etag: EtagOption = "",
    form: OutputOption = Format.TABLE,
) -> None:
    """Set or remove labels."""
    request = pb.UpdateInstanceRequest(instance=name, etag=etag)
    for change in changes:
        key, equals, value = change.partition("=")
        if equals:
            request.labels[key] = value
        elif change.endswith("-"):
            key = change[:-1]
        else:
            raise InvalidArgumentError("LABELS_INVALID", "a change is KEY=VALUE or KEY-", subject=change)
        request.update_mask.paths.append(f"labels.{key}")
    with connected() as client:
        output.instance(client.call(client.instances.UpdateInstance, request), form)


@app.command()
def watch(
    filter_text: Annotated[str, typer.Option("--filter", help="As in list.")] = "", form: OutputOption = Format.TABLE
) -> None:
    """Print what exists and then every change, until interrupted."""
    with connected() as client, client.errors():
        for event in client.instances.WatchInstances(pb.WatchInstancesRequest(filter=filter_text)):
            kind = pb.InstanceEvent.Type.Name(event.type)
            if form is Format.TABLE:
                about = f"{pb.State.Name(event.instance.state):<6}  {event.instance.name}" if event.HasField("instance") else ""
                sys.stdout.write(f"{kind:<8}  {about}".rstrip() + "\n")
                sys.stdout.flush()
            else:
                value = {"type": kind, "instance": output.instance_dict(event.instance) if event.HasField("instance") else None}
                output.emit(value, form)
            sys.stdout.flush()

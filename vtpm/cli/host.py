"""`vtpm host …`: what runs here, and maintenance."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import typer

from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli import exits, output
from vtpm.cli.context import OutputOption, connected, say
from vtpm.cli.output import Format

app = typer.Typer(no_args_is_help=True, help="The daemon and its host.")

_BAR: Final = 30


def _read() -> pb.Host:
    with connected() as client:
        host: pb.Host = client.call(client.host.GetHost, pb.GetHostRequest())
    return host


@app.command()
def show(form: OutputOption = Format.TABLE) -> None:
    """Show what runs here."""
    host = _read()
    value: dict[str, Any] = {
        "version": host.version,
        "start_time": host.start_time.ToJsonString(),
        "instances": dict(host.instances),
        "awake": host.awake,
        "hibernated": host.hibernated,
        "drained": host.drained,
        "engines": [
            {"name": item.name, "version": item.version, "available": item.available, "hibernation": item.hibernation}
            for item in host.engines
        ],
        "key_provider": host.key_provider,
        "key_id": host.key_id,
        "state_dir": host.state_dir,
        "runtime_dir": host.runtime_dir,
        "engine_host_pid": host.engine_host_pid,
    }
    if form is Format.TABLE:
        value["instances"] = ", ".join(f"{state} {count}" for state, count in host.instances.items())
        value["engines"] = ", ".join(f"{item.name} {item.version}".strip() for item in host.engines if item.available)
    output.result(value, form)


@app.command()
def status(form: OutputOption = Format.TABLE) -> None:
    """Show how many of the instances that are ON hibernate, and whether the host is drained."""
    host = _read()
    if form is not Format.TABLE:
        output.result({"awake": host.awake, "hibernated": host.hibernated, "drained": host.drained}, form)
        return
    on = host.awake + host.hibernated
    mode = "drained: no instance starts or wakes (vtpm host resume)" if host.drained else "in service"
    sys.stdout.write(f"{_bar(host.hibernated, on)} hibernated, {host.awake} awake; {mode}\n")


def _bar(done: int, total: int) -> str:
    full = _BAR * done // total if total else _BAR
    return f"[{'#' * full}{'.' * (_BAR - full)}] {done}/{total}"


@app.command()
def drain(
    timeout: Annotated[int, typer.Option(min=1, max=3600, help="Seconds to wait for instances that are busy.")] = 60,
) -> None:
    """Before maintenance: put every instance that is ON into the store, and let none start or wake until `resume`.

    VMs run on, and wait at their next TPM command. A daemon that is started anew is in service.
    """
    last = pb.DrainProgress()
    shown = False
    with connected() as client, client.errors():
        for last in client.host.DrainHost(pb.DrainHostRequest(timeout_s=timeout)):
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{_bar(last.hibernated, last.total)} ")
                sys.stderr.flush()
                shown = True
    if shown:
        sys.stderr.write("\n")
    sys.stdout.write(f"{last.hibernated} of {last.total} instances that were awake hibernate now\n")
    for failure in last.failures:
        say(f"vtpm: {failure.reason}: {failure.instance}: {failure.message}")
    if last.failures:
        raise SystemExit(exits.PARTIAL)


@app.command()
def resume() -> None:
    """Let instances start and wake again after `drain`."""
    with connected() as client:
        client.call(client.host.ResumeHost, pb.ResumeHostRequest())
    say("the host is in service")

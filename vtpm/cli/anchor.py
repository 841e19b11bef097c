"""`vtpm host anchor`, `vtpm host reset-anchor`, `vtpm instance accept-rollback`: rollback protection."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from vtpm.api.v1 import durability_pb2 as pb
from vtpm.cli import output
from vtpm.cli.context import NameArgument, OutputOption, connected, say
from vtpm.cli.output import Format
from vtpm.errors import InvalidArgumentError


def register(instance_app: typer.Typer, host_app: typer.Typer) -> None:
    """Add these commands."""
    instance_app.command("accept-rollback")(accept_rollback)
    host_app.command("anchor")(show_anchor)
    host_app.command("reset-anchor")(reset_anchor)


def show_anchor(form: OutputOption = Format.TABLE) -> None:
    """Show how rollback protection stands, and which instances are refused."""
    with connected() as client:
        _print(client.call(client.durability.GetAnchor, pb.GetAnchorRequest()), form)


def reset_anchor(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False, form: OutputOption = Format.TABLE
) -> None:
    """Trust the store as it is now, whatever the anchor says, and begin a new anchor."""
    _confirm(yes, "Trust every state in the store as it is now?", "what was rolled back is taken for fresh")
    with connected() as client:
        _print(client.call(client.durability.ResetAnchor, pb.ResetAnchorRequest()), form)


def accept_rollback(name: NameArgument, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Go on with an instance's state although a newer one was known; of one that is missing give the id."""
    _confirm(yes, f"Go on with the older state of {name}?", "NV counters and what was revoked go back")
    with connected() as client:
        client.call(client.durability.AcceptRollback, pb.AcceptRollbackRequest(instance=name))
    say(f"{name}: accepted as it is")


def _confirm(yes: bool, question: str, why: str) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise InvalidArgumentError("CONFIRMATION_NEEDED", why, remedy="give --yes")
    typer.confirm(question, abort=True)


def _numbers(finding: pb.Finding, which: str) -> dict[str, int] | None:
    if not finding.HasField(which):  # type: ignore[arg-type]  # one of the two names of a field
        return None
    numbers: pb.StateNumbers = getattr(finding, which)
    return {"owner_epoch": numbers.owner_epoch, "epoch": numbers.epoch, "version": numbers.version}


def _print(anchor: pb.Anchor, form: Format) -> None:
    value: dict[str, Any] = {
        "kind": anchor.kind,
        "subject": anchor.subject,
        "update": anchor.update,
        "time": anchor.time.ToJsonString() if anchor.HasField("time") else None,
        "states": anchor.states,
        "trouble": f"{anchor.trouble_reason}: {anchor.trouble}" if anchor.trouble_reason else None,
        "remedy": anchor.remedy or None,
        "findings": [
            {
                "instance": finding.instance,
                "reason": finding.reason,
                "stored": _numbers(finding, "stored"),
                "anchored": _numbers(finding, "anchored"),
            }
            for finding in anchor.findings
        ],
    }
    if form is not Format.TABLE:
        output.emit(value, form)
        return
    findings = value.pop("findings")
    output.mapping({name: item for name, item in value.items() if item is not None})
    if findings:
        rows = [(item["instance"], item["reason"], _short(item["stored"]), _short(item["anchored"])) for item in findings]
        output.table(("INSTANCE", "REASON", "STORED", "ANCHORED"), rows)


def _short(numbers: dict[str, int] | None) -> str:
    return "-" if numbers is None else f"version {numbers['version']} of epoch {numbers['epoch']}"

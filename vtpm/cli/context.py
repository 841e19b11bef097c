"""What every subcommand shares: where the daemon is, and how to end with an error in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from vtpm.cli import exits
from vtpm.cli.client import Client
from vtpm.cli.output import Format
from vtpm.errors import VtpmError

OutputOption = Annotated[Format, typer.Option("--output", "-o", help="How to print.")]
EtagOption = Annotated[str, typer.Option(help="Do it only if the instance still has this etag.")]
NamesArgument = Annotated[list[str], typer.Argument(help="Names or ids.", show_default=False)]
NameArgument = Annotated[str, typer.Argument(help="Name or id.", show_default=False)]


class Place:
    """Where the daemon is looked for; set by the top-level options."""

    state_dir: Path | None = None
    runtime_dir: Path | None = None
    address: str = ""


def cli_settings() -> dict[str, object]:
    """The directories given on the command line, as vtpm.config.Settings.load takes them."""
    given = {"state_dir": Place.state_dir, "runtime_dir": Place.runtime_dir}
    return {name: value for name, value in given.items() if value is not None}


@contextlib.contextmanager
def connected() -> Iterator[Client]:
    """A client for the daemon."""
    from urllib.parse import quote

    from vtpm.config import Settings

    address = Place.address or f"unix:{quote(str(Settings.load(cli_settings()).operator_socket))}"
    client = Client(address)
    try:
        yield client
    finally:
        client.close()


def say(text: str) -> None:
    """Tell the user something beside the result, on standard error."""
    sys.stderr.write(text + "\n")


def describe(error: VtpmError) -> str:
    """Return the one line of an error: reason, what, and the way out."""
    return f"vtpm: {error.reason}: {' '.join(str(error).split())}"


def fail(error: VtpmError) -> NoReturn:
    """Say the error in one line and exit with its code."""
    say(describe(error))
    raise SystemExit(exits.BY_KIND[error.kind])

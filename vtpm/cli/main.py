"""The `vtpm` command."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vtpm import __version__
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli import ak, anchor, backup, ca, certificates, eventlog, exchange, exits, host, instances, output, tpm
from vtpm.cli.context import OutputOption, Place, cli_settings, connected, fail, say
from vtpm.cli.output import Format
from vtpm.errors import VtpmError

_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in exits.MEANINGS) + "."

app = typer.Typer(no_args_is_help=True, epilog=_EPILOG, pretty_exceptions_enable=False, help="A TPM 2.0 for every VM.")
key_app = typer.Typer(no_args_is_help=True, help="The key-encryption key.")
config_app = typer.Typer(no_args_is_help=True, help="The configuration.")
exchange.register(instances.app)
anchor.register(instances.app, host.app)
certificates.register(instances.app)
app.add_typer(instances.app, name="instance")
app.add_typer(ca.app, name="ca")
app.add_typer(key_app, name="key")
app.add_typer(ak.app, name="ak")
app.add_typer(host.app, name="host")
app.add_typer(config_app, name="config")
app.add_typer(backup.app, name="backup")
app.add_typer(eventlog.app, name="eventlog")
app.add_typer(eventlog.pcr_app, name="pcr")
tpm.register(app)

# Typer's errors of usage come from click, which recent versions carry inside.
_ClickError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

ConfigFileOption = Annotated[Path | None, typer.Option("--config-file", help="The TOML file; default: as the daemon.")]


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"vtpm {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    state_dir: Annotated[Path | None, typer.Option(readable=False, help="As the daemon's; or VTPM_STATE_DIR.")] = None,
    runtime_dir: Annotated[Path | None, typer.Option(readable=False, help="As the daemon's; or VTPM_RUNTIME_DIR.")] = None,
    address: Annotated[str, typer.Option(help="gRPC target to use instead of the runtime directory's socket.")] = "",
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """A TPM 2.0 for every VM."""
    Place.state_dir, Place.runtime_dir, Place.address = state_dir, runtime_dir, address


@key_app.command()
def rotate(form: OutputOption = Format.TABLE) -> None:
    """Make a new key-encryption key and wrap every data key with it; sealed states are not touched."""
    with connected() as client:
        made: pb.RotateKeyResponse = client.call(client.host.RotateKey, pb.RotateKeyRequest())
    output.result({"key_id": made.key_id, "rewrapped": made.rewrapped}, form)


@config_app.command()
def check(config_file: ConfigFileOption = None) -> None:
    """Check the configuration as the daemon would read it."""
    settings = _settings(config_file)
    say(f"the configuration is fine: state in {settings.state_dir}, sockets in {settings.runtime_dir}")


@config_app.command("show")
def show_config(config_file: ConfigFileOption = None, form: OutputOption = Format.TABLE) -> None:
    """Show every setting in force."""
    output.result(_settings(config_file).model_dump(mode="json"), form)


def _settings(config_file: Path | None):  # type: ignore[no-untyped-def]  # imported late: pydantic costs start-up time
    from vtpm.config import Settings

    given = cli_settings()
    if config_file is not None:
        given["config_file"] = config_file
    return Settings.load(given)


def main() -> None:
    """Run the command; every error ends in one line and an exit code."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        sys.exit(app(standalone_mode=False) or exits.OK)
    except VtpmError as error:
        fail(error)
    except _ClickError as error:
        say(f"vtpm: USAGE: {getattr(error, 'format_message', error.__str__)()}")
        sys.exit(exits.USAGE)
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        sys.exit(exits.INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(exits.OK)

"""`vtpm backup …`: the store, encrypted to age recipients, and back.

These commands read and write the store's files themselves, so they are for the host's root and the daemon's user; a daemon may
run or not. Only `restore --instance` goes through the daemon.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vtpm import files
from vtpm.api.v1 import durability_pb2 as pb
from vtpm.cli import output
from vtpm.cli.context import OutputOption, cli_settings, connected, say
from vtpm.cli.output import Format
from vtpm.errors import FailedPreconditionError, InvalidArgumentError, KeyProviderError, VtpmError

if TYPE_CHECKING:
    from vtpm.config import Settings
    from vtpm.store.backup import OpenedBackup
    from vtpm.store.backup_file import Manifest
    from vtpm.store.store import Store

app = typer.Typer(no_args_is_help=True, help="Back up the store, check backups, restore them.")

_MAX_TEXT_FILE: Final = 1 << 20
_PROVIDER_WITH_FILE: Final = "file"

FileArgument = Annotated[Path, typer.Argument(help="The backup.", show_default=False)]
RecipientOption = Annotated[
    list[str], typer.Option("--recipient", "-r", help="age1… or an SSH public key; may be given more than once.")
]
IdentityOption = Annotated[
    Path,
    typer.Option(
        "--identity-file", "-i", help="age identity, as of age-keygen, or an SSH key; - for standard input.", show_default=False
    ),
]
ConfigFileOption = Annotated[Path | None, typer.Option("--config-file", help="The TOML file; default: as the daemon.")]


@app.command()
def create(
    file: Annotated[Path, typer.Argument(help="The backup to write; must not exist.", show_default=False)],
    recipient: RecipientOption = [],  # noqa: B006  # Typer copies it
    recipients_file: Annotated[Path | None, typer.Option("--recipients-file", "-R", help="The same, a line each.")] = None,
    include_keys: Annotated[
        bool, typer.Option("--include-keys", help="With the key file: who opens it has every TPM.")
    ] = False,
    config_file: ConfigFileOption = None,
    form: OutputOption = Format.TABLE,
) -> None:
    """Back up the store while the daemon runs, or not."""
    from vtpm.daemon import check_place
    from vtpm.store import backup, backup_file

    settings = _settings(config_file)
    recipients = backup_file.recipients_of([*recipient, *(_lines(recipients_file) if recipients_file else ())])
    store = _store_path(settings)
    check_place(store, service=True)
    if not store.exists():
        raise FailedPreconditionError(
            "STORE_MISSING", "there is no store here", subject=str(store), remedy="name its directory with --state-dir"
        )
    keys = _read(_key_file(settings), backup_file.MAX_KEYS_SIZE) if include_keys else None
    manifest = backup.create(store, file.absolute(), recipients, keys)
    _print(manifest, form)
    if keys is None:
        say("the key file is not in it: keep that too, apart from this backup, as it is now")


@app.command()
def verify(file: FileArgument, identity_file: IdentityOption, form: OutputOption = Format.TABLE) -> None:
    """Decrypt a backup, check that it is whole, and say what is in it."""
    from vtpm.store import backup

    with backup.opened(file, _identities(identity_file)) as opened:
        _print(opened.manifest, form)


@app.command()
def restore(
    file: FileArgument,
    identity_file: IdentityOption,
    instance: Annotated[str, typer.Option(help="One instance alone, into the daemon that runs; name or id.")] = "",
    name: Annotated[str, typer.Option(help="With --instance: another name for it.")] = "",
    config_file: ConfigFileOption = None,
    form: OutputOption = Format.TABLE,
) -> None:
    """Make a store of a backup, in a state directory without one; or put one instance back."""
    if name and not instance:
        raise InvalidArgumentError("USAGE", "--name goes with --instance")
    identities = _identities(identity_file)
    if instance:
        _restore_instance(file, identities, instance, name)
    else:
        _restore_store(file, identities, _settings(config_file), form)


# ---- the whole store -----------------------------------------------------------------------------------------------------


def _restore_store(file: Path, identities: list[Any], settings: Settings, form: Format) -> None:
    from vtpm.daemon import owned_directory
    from vtpm.store import backup

    with owned_directory(settings.state_dir):
        store = _store_path(settings)
        for leftover in (store, Path(f"{store}-wal"), Path(f"{store}-journal")):
            if os.path.lexists(leftover):
                raise backup.not_empty(leftover)
        with backup.opened(file, identities, store.parent) as opened:
            written = _put_key_file(opened, settings)
            try:
                made = backup.make_store(opened, lambda store: _check_keys(store, settings))
                backup.install(made, store)
            except BaseException:
                if written is not None:
                    written.unlink()
                raise
            _print(opened.manifest, form)
    say(f"restored to {store}; every instance is OFF, and as old as the backup. Never run the store that it was made of again")
    if settings.anchor != "none":
        say("if there is an anchor of another store in this one's place, the daemon says so; then: vtpm host reset-anchor")


def _put_key_file(opened: OpenedBackup, settings: Settings) -> Path | None:
    """Write the key file that is in the backup, where there is none; return it if it was written."""
    if opened.keys is None or settings.key_provider != _PROVIDER_WITH_FILE:
        return None
    path = _key_file(settings)
    if os.path.lexists(path):
        say(f"{path} is there already and is left as it is")
        return None
    try:
        files.replace(path, opened.keys, trusted=True, replaces=False)
    except OSError as error:
        raise KeyProviderError(
            "KEY_FILE_UNUSABLE", f"the key file can't be written: {error.strerror}", subject=str(path)
        ) from None
    return path


def _check_keys(opened: Store, settings: Settings) -> None:
    """Refuse a store whose data keys can't be unwrapped here: one of each key-encryption key is tried. Then open its rows: the
    operator puts them there."""
    import uuid

    from vtpm.seal.keys import load_key_provider
    from vtpm.store.row_key import open_row_key

    try:
        provider = load_key_provider(
            settings.key_provider, state_dir=settings.state_dir, options=settings.key_provider_options, create=False
        )
        tried: set[tuple[str, str]] = set()
        after: uuid.UUID | None = None
        while page := opened.wrapped_keys(after, 500):
            after = page[-1][0]
            for instance, wrapped in page:
                if (wrapped.provider, wrapped.key_id) not in tried:
                    provider.unwrap(wrapped, instance)
                    tried.add((wrapped.provider, wrapped.key_id))
        open_row_key(opened, provider, restored=True)
    except KeyProviderError as error:
        raise KeyProviderError(
            error.reason,
            f"nothing was restored, as the keys of the backup can't be had here: {error.message}",
            subject=error.subject,
            remedy=error.remedy,
        ) from None


# ---- one instance --------------------------------------------------------------------------------------------------------


def _restore_instance(file: Path, identities: list[Any], ref: str, name: str) -> None:
    import sqlite3
    from contextlib import closing

    from vtpm.store import backup
    from vtpm.store.restore import find

    with backup.opened(file, identities) as opened, closing(sqlite3.connect(backup.make_store(opened))) as connection:
        item = find(connection, ref, str(file))
    request = pb.RestoreInstanceRequest(
        instance=str(item.id),
        name=name or item.name,
        labels=item.labels,
        profile=item.profile,
        keys=item.keys,
        engine=item.engine,
        owner_epoch=item.owner_epoch,
        key_provider=item.wrapped_key.provider,
        key_id=item.wrapped_key.key_id,
        wrapped_key=item.wrapped_key.blob,
        epoch=item.state.epoch,
        version=item.state.version,
        sealed=item.state.blob,
    )
    with connected() as client:
        restored: pb.RestoreInstanceResponse = client.call(client.durability.RestoreInstance, request)
    say(f"{restored.name} is restored and OFF, with its state of version {item.state.version}")


# ---- what all share ------------------------------------------------------------------------------------------------------


def _settings(config_file: Path | None) -> Settings:
    from vtpm.config import Settings

    given = cli_settings()
    if config_file is not None:
        given["config_file"] = config_file
    return Settings.load(given)


def _store_path(settings: Settings) -> Path:
    from sqlalchemy import make_url

    return Path(make_url(settings.store_url).database or "")


def _key_file(settings: Settings) -> Path:
    if settings.key_provider != _PROVIDER_WITH_FILE:
        raise InvalidArgumentError(
            "KEYS_NOT_IN_A_FILE",
            f"the key provider {settings.key_provider} has no key file",
            subject="--include-keys",
            remedy="back its keys up as that provider's documentation says",
        )
    return Path(settings.key_provider_options.get("path", "") or settings.state_dir / "keys.json")


def _read(path: Path, limit: int) -> bytes:
    try:
        return files.read(path, limit, follow=True)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise InvalidArgumentError("FILE_TOO_LARGE", f"the file has more than {limit} bytes", subject=str(path)) from None
        raise VtpmError("FILE_UNREADABLE", f"the file can't be read: {error.strerror}", subject=str(path)) from None


def _lines(path: Path) -> list[str]:
    text = _read(path, _MAX_TEXT_FILE).decode(errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _identities(path: Path) -> list[Any]:
    from vtpm.store.backup_file import identities_of

    if str(path) == "-":
        return identities_of(sys.stdin.buffer.read(_MAX_TEXT_FILE), "standard input")
    return identities_of(_read(path, _MAX_TEXT_FILE), str(path))


def _print(manifest: Manifest, form: Format) -> None:
    value: dict[str, Any] = {
        "created": manifest.created,
        "version": manifest.version,
        "schema": manifest.schema,
        "instances": manifest.instances,
        "states": manifest.states,
        "size": manifest.store.size,
        "key_ids": list(manifest.key_ids),
        "includes_keys": manifest.keys is not None,
    }
    if form is Format.TABLE:
        value["key_ids"] = ", ".join(manifest.key_ids)
        output.mapping(value)
    else:
        output.emit(value, form)

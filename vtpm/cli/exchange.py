"""`vtpm instance import` and `export`: a TPM's permanent state from and to the files of swtpm.

The state goes between this process and the instance's own worker, over the instance's control socket; the daemon never
sees it (invariant 4).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Annotated, Final

import typer

from vtpm.api.v1 import instance_pb2 as pb
from vtpm.cli import output
from vtpm.cli.client import Client
from vtpm.cli.context import NameArgument, OutputOption, connected, describe, say
from vtpm.cli.instances import LabelOption, create_one, parse_labels
from vtpm.cli.output import Format
from vtpm.cli.swtpm_files import KeySource, locked, prepare, read_state, state_directory, write_state
from vtpm.errors import FailedPreconditionError, SealedStateError, UnavailableError, VtpmError
from vtpm.tpm.ptm import BlobType, Result, migration_blob
from vtpm.wire import swtpm_state
from vtpm.wire.control_client import ControlClient, ControlCommandError
from vtpm.wire.swtpm_keys import Kdf, KeyFormat, KeyMode
from vtpm.wire.swtpm_state import PERMANENT, VOLATILE

_ENGINE: Final = "libtpms"
_OFF_TIMEOUT_S: Final = 10.0
_OFF_POLL_S: Final = 0.05

KeyFileOption = Annotated[Path | None, typer.Option(help="The key, as swtpm's --key file=…; /dev/fd/3 for one in no file.")]
KeyFormatOption = Annotated[KeyFormat, typer.Option(help="As swtpm's format=.")]
PasswordFileOption = Annotated[Path | None, typer.Option(help="A password, as swtpm's --key pwdfile=….")]
KdfOption = Annotated[Kdf, typer.Option(help="As swtpm's kdf=.")]


def register(app: typer.Typer) -> None:
    """Add these commands to `vtpm instance`."""
    app.command("import")(import_instance)
    app.command("export")(export_instance)


def import_instance(
    name: Annotated[str, typer.Argument(help="Name of the new instance.", show_default=False)],
    from_swtpm: Annotated[Path, typer.Option(help="swtpm's state directory, or libvirt's above it.", show_default=False)],
    key_file: KeyFileOption = None,
    key_format: KeyFormatOption = KeyFormat.HEX,
    password_file: PasswordFileOption = None,
    kdf: KdfOption = Kdf.PBKDF2,
    mode: Annotated[KeyMode | None, typer.Option(help="As swtpm's mode=. Default: as the state says")] = None,
    drop_volatile: Annotated[bool, typer.Option("--drop-volatile", help="Import although the VM was suspended.")] = False,
    label: LabelOption = [],  # noqa: B006  # Typer copies it
    form: OutputOption = Format.TABLE,
) -> None:
    """Create an instance from swtpm's state; the VM must be shut down."""
    _forbid_dumps()
    labels = parse_labels(label)
    directory = state_directory(from_swtpm)
    # Locked to the end, so that no swtpm starts with the same TPM meanwhile.
    with locked(directory):
        if os.path.lexists(directory / VOLATILE) and not drop_volatile:
            raise FailedPreconditionError(
                "VOLATILE_STATE_PRESENT",
                "the VM was suspended; its TPM's volatile state (PCRs, sessions) can't be imported",
                subject=str(directory / VOLATILE),
                remedy="resume the VM and shut it down; or give --drop-volatile, after which it can only be booted afresh",
            )
        payload = read_state(directory / PERMANENT, KeySource(key_file, key_format, password_file, kdf), mode)
        with connected() as client:
            imported = import_state(client, name, labels, payload)
    output.instance(imported, form)
    say(f"{directory} is still a working copy of this TPM: destroy it, and its backups")


def export_instance(
    name: NameArgument,
    to_swtpm: Annotated[Path, typer.Option(help="swtpm's state directory; made if missing.", show_default=False)],
    key_file: KeyFileOption = None,
    key_format: KeyFormatOption = KeyFormat.HEX,
    password_file: PasswordFileOption = None,
    kdf: KdfOption = Kdf.PBKDF2,
    mode: Annotated[KeyMode, typer.Option(help="As swtpm's mode=.")] = KeyMode.AES_256_CBC,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the state that is there.")] = False,
) -> None:
    """Write an instance's TPM as swtpm's state; the instance must be OFF, and is kept."""
    _forbid_dumps()
    key = KeySource(key_file, key_format, password_file, kdf).read(mode)
    with connected() as client:
        found: pb.Instance = client.call(client.instances.GetInstance, pb.GetInstanceRequest(instance=name))
        _check_exportable(found)
        directory = prepare(to_swtpm, force=force)
        with locked(directory):
            write_state(directory, swtpm_state.build(take_state(found.control_socket), key), force=force)
        _wait_until_off(client, found.id)
    say(f"wrote {directory / PERMANENT}, {f'encrypted with {mode.value}' if key else 'NOT encrypted'}")
    say(f"this TPM exists twice now: before the copy is used, vtpm instance delete {found.name}")


def _forbid_dumps() -> None:
    from vtpm.engine.sandbox import forbid_dumps

    forbid_dumps()


# ---- the instance --------------------------------------------------------------------------------------------------------


def import_state(client: Client, name: str, labels: dict[str, str], payload: bytes) -> pb.Instance:
    """Create an instance and give it the state; if that fails, no instance is left."""
    # The cheapest keys, as the state brings its own.
    profile = pb.Profile(ek_algorithms=[pb.ECC_P256])
    request = pb.CreateInstanceRequest(name=name, labels=labels, profile=profile, engine=_ENGINE, request_id=str(uuid.uuid4()))
    # Ended by a signal, it cleans up too.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    made: pb.Instance | None = None
    try:
        made = create_one(client, request)
        put_state(made.control_socket, payload)
        _wait_until_off(client, made.id)
        # Powered on once, it gets the service's AK.
        client.call(client.instances.StartInstance, pb.StartInstanceRequest(instance=made.id, startup=pb.STARTUP_CLEAR))
        return _power_off(client, made.id)
    except BaseException as error:
        if made is None and not isinstance(error, VtpmError):
            # Interrupted before the answer: the same request gives what it made.
            with contextlib.suppress(VtpmError):
                made = create_one(client, request)
        if made is not None:
            _remove(client, made.id)
        raise


def _check_exportable(found: pb.Instance) -> None:
    if found.state != pb.OFF:
        raise FailedPreconditionError(
            "INSTANCE_NOT_OFF",
            f"the instance is {pb.State.Name(found.state)}",
            subject=found.name,
            remedy=f"shut its VM down, then: vtpm instance stop {found.name}",
        )
    if found.engine != _ENGINE:
        raise FailedPreconditionError(
            "ENGINE_NOT_EXPORTABLE",
            f"swtpm does not know the state of the engine {found.engine}",
            subject=found.name,
            remedy=f"only instances of the engine {_ENGINE} can be exported",
        )


def _wait_until_off(client: Client, instance: str) -> None:
    """Wait for the end of the power off that SHUTDOWN began; not StopInstance, which would hit a VM that just began."""
    deadline = time.monotonic() + _OFF_TIMEOUT_S
    while True:
        found: pb.Instance = client.call(client.instances.GetInstance, pb.GetInstanceRequest(instance=instance))
        if found.state != pb.ON:
            return
        if time.monotonic() > deadline:
            raise UnavailableError(
                "INSTANCE_STILL_ON", "the instance does not go off", subject=found.name, remedy="see the daemon's log"
            )
        time.sleep(_OFF_POLL_S)


def _power_off(client: Client, instance: str) -> pb.Instance:
    """Power off an instance that nobody else knows yet."""
    off: pb.Instance = client.call(client.instances.StopInstance, pb.StopInstanceRequest(instance=instance))
    return off


def _remove(client: Client, instance: str) -> None:
    """Delete what an import that failed had made."""
    deadline = time.monotonic() + _OFF_TIMEOUT_S
    while True:
        try:
            _power_off(client, instance)
            client.call(client.instances.DeleteInstance, pb.DeleteInstanceRequest(instance=instance, allow_missing=True))
            return
        except VtpmError as error:
            # The end of our control connection powers it off too, and may come in between.
            if time.monotonic() > deadline:
                say(f"{describe(error)}; left behind: remove it with vtpm instance delete --yes {instance}")
                return
        time.sleep(_OFF_POLL_S)


def put_state(control_socket: str | Path, payload: bytes) -> None:
    """Replace the permanent state of the TPM behind a control socket, let the TPM check it, and power it off.

    Raises:
        SealedStateError: SWTPM_STATE_REFUSED.
    """
    with ControlClient(control_socket) as control:
        control.stop()
        try:
            control.set_state_blob(BlobType.PERMANENT, migration_blob(payload))
            control.init()
        except ControlCommandError as error:
            raise SealedStateError(
                "SWTPM_STATE_REFUSED",
                f"the TPM does not take this state (TPM_RESULT 0x{error.result:x})",
                subject=str(control_socket),
                remedy="it is damaged, or of a libtpms newer than the one here: take it from a backup, or upgrade libtpms",
            ) from None
        control.shutdown()


def take_state(control_socket: str | Path) -> bytes:
    """Return the permanent state of the TPM behind a control socket, and power it off."""
    with ControlClient(control_socket) as control:
        try:
            blob = _permanent_blob(control)
        except VtpmError:
            # What the connection powered on goes off again; the first error is the one to tell.
            with contextlib.suppress(VtpmError):
                control.shutdown()
            raise
        control.shutdown()
    payload = swtpm_state.payload_of(blob or b"", subject=str(control_socket))
    swtpm_state.check_permanent(payload, subject=str(control_socket))
    return payload


def _permanent_blob(control: ControlClient) -> bytes | None:
    try:
        return control.get_state_blob(BlobType.PERMANENT)
    except ControlCommandError as error:
        if error.result != Result.BAD_ORDINAL:
            raise
    # swtpm itself gives state only of a TPM that is initialised.
    control.init()
    return control.get_state_blob(BlobType.PERMANENT)

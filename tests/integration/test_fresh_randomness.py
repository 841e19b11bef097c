"""No randomness twice: a TPM that goes on from one volatile state again and again gives other random numbers each time.

Each test is one way in which a state can be loaded twice; tests/unit/engine/test_randomness.py has what all of them share.
"""

from __future__ import annotations

import os
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.integration.test_dropin import OURS, READY, VOLATILE, running
from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess
from tests.support.vmm import Vmm
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.tpm.codes import CommandCode
from vtpm.tpm.command import HEADER_SIZE, build

LOADS = 20
CLONES = 2
NULL = 0x40000007


def random_numbers(ask: Callable[[bytes], bytes]) -> list[bytes]:
    """What a TPM gives next: random bytes, a nonceTPM, an ephemeral key."""
    session = struct.pack(">IIH", NULL, NULL, 16) + bytes(16) + struct.pack(">HBHH", 0, 0, 0x10, 0x0B)
    stream = ask(raw.get_random(32))
    started = ask(build(CommandCode.StartAuthSession, session))
    key = ask(build(CommandCode.EC_Ephemeral, struct.pack(">H", 3)))
    assert [raw.rc_of(answer) for answer in (stream, started, key)] == [0, 0, 0]
    return [stream[HEADER_SIZE:], started[HEADER_SIZE + 4 :], key[HEADER_SIZE:]]


def all_differ(made: list[list[bytes]]) -> None:
    for what in zip(*made, strict=True):
        assert len(set(what)) == len(made)


def load_again_and_again(machine: Vmm) -> None:
    """loadvm, a migration that is tried again: the same two states, twenty times."""
    permanent, volatile = machine.get_state(vmm.PERMANENT), machine.get_state(vmm.VOLATILE)
    made = []
    for _ in range(LOADS):
        machine.ask(vmm.STOP)
        assert [machine.set_state(vmm.PERMANENT, permanent), machine.set_state(vmm.VOLATILE, volatile)] == [0, 0]
        assert machine.ask(vmm.INIT, struct.pack(">I", 1)) == bytes(4)
        made.append(random_numbers(machine.tpm))
    all_differ(made)


def test_a_vm_that_loads_one_state_again_and_again(daemon: DaemonProcess, name: str) -> None:
    machine = Vmm(daemon.create(name).control_socket).boot()
    load_again_and_again(machine)
    machine.close()


def test_a_vm_under_the_drop_in_that_loads_one_state_again_and_again(tmp_path: Path) -> None:
    with running(OURS, tmp_path / "state", server=False) as tpm:
        load_again_and_again(Vmm(tpm.control).boot())


def test_a_volatile_state_file_that_is_copied_and_resumed(tmp_path: Path) -> None:
    with running(OURS, tmp_path / "state", *READY) as tpm:
        raw.succeed(raw.connect(tpm.data), raw.pcr_read(0))
        tpm.ioctl("-v")
        tpm.shut_down()
    assert (tmp_path / "state" / VOLATILE).exists()
    made = []
    for number in range(LOADS):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "state", copy)
        with running(OURS, copy, "--flags", "not-need-init") as tpm:
            sock = raw.connect(tpm.data)
            made.append(random_numbers(partial(raw.ask, sock)))
            sock.close()
    all_differ(made)


def test_clones_of_a_host_whose_instances_hibernate(own_daemon: DaemonProcess) -> None:
    names = [f"web-{number}" for number in range(LOADS // CLONES)]
    for name in names:
        own_daemon.running(name)
        own_daemon.hibernate(name)
    host = own_daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    own_daemon.kill()
    os.kill(host, signal.SIGKILL)
    made: dict[str, list[list[bytes]]] = {name: [] for name in names}
    for _ in range(CLONES):
        root = Path(tempfile.mkdtemp(prefix="vtpm-"))
        shutil.copytree(own_daemon.state_dir, root / "state")
        with DaemonProcess(root=root) as clone:
            for name in names:
                assert clone.get(name).hibernated
                sock = raw.connect(clone.get(name).tpm_socket)
                made[name].append(random_numbers(partial(raw.ask, sock)))
                sock.close()
    for of_one in made.values():
        all_differ(of_one)

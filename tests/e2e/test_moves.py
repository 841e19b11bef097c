"""A VM's state that leaves its QEMU: snapshots, migration. One boot; each test goes on from the file that it was written to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import SECRET, MakeTpm, away
from tests.support import quote, vmguest
from tests.support.daemon import DaemonProcess
from tests.support.vm import Vm
from tests.support.vmassets import Assets
from tests.support.vmpeers import OurTpm, Peer
from vtpm.api.v1 import instance_pb2 as pb

AT_HOME = "written at home"


@dataclass(frozen=True, slots=True)
class Moved:
    """A running VM in a file, and what its TPM held."""

    file: Path
    source: Peer
    pcrs: dict[int, bytes]
    clock: vmguest.Clock


@pytest.fixture(scope="module")
def moved(assets: Assets, tpm: Peer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moved]:
    """A VM that booted, sealed, wrote NV, extended, left a transient object, and was written into a file."""
    directory = tmp_path_factory.mktemp("vm")
    with Vm(assets, tpm, directory) as vm:
        vm.boot()
        vmguest.seal(vm, SECRET)
        vmguest.write_nv(vm, AT_HOME)
        vmguest.extend(vm, 8)
        vmguest.extend(vm, 23)
        values, clock = vmguest.pcrs(vm), vmguest.clock(vm)
        vm.migrate(directory / "moved")
        vm.quit()
    yield Moved(directory / "moved", tpm, values, clock)
    # 150 MB.
    (directory / "moved").unlink()


@pytest.fixture
def arrived(assets: Assets, moved: Moved, make_tpm: MakeTpm, tmp_path: Path) -> Iterator[Vm]:
    """The VM, going on with another TPM."""
    with Vm(assets, make_tpm(), tmp_path, snapshots=True) as vm:
        vm.start(incoming=moved.file)
        yield vm


def holds_what_it_held(vm: Vm, moved: Moved) -> None:
    assert vmguest.pcrs(vm) == moved.pcrs
    assert vmguest.clock(vm) == moved.clock
    assert vmguest.read_nv(vm) == AT_HOME
    opened = vmguest.unseal(vm)
    assert (opened.status, opened.out) == (0, SECRET.encode()), opened.err


def test_migration(arrived: Vm, moved: Moved) -> None:
    holds_what_it_held(arrived, moved)
    if isinstance(arrived.tpm, OurTpm):
        assert isinstance(moved.source, OurTpm)
        assert arrived.tpm.pcrs() == moved.pcrs
        assert arrived.tpm.instance.state == pb.ON
        # Identity moves with the TPM: the AK that signs here is the one that was certified there.
        assert list(arrived.tpm.instance.keys) == list(moved.source.instance.keys)
        signed = arrived.tpm.quote(b"arrived", list(vmguest.BOOT_PCRS))
        (ak,) = [key.public_pem for key in moved.source.instance.keys if key.role == pb.AK]
        quote.verify(
            signed.attest, signed.signature, ak, nonce=b"arrived", pcrs=[moved.pcrs[index] for index in vmguest.BOOT_PCRS]
        )


def test_the_place_it_left_is_off(moved: Moved) -> None:
    if not isinstance(moved.source, OurTpm):
        pytest.skip("swtpm has no service to ask")
    moved.source.until(pb.OFF)


def test_a_migrated_vm_boots_where_it_arrived(arrived: Vm, moved: Moved) -> None:
    arrived.reboot()
    opened = vmguest.unseal(arrived)
    assert (opened.status, opened.out) == (0, SECRET.encode()), opened.err
    assert vmguest.read_nv(arrived) == AT_HOME
    assert vmguest.pcrs(arrived)[8] == bytes(32)
    assert vmguest.clock(arrived).reset_count == moved.clock.reset_count + 1


def test_a_snapshot_brings_back_pcrs_and_nv(arrived: Vm, moved: Moved) -> None:
    arrived.save("before")
    vmguest.extend(arrived, 7)
    vmguest.rewrite_nv(arrived, "changed by now.")
    assert vmguest.unseal(arrived).status != 0
    arrived.load("before")
    holds_what_it_held(arrived, moved)
    vmguest.extend(arrived, 7)
    arrived.load("before")
    holds_what_it_held(arrived, moved)
    if isinstance(arrived.tpm, OurTpm):
        assert arrived.tpm.pcrs() == moved.pcrs


def test_a_migration_whose_destination_is_lost(arrived: Vm, moved: Moved) -> None:
    arrived.migrate(Path(os.devnull))
    arrived.go_on()
    holds_what_it_held(arrived, moved)
    vmguest.extend(arrived, 7)
    assert vmguest.unseal(arrived).status != 0


def test_a_snapshot_while_the_daemon_is_away(arrived: Vm, moved: Moved, daemon: DaemonProcess) -> None:
    with ThreadPoolExecutor(1) as pool:
        with away(daemon):
            arrived.save("before")
            vmguest.extend(arrived, 7)
            # It brings another NV, so it waits until somebody can make that durable.
            loaded = pool.submit(arrived.load, "before")
            time.sleep(0.5)
            assert not loaded.done()
        loaded.result()
    holds_what_it_held(arrived, moved)
    if isinstance(arrived.tpm, OurTpm):
        assert arrived.tpm.pcrs() == moved.pcrs


@pytest.mark.parametrize("end", [Vm.quit, Vm.kill])
def test_a_vm_that_ends_while_the_daemon_is_away(arrived: Vm, daemon: DaemonProcess, end: Callable[[Vm], None]) -> None:
    with away(daemon):
        end(arrived)
    if isinstance(arrived.tpm, OurTpm):
        arrived.tpm.until(pb.OFF)

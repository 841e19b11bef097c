"""Real VMs. Boots are dear, so a module shares one; at most two VMs run at once.

VTPM_E2E_PEER=swtpm plugs the VMs into swtpm, which tells a fault of the harness from one of ours; what asks the service is
then skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import vmguest
from tests.support.daemon import DaemonProcess
from tests.support.vm import Vm
from tests.support.vmassets import Assets, AssetsUnavailableError, prepare
from tests.support.vmpeers import OurTpm, Peer, Swtpm
from vtpm.api.v1 import instance_pb2 as pb

TEST_TIMEOUT_S = 900
SECRET = "opens-only-after-this-boot"
PEER = os.environ.get("VTPM_E2E_PEER", "vtpm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test may wait for its turn and for emulated boots."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(TEST_TIMEOUT_S))


@contextlib.contextmanager
def away(daemon: DaemonProcess) -> Iterator[None]:
    """Without a daemon, which was killed; it is back afterwards."""
    daemon.kill()
    try:
        yield
    finally:
        daemon.start()


@pytest.fixture(scope="session")
def assets() -> Assets:
    """Kernel and initramfs; without them, and without a network to get them from, there is nothing to test with."""
    try:
        return prepare()
    except AssetsUnavailableError as error:
        pytest.skip(f"no VM to test with: {error}")


@pytest.fixture(scope="module")
def daemon(assets: Assets) -> Iterator[DaemonProcess]:
    """A daemon that answers."""
    with DaemonProcess() as process:
        yield process


MakeTpm = Callable[[], Peer]


@pytest.fixture(scope="module")
def make_tpm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeTpm]:
    """Give a maker of TPMs, each for one VM."""
    swtpms: list[Swtpm] = []
    numbers = itertools.count(1)

    def make() -> Peer:
        if PEER == "vtpm":
            return OurTpm(request.getfixturevalue("daemon"), f"vm-{next(numbers)}", profile=pb.Profile())
        swtpms.append(Swtpm(tmp_path_factory.mktemp("tpm")))
        return swtpms[-1]

    yield make
    for swtpm in swtpms:
        swtpm.close()


@pytest.fixture(scope="module")
def tpm(make_tpm: MakeTpm) -> Peer:
    """The TPM of the module's VM."""
    return make_tpm()


@pytest.fixture(scope="module")
def service(tpm: Peer) -> OurTpm:
    """The same, for tests that ask the service about it."""
    if not isinstance(tpm, OurTpm):
        pytest.skip("swtpm has no service to ask")
    return tpm


@pytest.fixture(scope="module")
def interface() -> str:
    """How the VM sees its TPM; modules choose."""
    return "tpm-crb"


@pytest.fixture(scope="module")
def vm(assets: Assets, tpm: Peer, interface: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """A VM in userspace. Tests leave it so, or booted anew."""
    with Vm(assets, tpm, tmp_path_factory.mktemp("vm"), interface=interface) as machine:
        yield machine.boot()


@pytest.fixture(scope="module")
def at_boot(vm: Vm) -> dict[int, bytes]:
    """What the VM measured at its first boot; a secret is sealed to it."""
    measured = vmguest.boot_pcrs(vm)
    vmguest.seal(vm, SECRET)
    return measured

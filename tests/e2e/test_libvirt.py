"""libvirt starts a domain with an emulated TPM, and finds ours in the place of swtpm."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import ROOT
from tests.support.vm import BOOT_TIMEOUT_S, Vm
from tests.support.vmassets import COMMAND_LINE, Assets

UUID = "5f1b6e3a-8d0f-4c53-9a6e-0d2f6b1c7e42"
# The user that Debian's libvirt looks up in any case, and that a package makes which is not needed here.
USER = "libvirt-qemu"
# All is this user's, and confined by nothing: containers allow no more.
CONFIG = """
user = "root"
group = "root"
swtpm_user = "root"
swtpm_group = "root"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
remember_owner = 0
"""
DOMAIN = """
<domain type='qemu'>
  <name>vtpm-e2e</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{command_line}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{emulator}</emulator>
    <channel type='unix'><source mode='bind' path='{agent}'/><target type='virtio' name='vtpm.agent'/></channel>
    <tpm model='tpm-crb'><backend type='emulator' version='2.0' persistent_state='yes'/></tpm>
    <memballoon model='none'/>
  </devices>
</domain>
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with our swtpm and swtpm_setup, and the original swtpm_ioctl."""
    directory = tmp_path_factory.mktemp("bin")
    subprocess.run([ROOT / "script" / "launcher", directory], check=True, capture_output=True, timeout=60)
    ioctl = shutil.which("swtpm_ioctl")
    assert ioctl is not None
    (directory / "swtpm_ioctl").symlink_to(ioctl)
    return directory


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory for sockets with names that libvirt makes long."""
    with tempfile.TemporaryDirectory(prefix="lv-") as directory:
        yield Path(directory)


class Domain(Vm):
    """A VM that libvirt runs; it has no monitor here."""

    def __init__(self, assets: Assets, programs: Path, directory: Path) -> None:
        super().__init__(assets, _ItsOwn(), directory)
        self._programs = programs
        self._agent = directory / "agent"

    def start(self, incoming: Path | None = None) -> None:
        root = self.directory / "root"
        (root / "etc").mkdir(parents=True, exist_ok=True)
        (root / "etc" / "qemu.conf").write_text(CONFIG)
        domain = self.directory / "domain.xml"
        emulator = shutil.which("qemu-system-x86_64")
        domain.write_text(
            DOMAIN.format(
                uuid=UUID,
                kernel=self.assets.kernel,
                initrd=self.assets.initrd,
                command_line=COMMAND_LINE,
                emulator=emulator,
                agent=self._agent,
            )
        )
        commands = [f"mount --bind {shlex.quote(str(file))} {place}" for file, place in self._accounts()]
        commands.append(
            f"exec setpriv --pdeathsig TERM virt-qemu-run -v -r {shlex.quote(str(root))} {shlex.quote(str(domain))}"
        )
        environment = os.environ | {"PATH": f"{self._programs}:{os.environ['PATH']}"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["unshare", "-m", "sh", "-ec", "\n".join(commands)], stdout=log, stderr=log, env=environment
            )
        self._guest, self._data = self._connected(), b""

    def _accounts(self) -> Iterator[tuple[Path, str]]:
        """Files with the user that libvirt asks for, and what they stand in for."""
        for place, line in (("passwd", f"{USER}:x:64055:65534::/:/bin/false"), ("group", f"{USER}:x:64055:")):
            text = Path("/etc", place).read_text()
            if f"\n{USER}:" not in text:
                file = self.directory / place
                file.write_text(f"{text}{line}\n")
                yield file, f"/etc/{place}"

    def _connected(self) -> socket.socket:
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while True:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise self._failure("libvirt did not start it")
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self._agent))
            except OSError:
                sock.close()
                time.sleep(0.05)
            else:
                return self._open.enter_context(sock)

    def kill(self) -> None:
        """End the domain."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)
        self._agent.unlink(missing_ok=True)
        self._ended()


class _ItsOwn:
    """libvirt starts the domain's TPM: nobody else may plug one in."""

    def plug(self) -> Path:
        raise NotImplementedError


def serving(state: Path) -> list[int]:
    """The processes of TPMs whose state is below a directory."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().split(b"\0")
            if words[0].endswith(b"swtpm") and any(str(state).encode() in word for word in words):
                found.append(int(place.parent.name))
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="libvirt's files are root's here")
def test_a_domain_boots_twice_with_one_tpm(assets: Assets, programs: Path, short_directory: Path) -> None:
    if shutil.which("virt-qemu-run") is None:
        pytest.skip("libvirt is not installed: ./script/setup test")
    domain = Domain(assets, programs, short_directory / "vm")
    for turn in range(2):
        with domain:
            domain.boot()
            running = serving(short_directory)
            # The process in front and the worker; by its path libvirt knows it as its swtpm.
            assert {Path(f"/proc/{pid}/exe").readlink() for pid in running} == {programs / "swtpm"}
            assert len(running) == 2
            if turn == 0:
                domain.run("tpm2 nvdefine -Q 0x1500001 -C o -s 8; printf 12345678 | tpm2 nvwrite -Q 0x1500001 -C o -i -")
            assert domain.run("tpm2 nvread 0x1500001 -C o") == b"12345678"
            # Made by our swtpm_setup.
            assert b"0x81010001" in domain.run("tpm2 getcap handles-persistent")
        deadline = time.monotonic() + 10
        while serving(short_directory):
            assert time.monotonic() < deadline
            time.sleep(0.05)

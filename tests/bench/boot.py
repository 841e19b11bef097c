"""A real VM's boot with our TPM and with swtpm, and what the commands beside the TPM's own cost."""

from __future__ import annotations

import socket
import tempfile
import time
from pathlib import Path

from tests.bench.measure import Row, alternate, micros, round_trips
from tests.bench.swtpm import installed
from tests.support.daemon import DaemonProcess
from tests.support.vm import Vm
from tests.support.vmassets import AssetsUnavailableError, prepare
from tests.support.vmpeers import OurTpm, Peer, Swtpm

_ROUNDS = 5
_BOUND = 1.1
_CONTROL_BOUND_S = 1e-3
# Commands of the control channel (swtpm's tpm_ioctl.h): INIT without flags, then the two that are measured.
_INIT = bytes.fromhex("0000000200000000")
_CONTROL_COMMANDS = {"GET_CAPABILITY": bytes.fromhex("00000001"), "GET_TPMESTABLISHED": bytes.fromhex("00000004")}


def boot() -> list[Row]:
    """From the start of QEMU to userspace, the two in turn; then round trips on the control socket."""
    with DaemonProcess() as daemon, tempfile.TemporaryDirectory(prefix="boot-") as directory:
        swtpm = Swtpm(Path(directory) / "tpm")
        try:
            peers: dict[str, Peer] = {"ours": OurTpm(daemon, "bench-boot")}
            if installed():
                peers["swtpm"] = swtpm
            return [_boots(Path(directory), peers), *_controls(peers)]
        finally:
            swtpm.close()


def _boots(directory: Path, peers: dict[str, Peer]) -> Row:
    what = f"boot of a VM to userspace (emulated; median of {_ROUNDS})"
    try:
        assets = prepare()
    except AssetsUnavailableError as error:
        return Row(what, f"not measured: {error}", "", "", f"≤ {_BOUND:g} × swtpm", within=False)
    vms = [Vm(assets, peer, directory / name) for name, peer in peers.items()]

    def once(vm: Vm) -> float:
        with vm:
            begun = time.perf_counter()
            vm.boot()
            took = time.perf_counter() - begun
            vm.quit()
        return took

    own, *other = alternate(_ROUNDS, *(lambda vm=vm: once(vm) for vm in vms))
    return Row.compared(what, own, other[0] if other else None, _BOUND, lambda seconds: f"{seconds:.2f} s")


def _controls(peers: dict[str, Peer]) -> list[Row]:
    times = {name: _control_times(peer) for name, peer in peers.items()}
    rows = []
    for command in _CONTROL_COMMANDS:
        own, other = times["ours"][command], times.get("swtpm", {}).get(command)
        ratio = f"{own / other:.2f}" if other else ""
        peer = micros(other) if other else "not installed"
        within = own <= _CONTROL_BOUND_S
        rows.append(Row(f"{command} on the control socket", micros(own), peer, ratio, "≤ 1 ms", within=within))
    return rows


def _control_times(peer: Peer) -> dict[str, float]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(peer.plug()))
        sock.sendall(_INIT)
        if sock.recv(4) != bytes(4):
            raise RuntimeError("INIT was refused")
        return {name: round_trips(sock, command, 1000) for name, command in _CONTROL_COMMANDS.items()}

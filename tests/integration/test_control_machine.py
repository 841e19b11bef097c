"""Control requests and TPM commands in every order, said to an instance and to a plain swtpm at once: both answer the same.

What is left out because the two differ on purpose stands in docs/vm.md: GET_CAPABILITY's bit 16, GET_STATEBLOB of the permanent
state while stopped, STORE_VOLATILE, unknown commands, the end of a connection.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.support import raw, vmm
from tests.support.daemon import DaemonProcess
from tests.support.vmm import Vmm, plain_swtpm
from vtpm.api.v1 import instance_pb2 as pb

if shutil.which("swtpm") is None:
    pytest.skip("swtpm is not installed", allow_module_level=True)

localities = st.sampled_from([0, 1, 3, 4, 5, 255])
_numbers = itertools.count()
# Hexadecimal digits of an answer that is a TPM_RESULT and nothing more.
_RESULT_ALONE = 8


def machine_for(daemon: DaemonProcess, peer_state: Path) -> type[RuleBasedStateMachine]:
    class ControlMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.stack = contextlib.ExitStack()
            self.name = f"machine-{next(_numbers)}"
            self.instance = daemon.create(self.name)
            directory = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="peer-"))
            shutil.copytree(peer_state, Path(directory) / "state")
            self.peer = Vmm(self.stack.enter_context(plain_swtpm(Path(directory) / "state")))
            self.ours = Vmm(self.instance.control_socket)
            self.hashing = False

        def both(self, command: int, payload: bytes = b"") -> str:
            ours, peer = self.ours.ask(command, payload).hex(), self.peer.ask(command, payload).hex()
            if command == vmm.ESTABLISHED and len(peer) == _RESULT_ALONE:
                # A failure has its whole length here: QEMU reads that much before it looks at the result (docs/vm.md).
                peer += "00000000"
            assert ours == peer
            return ours

        def tpm(self, command: bytes, ignore: int = 0) -> None:
            ours, peer = self.ours.tpm(command), self.peer.tpm(command)
            # What follows the header may hold what is a TPM's own, such as a counter of PCR updates.
            assert (ours[:10], ours[10 + ignore :]) == (peer[:10], peer[10 + ignore :])

        @initialize()
        def attach(self) -> None:
            assert self.ours.give_data_channel() == self.peer.give_data_channel()

        @rule()
        def init(self) -> None:
            self.both(vmm.INIT, bytes(4))

        @rule()
        def stop(self) -> None:
            self.both(vmm.STOP)

        @rule(size=st.sampled_from([0, 10, 2808, 3968, 4096, 99999]))
        def buffer_size(self, size: int) -> None:
            self.both(vmm.BUFFER, struct.pack(">I", size))

        @rule()
        def established(self) -> None:
            self.both(vmm.ESTABLISHED)

        @rule(locality=localities)
        def reset_established(self, locality: int) -> None:
            self.both(vmm.RESET_ESTABLISHED, bytes([locality, 0, 0, 0]))

        @rule(locality=localities)
        def set_locality(self, locality: int) -> None:
            self.both(vmm.LOCALITY, bytes([locality, 0, 0, 0]))

        @rule(data=st.binary(max_size=100))
        def h_crtm(self, data: bytes) -> None:
            self.both(vmm.HASH_START)
            self.both(vmm.HASH_DATA, struct.pack(">I", len(data)) + data)
            self.both(vmm.HASH_END)

        @rule()
        def hash_end(self) -> None:
            self.both(vmm.HASH_END)

        @rule()
        def cancel(self) -> None:
            self.both(vmm.CANCEL)

        @rule(flags=st.integers(0, 3))
        def info(self, flags: int) -> None:
            self.both(vmm.INFO, struct.pack(">QII", flags, 0, 0))

        @rule()
        def second_data_channel(self) -> None:
            first = self.ours.data, self.peer.data
            assert self.ours.give_data_channel() == self.peer.give_data_channel()
            self.ours.data, self.peer.data = first

        @rule(kind=st.sampled_from([1, 2, 3, 9]), blob=st.binary(min_size=1, max_size=40))
        def set_garbage(self, kind: int, blob: bytes) -> None:
            self.both(vmm.SET_STATE, struct.pack(">III", 0, kind, len(blob)) + blob)

        @rule()
        def start_up(self) -> None:
            self.tpm(raw.startup_clear())

        @rule(index=st.sampled_from([0, 7, 16, 17, 20]), digest=st.binary(min_size=32, max_size=32))
        def extend(self, index: int, digest: bytes) -> None:
            self.tpm(raw.pcr_extend(index, digest))

        @rule(index=st.sampled_from([0, 7, 16, 17, 20]))
        def read(self, index: int) -> None:
            self.tpm(raw.pcr_read(index), ignore=4)

        @rule()
        def probe(self) -> None:
            self.tpm(bytes.fromhex("00c10000000a000000f1"))

        def teardown(self) -> None:
            self.ours.close()
            self.peer.close()
            self.stack.close()
            assert daemon.until(self.name, pb.OFF).state == pb.OFF

    return ControlMachine


def test_both_answer_the_same_in_every_order(daemon: DaemonProcess, tmp_path: Path) -> None:
    with plain_swtpm(tmp_path / "state"):
        pass
    run_state_machine_as_test(
        machine_for(daemon, tmp_path / "state"),
        settings=settings(max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)),
    )

"""A rehearsal before the first fork: a throw-away TPM goes through what workers do.

CPython specialises code and OpenSSL and libtpms build their tables on first use. Done once here, those pages are shared by all
workers instead of being written by each: it saves more than a megabyte a worker. The TPM of the rehearsal is forgotten before
any fork (a worker that waits for its instance goes once more through the thaw of a throw-away TPM), and a worker's own TPM
starts with fresh entropy: libtpms seeds its generator at each _TPM_Init, OpenSSL at each fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import select
import socket
import struct
import uuid
from typing import TYPE_CHECKING, Final

from vtpm.engine.exits import Exit
from vtpm.engine.framing import FrameReader, frame
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker import Worker
from vtpm.tpm.codes import CommandCode
from vtpm.tpm.command import HEADER, build
from vtpm.tpm.layouts import RENEWED
from vtpm.tpm.pcr import PcrBank, PcrSelection, marshal_selections

if TYPE_CHECKING:
    from vtpm.engine.operations import Operations
    from vtpm.engine.software import SoftwareTpm

# CPython 3.11 specialises a function after eight calls.
_TURNS: Final = 16
# Any index of an owner's range.
_INDEX: Final = 0x01800000
# CMD_STOP, CMD_SET_BUFFERSIZE, CMD_INIT.
_RESET: Final = (bytes.fromhex("0000000e"), bytes.fromhex("0000001100000000"), bytes.fromhex("0000000200000000"))
# MAX_LOADED_OBJECTS of libtpms, and TRANSIENT_FIRST.
_OBJECT_SLOTS: Final = 3
_TRANSIENT_FIRST: Final = 0x80000000
# TPM2_LoadExternal of a public RSA key that has neither auth nor scheme, under no hierarchy: no sensitive part; a TPMT_PUBLIC
# with nameAlg SHA-256, userWithAuth and decrypt, no policy, symmetric and scheme TPM_ALG_NULL, and 2048 bits; TPM_RH_NULL.
_PLAIN_PUBLIC: Final = struct.pack(">HHIHHHHIH256s", 1, 0x000B, 0x00020040, 0, 0x0010, 0x0010, 2048, 0, 256, b"\xff" * 256)
_PLAIN_KEY: Final = struct.pack(">HH", 0, len(_PLAIN_PUBLIC)) + _PLAIN_PUBLIC + struct.pack(">I", 0x40000007)


def rehearse(tpm: SoftwareTpm, operations: Operations) -> ThawRehearsal:
    """Run a throw-away TPM through manufacture, load, commands and operations; leave `tpm` without any state.

    Returns what a spare worker rehearses for itself.
    """
    host, _host_end = socket.socketpair()
    ops, ops_end = socket.socketpair()
    commits, commits_end = socket.socketpair()
    data, data_end = socket.socketpair()
    control, control_end = socket.socketpair()
    sockets = (host, _host_end, ops, ops_end, commits, commits_end, data, data_end, control, control_end)
    try:
        worker = Worker(tpm, operations, host=host, operations_socket=ops, commits=commits)
        instance, key = uuid.uuid4().bytes, os.urandom(32)
        manufacture = pb.Manufacture(
            data_key=key,
            instance=instance,
            ek_algorithms=["ECC_P384"],
            ak_algorithm="ECC_P256",
            pcr_banks=["sha256"],
            hold=True,
        )
        _ask(worker, ops_end, pb.WorkerRequest(manufacture=manufacture))
        entry = pb.NvEntry(index=_INDEX, attributes=RENEWED, data=b"rehearsal", size=64, secret_auth=True)
        provision = pb.Provision(data_key=key, instance=instance, entries=[entry])
        made = _ask(worker, ops_end, pb.WorkerRequest(provision=provision)).provisioned
        # The acknowledgements of all commits to come are there before they are asked for.
        for version in range(2, 2 + 4 * _TURNS):
            commits_end.sendall(frame(pb.CommitAck(version=version).SerializeToString()))
        place = pb.Place(instance=instance, epoch=0, version=1)
        load = pb.Load(data_key=key, place=place, sealed=made.sealed, epoch=1, startup_clear=True, commit_timeout_ms=5000)
        load.ak_algorithm = "ECC_P256"
        _ask(worker, ops_end, pb.WorkerRequest(load=load))
        data.setblocking(False)
        serve = worker.rehearse_connection(data)
        selections = [pb.Selection(hash_alg=PcrBank.SHA256.alg_id, indices=[0, 7])]
        read = build(CommandCode.PCR_Read, marshal_selections([PcrSelection(PcrBank.SHA256, (0, 7))]))
        clock = build(CommandCode.ClockRateAdjust, struct.pack(">I", 0))
        for _ in range(_TURNS):
            for command in (read, clock):
                data_end.sendall(command)
                serve()
                data_end.recv(4096)
            _ask(worker, ops_end, pb.WorkerRequest(quote=pb.Quote(selections=selections, nonce=b"rehearsal")))
            _ask(worker, ops_end, pb.WorkerRequest(measure=pb.Measure(pcr=16, data=b"rehearsal", event_type=6)))
            _ask(worker, ops_end, pb.WorkerRequest(get_status=pb.GetStatus()))
            _ask(worker, ops_end, pb.WorkerRequest(get_keys=pb.GetKeys()))
        worker.rehearse_control(control)
        for _ in range(_TURNS):
            # A reset as QEMU asks for it.
            for request in _RESET:
                control_end.sendall(request)
                worker.rehearse_turn()
                control_end.recv(64)
        worker.end_rehearsal()
    finally:
        for sock in sockets:
            sock.close()
    thaw = ThawRehearsal(instance, key, made.sealed)
    for _ in range(_TURNS):
        thaw.hibernate(tpm, operations)
        thaw.run(tpm, operations)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return thaw


class ThawRehearsal:
    """Hibernation and thaw of a throw-away TPM, whose key is thrown away with it."""

    def __init__(self, instance: bytes, data_key: bytes, sealed: bytes) -> None:
        self._load = pb.Load(data_key=data_key, sealed=sealed, epoch=1, commit_timeout_ms=5000)
        self._load.place.instance, self._load.place.version = instance, 1
        self._snapshot = b""

    def hibernate(self, tpm: SoftwareTpm, operations: Operations) -> None:
        """Take the snapshot that `run` goes on from."""
        with _Stage(tpm, operations) as stage:
            present = self._load.place.version
            stage.acknowledge(*range(present + 1, present + 5), 1)
            load = pb.Load(startup_clear=True)
            load.MergeFrom(self._load)
            stage.ask(pb.WorkerRequest(load=load))
            # Last of all, as what is in libtpms' memory now is what a worker begins with.
            stage.clear_object_slots()
            commits = stage.hibernate()
        self._snapshot = commits[-1].sealed
        self._load.sealed, self._load.place.version, self._load.place.epoch = commits[-2].sealed, commits[-2].version, 1

    def run(self, tpm: SoftwareTpm, operations: Operations) -> None:
        """Go on from it, as a worker does in whose way a guest waits; leave `tpm` without any state.

        A spare does this once after its fork: what it writes to its pages then, it need not write when a guest waits.
        """
        with _Stage(tpm, operations) as stage:
            stage.acknowledge(1)
            load = pb.Load(snapshot=self._snapshot, snapshot_version=1)
            load.MergeFrom(self._load)
            stage.ask(pb.WorkerRequest(load=load))
            stage.command(build(CommandCode.PCR_Read, marshal_selections([PcrSelection(PcrBank.SHA256, (0, 7))])))


class _Stage:
    """A worker among sockets whose other ends are here."""

    def __init__(self, tpm: SoftwareTpm, operations: Operations) -> None:
        self._tpm = tpm
        self._operations = operations
        host, self._host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ops, self._ops = socket.socketpair()
        # An answer is a message, so that none of them is read with another.
        commits, self._commits = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        data, self._data = socket.socketpair()
        self._sockets = [host, self._host, ops, self._ops, commits, self._commits, data, self._data]
        self._worker = Worker(tpm, operations, host=host, operations_socket=ops, commits=commits, sockets=[(pb.DATA, data, 0)])

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._worker.end_rehearsal()
        for sock in self._sockets:
            sock.close()
        self._operations.forget()
        self._tpm.forget()

    def acknowledge(self, *versions: int) -> None:
        """The answers to commits to come are there before they are asked for; those of the wrong version are passed over."""
        for version in versions:
            self._commits.send(frame(pb.CommitAck(version=version, batch_size=1).SerializeToString()))

    def ask(self, request: pb.WorkerRequest) -> None:
        """Have a request served."""
        _ask(self._worker, self._ops, request)

    def command(self, command: bytes) -> None:
        """Have a command run on a connection that waited."""
        self._data.sendall(command)
        self._worker.rehearse_turn()
        response = self._data.recv(4096)
        code = HEADER.unpack_from(response)[2]
        if code:
            raise RuntimeError(f"rehearsal: a command was answered with {code:#x}")

    def clear_object_slots(self) -> None:
        """Leave every slot for a loaded object with zeros where a scheme's details would be.

        libtpms does not write the details that a scheme has not got (RSAES) when it takes up a volatile state, but compares
        them with those of a command: what another object left there would make it refuse the command.
        """
        for _ in range(_OBJECT_SLOTS):
            self.command(build(CommandCode.LoadExternal, _PLAIN_KEY))
        for slot in range(_OBJECT_SLOTS):
            self.command(build(CommandCode.FlushContext, struct.pack(">I", _TRANSIENT_FIRST + slot)))

    def hibernate(self) -> list[pb.Commit]:
        """Have the worker hibernate; return what it committed, the snapshot last."""
        with contextlib.suppress(Exit):
            self._worker.rehearse_hibernation()
            raise RuntimeError("rehearsal: the worker did not hibernate")
        commits = []
        while select.select([self._commits], [], [], 0)[0]:
            commits += [pb.Commit.FromString(message) for message in FrameReader().feed(self._commits.recv(1 << 18))]
        return commits


def _ask(worker: Worker, ops_end: socket.socket, request: pb.WorkerRequest) -> pb.WorkerReply:
    ops_end.sendall(frame(request.SerializeToString()))
    worker.rehearse_turn()
    poller = select.poll()
    poller.register(ops_end, select.POLLIN)
    assert poller.poll(0)
    reply = pb.WorkerReply.FromString(ops_end.recv(1 << 16)[4:])
    if reply.HasField("fault"):
        raise RuntimeError(f"rehearsal: {reply.fault.reason}")
    return reply

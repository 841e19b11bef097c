"""What makes a TPM's identity provable: credentials that it activates, and the certificates in its NV indices.

At manufacture and in a short run without a guest, indices are defined by platform authorization, which is empty until firmware
or `Operations.close_platform` sets it. In a running TPM nobody has it; an index that the service writes again has an auth value
made from the instance's data key, which is in this process while the instance runs and nowhere in the guest.

Invariant 5: all of it happens between two guest commands and leaves no session and no transient object.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import struct
from typing import TYPE_CHECKING, Final

from vtpm.engine.operations import tpm_error
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import EngineError, FailedPreconditionError, VtpmError
from vtpm.seal.envelope import Place, StateKind, seal, unseal
from vtpm.tpm import credential as activation
from vtpm.tpm import hcl, nv
from vtpm.tpm.codes import TPM_RC_RETRY, CommandCode, Handle
from vtpm.tpm.command import HEADER_SIZE, build
from vtpm.tpm.credential import Credential
from vtpm.tpm.keys import KeyAlgorithm
from vtpm.tpm.layouts import AZURE_REPORT, AZURE_USER_DATA
from vtpm.tpm.service import read_public_command, response_code

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Iterable, Mapping

    from vtpm.engine.durable import DurableState
    from vtpm.engine.operations import Operations
    from vtpm.engine.software import SoftwareTpm

_CAP_TPM_PROPERTIES: Final = 6
_PT_FIXED: Final = 0x100
_PT_COUNT: Final = 32
_REVISION, _MANUFACTURER, _VENDOR, _FIRMWARE = 0x102, 0x105, range(0x106, 0x10A), 0x10B
# Format-one codes without their number of handle, parameter or session (Part 2, 6.6.3).
_RC_HANDLE: Final = 0x8B
_RC_FORMAT_ONE_MASK: Final = 0xBF
_RC_TESTING: Final = 0x90A
_TRIES: Final = 8
# Of TPM2_NV_Write: behind the header and authHandle (Part 3, 31.7).
_NV_INDEX_OFFSET: Final = HEADER_SIZE + 4
_NV_AUTH: Final = b"vtpm nv index auth v1"


def nv_auth(data_key: bytes, instance: uuid.UUID, index: int) -> bytes:
    """Return the auth value of an index that the service writes again: a MAC under the instance's data key."""
    return hmac.digest(data_key, _NV_AUTH + instance.bytes + struct.pack(">I", index), hashlib.sha256)


class Provisioning:
    """Serves the requests about identity; `requests` is their table, by the names of WorkerRequest's bodies."""

    def __init__(self, tpm: SoftwareTpm, operations: Operations, durable: DurableState) -> None:
        self._tpm = tpm
        self._operations = operations
        self._durable = durable
        self.requests: Mapping[str, Callable[[pb.WorkerRequest, pb.WorkerReply], None]] = {
            "activate_credentials": self._activate_credentials,
            "prove": self._activate_credentials,
            "provision": self._provision,
            "reprovision": self._reprovision,
            "write_nv": self._write_nv,
            "read_nv": self._read_nv,
        }

    def _run(self, operation: str, command: bytes) -> bytes:
        for _ in range(_TRIES):
            response = self._answer(command)
            rc = response_code(response)
            # The TPM has begun to test an algorithm, and wants the command again (Part 3, 5.2).
            if rc not in (TPM_RC_RETRY, _RC_TESTING):
                break
        if rc:
            raise tpm_error(operation, rc)
        return response

    def _answer(self, command: bytes) -> bytes:
        """Run a command at locality 0, whatever the guest's is."""
        guest_locality, self._tpm.locality = self._tpm.locality, 0
        try:
            return self._tpm.process(command)
        finally:
            self._tpm.locality = guest_locality

    # ---- proof -----------------------------------------------------------------------------------------------------------

    def properties(self) -> pb.TpmProperties:
        """Return what the TPM tells of itself (TPM2_GetCapability, TPM_CAP_TPM_PROPERTIES)."""
        command = build(CommandCode.GetCapability, struct.pack(">III", _CAP_TPM_PROPERTIES, _PT_FIXED, _PT_COUNT))
        response = self._run("TPM2_GetCapability", command)
        # moreData, the capability, then a count and pairs (Part 2, 10.8 and 10.9.8).
        (count,) = struct.unpack_from(">I", response, HEADER_SIZE + 5)
        found = dict(struct.unpack_from(">II", response, HEADER_SIZE + 9 + 8 * item) for item in range(count))
        vendor = b"".join(struct.pack(">I", found.get(tag, 0)) for tag in _VENDOR).replace(b"\0", b"")
        return pb.TpmProperties(
            manufacturer=found.get(_MANUFACTURER, 0),
            vendor=vendor.decode("ascii", "replace").strip(),
            firmware_version=found.get(_FIRMWARE, 0),
            revision=found.get(_REVISION, 0),
        )

    def _activate_credentials(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        reply.activated_credentials.SetInParent()
        order = request.prove if request.HasField("prove") else request.activate_credentials
        for item in order.credentials:
            reply.activated_credentials.secrets.append(self._activate(item))

    def _activate(self, item: pb.Credential) -> bytes:
        if item.made_anew:
            ak = self._operations.make_transient_ak(KeyAlgorithm(item.made_anew))
            try:
                return self._activate_for(ak, item)
            finally:
                self._run("TPM2_FlushContext", activation.flush_command(ak))
        return self._activate_for(item.ak, item)

    def _activate_for(self, ak: int, item: pb.Credential) -> bytes:
        if not item.ek_algorithm or not self._is_empty(item.ek):
            return self._activate_with(ak, item.ek, item)
        ek = self._operations.make_transient_ek(KeyAlgorithm(item.ek_algorithm))
        try:
            return self._activate_with(ak, ek, item)
        finally:
            self._run("TPM2_FlushContext", activation.flush_command(ek))

    def _is_empty(self, handle: int) -> bool:
        """Whether there is no key, as TPM2_Clear and TPM2_EvictControl leave it."""
        rc = response_code(self._answer(read_public_command(handle)))
        if rc and rc & _RC_FORMAT_ONE_MASK != _RC_HANDLE:
            raise tpm_error("TPM2_ReadPublic", rc)
        return bool(rc)

    def _activate_with(self, ak: int, ek: int, item: pb.Credential) -> bytes:
        credential = Credential(item.blob, item.encrypted_secret)
        session = None
        if item.by_policy:
            response = self._run("TPM2_StartAuthSession", activation.start_policy_session_command())
            session = activation.parse_session_handle(response)
        try:
            if session is not None:
                self._run("TPM2_PolicySecret", activation.policy_secret_command(session))
            command = activation.activate_credential_command(ak, ek, session, credential)
            secret = activation.parse_activate_credential(self._run("TPM2_ActivateCredential", command))
            session = None
        finally:
            if session is not None:
                # Only its success ends the session.
                self._answer(activation.flush_command(session))
        return secret

    # ---- the report of the layout AZURE ----------------------------------------------------------------------------------

    def concerns_report(self) -> bool:
        """Whether the command in the TPM's buffer, a TPM2_NV_Write, is to the user data of a report."""
        (index,) = struct.unpack_from(">I", self._tpm.command, _NV_INDEX_OFFSET)
        return bool(index == AZURE_USER_DATA)

    def follow_user_data(self) -> None:
        """Put the user data that the guest wrote into its report; before the next command, so that it reads it there."""
        with contextlib.suppress(VtpmError):
            there, user_data = self._public(AZURE_REPORT), self._read(AZURE_USER_DATA, b"")
            if there is None:
                # The guest's own use of that number.
                return
            auth = self._durable.derive(lambda key, instance: nv_auth(key, instance, AZURE_REPORT))
            contents = self._read(AZURE_REPORT, auth)
            at = hcl.user_data_offset(contents)
            if at is None:
                return
            digits = hcl.user_data_digits(user_data)
            if contents[at : at + len(digits)] != digits:
                changed = contents[:at] + digits + contents[at + len(digits) :]
                for command in nv.write_commands(AZURE_REPORT, changed, by=AZURE_REPORT, auth=auth):
                    self._run("TPM2_NV_Write", command)
        self._durable.settle()

    def _read(self, index: int, auth: bytes) -> bytes:
        commands = nv.read_commands(index, self._there(index).size, by=index, auth=auth)
        return b"".join(nv.parse_read(self._run("TPM2_NV_Read", command)) for command in commands)

    # ---- NV --------------------------------------------------------------------------------------------------------------

    def _provision(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.provision
        epoch, version = (order.place.epoch, order.place.version) if order.HasField("place") else (0, 1)
        place = Place(_uuid(order.instance), StateKind.PERMANENT, epoch, version)
        self._finish(order.data_key, place, order.entries, reply)

    def _reprovision(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.reprovision
        if self._tpm.permanent is not None:
            raise EngineError("TPM_EXISTS", "this process already has a TPM")
        place = Place(_uuid(order.place.instance), StateKind.PERMANENT, order.place.epoch, order.place.version)
        self._tpm.power_on(unseal(order.data_key, place, order.sealed))
        self._operations.forget()
        self._operations.startup_clear()
        reply.done.SetInParent()

    def _finish(self, data_key: bytes, place: Place, entries: Iterable[pb.NvEntry], reply: pb.WorkerReply) -> None:
        """Put the indices there, shut the TPM down, and reply with its sealed state."""
        for item in entries:
            entry = nv.NvEntry(item.index, nv.NvAttribute(item.attributes), item.data, item.size, item.secret_auth)
            self._define(entry, nv_auth(data_key, place.instance, item.index) if item.secret_auth else b"")
        self._operations.shutdown_clear()
        self._tpm.power_off()
        assert self._tpm.permanent is not None
        self._tpm.dirty = False
        reply.provisioned.sealed = seal(data_key, place, self._tpm.permanent)

    def _define(self, entry: nv.NvEntry, auth: bytes) -> None:
        if self._public(entry.index) is not None:
            self._run("TPM2_NV_UndefineSpace", nv.undefine_command(entry.index))
        self._run("TPM2_NV_DefineSpace", nv.define_command(entry, auth))
        if nv.NvAttribute.WRITTEN in entry.attributes:
            by = Handle.PLATFORM if nv.NvAttribute.PP_WRITE in entry.attributes else entry.index
            used = auth if by == entry.index else b""
            for command in nv.write_commands(entry.index, entry.contents, by=by, auth=used):
                self._run("TPM2_NV_Write", command)
        if entry.locked:
            self._run("TPM2_NV_WriteLock", nv.write_lock_command(entry.index))

    def _public(self, index: int) -> nv.NvPublic | None:
        response = self._answer(nv.read_public_command(index))
        rc = response_code(response)
        if rc & _RC_FORMAT_ONE_MASK == _RC_HANDLE:
            return None
        if rc:
            raise tpm_error("TPM2_NV_ReadPublic", rc)
        return nv.parse_read_public(response)

    def _there(self, index: int) -> nv.NvPublic:
        public = self._public(index)
        if public is None:
            raise FailedPreconditionError(
                "NV_INDEX_MISSING",
                f"the TPM has no NV index 0x{index:08x}",
                remedy="the guest's firmware has removed it, or another TPM's state was imported; the API has the certificate",
            )
        return public

    def _write_nv(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.write_nv
        size = self._there(order.index).size
        if len(order.data) > size:
            raise FailedPreconditionError(
                "NV_INDEX_TOO_SMALL",
                f"the NV index 0x{order.index:08x} has {size} bytes, and {len(order.data)} are to be written",
                remedy="power the instance off; at the next power on the index is made anew",
            )
        auth = self._durable.derive(lambda key, instance: nv_auth(key, instance, order.index))
        for command in nv.write_commands(order.index, order.data.ljust(size, b"\0"), by=order.index, auth=auth):
            self._run("TPM2_NV_Write", command)
        reply.done.SetInParent()

    def _read_nv(self, request: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
        order = request.read_nv
        public = self._there(order.index)
        auth = self._durable.derive(lambda key, instance: nv_auth(key, instance, order.index)) if order.secret_auth else b""
        reply.nv_contents.data = self._read(order.index, auth)
        reply.nv_contents.attributes = public.attributes


def _uuid(data: bytes) -> uuid.UUID:
    import uuid

    return uuid.UUID(bytes=data)

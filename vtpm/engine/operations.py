"""The service's own TPM operations, run between two guest commands.

Through ESAPI where keys are made; by commands built in vtpm.tpm.service where a running instance is served, as ESAPI's
marshalling takes longer than the TPM's signature and touches more memory (docs/decisions/0004-quotes-without-esapi.md).

Invariant 5: they use persistent keys and password sessions and leave no transient object, session or changed auth behind. The
AK lives in the platform hierarchy, so that they still work after TPM2_Clear or changed owner and endorsement auths.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tpm2_pytss import ESAPI
from tpm2_pytss.constants import ESYS_TR, TPM2_CAP
from tpm2_pytss.TSS2_Exception import TSS2_Exception
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMT_PUBLIC,
)

from vtpm.engine.missing_ak import missing_ak
from vtpm.engine.software import SoftwareTpm
from vtpm.engine.tcti import InProcessTcti
from vtpm.errors import EngineError, FailedPreconditionError, InvalidArgumentError, TpmError
from vtpm.tpm.codes import CommandCode, Handle, response_code_name
from vtpm.tpm.command import build
from vtpm.tpm.keys import AK_HANDLE, KeyAlgorithm, ak_template, ek_handle, ek_template, is_ak, key_algorithm
from vtpm.tpm.pcr import PcrBank, PcrSelection, marshal_selections
from vtpm.tpm.service import (
    MAX_READ,
    PH_ENABLE,
    hierarchy_change_auth_command,
    parse_pcr_read,
    parse_quote,
    parse_read_public,
    pcr_extend_command,
    pcr_read_command,
    quote_command,
    read_public_command,
    response_code,
    shutdown_clear_command,
    startup_clear_attributes,
    startup_clear_attributes_command,
    startup_clear_command,
)
from vtpm.tpm.signed_quote import check_quote

_TPM_LAYER_MASK = 0xFFFF0000
_RC_INITIALIZE = 0x100
_RC_HANDLE = 0x8B
# Format-one codes without the number of handle, parameter or session.
_RC_FORMAT_ONE_MASK = 0xBF
_RC_HIERARCHY = 0x85
_REMEDIES = {
    _RC_INITIALIZE: "the guest's firmware has not started the TPM; reset the instance with startup CLEAR",
    _RC_HIERARCHY: "the guest's firmware has disabled the platform hierarchy; it is back after a reset",
}


@contextmanager
def _tpm_errors(operation: str) -> Iterator[None]:
    try:
        yield
    except TSS2_Exception as error:
        if error.rc & _TPM_LAYER_MASK:
            raise EngineError("TSS_FAILED", f"{operation}: the TSS failed with 0x{error.rc:08x}") from None
        raise tpm_error(operation, error.rc) from None


def tpm_error(operation: str, rc: int) -> TpmError:
    """Return the error that a response code of a command of our own stands for."""
    name = response_code_name(rc)
    code = rc & 0xBF if rc & 0x80 else rc
    return TpmError(rc, name, f"{operation}: the TPM answered {name}", remedy=_REMEDIES.get(code, ""))


@dataclass(frozen=True, slots=True)
class ManufacturedKey:
    """A persistent key that manufacture made; `tpmt_public` as the TPM marshals it."""

    role: str
    algorithm: KeyAlgorithm
    handle: int
    tpmt_public: bytes


class Operations:
    """ESAPI over the TPM of this worker. One object serves every TPM that the process ever has."""

    def __init__(self, tpm: SoftwareTpm) -> None:
        self._tpm = tpm
        self._tcti = InProcessTcti(tpm)
        self._esapi: Any = ESAPI(self._tcti)
        self._banks: tuple[PcrBank, ...] | None = None
        # What kept the TPM from getting an AK when the service started it (TPM_RC); 0: nothing did.
        self.ak_rc = 0

    def forget(self) -> None:
        """Forget what was read from the TPM; after each power on."""
        self._banks = None
        self.ak_rc = 0

    def startup_clear(self) -> None:
        """TPM2_Startup(TPM_SU_CLEAR)."""
        self._run("TPM2_Startup", startup_clear_command())

    def started(self) -> bool:
        """Whether TPM2_Startup has succeeded, or the TPM has failed.

        The question is a command without its parameter. A command that fails leaves no trace.
        """
        return response_code(self._tcti.run(build(CommandCode.GetRandom, b""))) != _RC_INITIALIZE

    def close_platform(self) -> None:
        """Give the platform hierarchy an auth that nobody knows, as firmware does before it starts an operating system.

        Without it, a guest whose TPM was started by the service could evict the AK (TPM2_HierarchyChangeAuth; Part 3, 24.8).
        """
        command = hierarchy_change_auth_command(Handle.PLATFORM, secrets.token_bytes(32))
        self._run("TPM2_HierarchyChangeAuth", command)

    def shutdown_clear(self) -> None:
        """TPM2_Shutdown(TPM_SU_CLEAR)."""
        self._run("TPM2_Shutdown", shutdown_clear_command())

    def banks(self) -> tuple[PcrBank, ...]:
        """Return the allocated PCR banks (TPM2_GetCapability, TPM_CAP_PCRS)."""
        if self._banks is None:
            self._banks = tuple(bank for bank, allocated in self._implemented_banks().items() if allocated)
        return self._banks

    def _implemented_banks(self) -> dict[PcrBank, bool]:
        """Return the banks that the TPM can allocate, with whether they are."""
        with _tpm_errors("TPM2_GetCapability"):
            _, capability = self._esapi.get_capability(TPM2_CAP.PCRS, 0, 16)
        known = {bank.alg_id: bank for bank in PcrBank}
        return {
            known[int(selection.hash)]: any(bytes(selection.pcrSelect))
            for selection in capability.data.assignedPCR
            if int(selection.hash) in known
        }

    def read_pcrs(self, selections: Sequence[PcrSelection]) -> tuple[int, list[tuple[PcrBank, int, bytes]]]:
        """Return the PCR update counter and the selected values, in the order of the selection (TPM2_PCR_Read)."""
        wanted = list(selections) or [PcrSelection(bank, tuple(range(24))) for bank in self.banks()]
        values: list[tuple[PcrBank, int, bytes]] = []
        counter = 0
        for selection in wanted:
            for start in range(0, len(selection.indices), MAX_READ):
                indices = selection.indices[start : start + MAX_READ]
                command = pcr_read_command(PcrSelection(selection.bank, indices))
                counter, digests = parse_pcr_read(self._run("TPM2_PCR_Read", command))
                if len(digests) != len(indices):
                    raise FailedPreconditionError(
                        "PCR_BANK_NOT_ALLOCATED",
                        f"the {selection.bank.hash_name} bank is not allocated",
                        remedy="choose the banks at creation: --pcr-banks",
                    )
                values.extend((selection.bank, index, digest) for index, digest in zip(indices, digests, strict=True))
        return counter, values

    def _run(self, operation: str, command: bytes) -> bytes:
        """Run a command of our own at locality 0; return the response of its success."""
        response = self._tcti.run(command)
        if rc := response_code(response):
            raise tpm_error(operation, rc)
        return response

    def quote(
        self, selections: Sequence[PcrSelection], nonce: bytes, *, from_elsewhere: bool = False
    ) -> tuple[bytes, bytes, bytes]:
        """Return TPMS_ATTEST, TPMT_SIGNATURE and the TPMT_PUBLIC of the key that signed (TPM2_Quote; Part 3, 18.4).

        Looked at, used and verified with no command of the guest in between: a guest can put another key there at any time.
        `from_elsewhere` tells why there may be no AK (vtpm.engine.missing_ak).
        """
        public = self.ak_public(from_elsewhere=from_elsewhere)
        attest, signature = parse_quote(self._run("TPM2_Quote", quote_command(AK_HANDLE, selections, nonce)))
        check_quote(attest, signature, public, nonce)
        return attest, signature, public

    def ak_public(self, *, from_elsewhere: bool = False) -> bytes:
        """Return the AK's TPMT_PUBLIC as the TPM has it now (TPM2_ReadPublic); it may be another at the next call."""
        response = self._tcti.run(read_public_command(AK_HANDLE))
        rc = response_code(response)
        if rc & _RC_FORMAT_ONE_MASK == _RC_HANDLE:
            raise missing_ak(self.ak_rc, platform_enabled=self._platform_enabled(), from_elsewhere=from_elsewhere)
        if rc:
            raise tpm_error("TPM2_ReadPublic", rc)
        public = parse_read_public(response)
        if not is_ak(public):
            raise FailedPreconditionError(
                "AK_FOREIGN",
                "the key at the AK's handle is no restricted signing key of this TPM, so what it signs proves nothing",
                remedy="remove it with platform authorization and start the instance again",
            )
        return public

    def _platform_enabled(self) -> bool:
        """Whether firmware has left the platform hierarchy enabled, whose objects are out of reach otherwise."""
        return startup_clear_attributes(self._run("TPM2_GetCapability", startup_clear_attributes_command())) & PH_ENABLE != 0

    def keys(self) -> list[ManufacturedKey]:
        """Return the persistent keys that are where manufacture puts EKs and the AK."""
        found = []
        places = [("EK", algorithm, ek_handle(algorithm)) for algorithm in KeyAlgorithm]
        for role, algorithm, handle in [*places, ("AK", None, AK_HANDLE)]:
            response = self._tcti.run(read_public_command(handle))
            rc = response_code(response)
            if rc == 0:
                public = parse_read_public(response)
                try:
                    kind = key_algorithm(public)
                except InvalidArgumentError:
                    # The guest's own use of that handle, for an object that is no RSA or ECC key.
                    continue
                if kind is not None and algorithm in (None, kind) and (role != "AK" or is_ak(public)):
                    found.append(ManufacturedKey(role, kind, handle, public))
            elif rc & _RC_FORMAT_ONE_MASK != _RC_HANDLE:
                raise tpm_error("TPM2_ReadPublic", rc)
        return found

    def ensure_ak(self, algorithm: KeyAlgorithm) -> None:
        """Make the AK if there is none: the TPM of another program was imported. Platform auth is still empty.

        The TPM is its guest's: what keeps it from an AK, as NV that is full, is noted for who asks for a quote.
        """
        if response_code(self._tcti.run(read_public_command(AK_HANDLE))) & _RC_FORMAT_ONE_MASK == _RC_HANDLE:
            try:
                self._make_ak(algorithm)
            except TpmError as error:
                self.ak_rc = error.rc

    def extend(self, pcr: int, data: bytes) -> dict[PcrBank, bytes]:
        """Extend `pcr` with the digest of `data` in every allocated bank (TPM2_PCR_Extend); return the digests."""
        digests = {bank: hashlib.new(bank.hash_name, data).digest() for bank in self.banks()}
        self._run("TPM2_PCR_Extend", pcr_extend_command(pcr, digests))
        return digests

    # ---- manufacture -----------------------------------------------------------------------------------------------------

    def allocate_banks(self, banks: Sequence[PcrBank]) -> None:
        """Allocate exactly `banks`; in force after the next _TPM_Init (TPM2_PCR_Allocate)."""
        implemented = self._implemented_banks()
        if missing := [bank.hash_name for bank in banks if bank not in implemented]:
            raise EngineError("PCR_ALLOCATE_REFUSED", f"the TPM has no PCR bank {', '.join(missing)}")
        # A bank that it does not have must not be named, not even as one to leave out.
        selection = TPML_PCR_SELECTION.unmarshal(
            marshal_selections([PcrSelection(bank, tuple(range(24)) if bank in banks else ()) for bank in implemented])
        )[0]
        with _tpm_errors("TPM2_PCR_Allocate"):
            done, *_ = self._esapi.pcr_allocate(selection)
        if not done:
            raise EngineError("PCR_ALLOCATE_REFUSED", "the TPM can't allocate these PCR banks")

    def make_keys(self, ek_algorithms: Sequence[KeyAlgorithm], ak_algorithm: KeyAlgorithm) -> list[ManufacturedKey]:
        """Make EKs and the AK as primary keys and persist them; nothing transient is left."""
        keys = [
            self._make_primary(
                "EK", algorithm, ESYS_TR.ENDORSEMENT, ESYS_TR.OWNER, ek_template(algorithm), ek_handle(algorithm)
            )
            for algorithm in ek_algorithms
        ]
        # In the platform hierarchy the AK outlives TPM2_Clear, and only platform auth, which firmware randomises, evicts it.
        keys.append(self._make_ak(ak_algorithm))
        return keys

    def _make_ak(self, algorithm: KeyAlgorithm) -> ManufacturedKey:
        return self._make_primary("AK", algorithm, ESYS_TR.PLATFORM, ESYS_TR.PLATFORM, ak_template(algorithm), AK_HANDLE)

    def make_extra_key(self, algorithm: KeyAlgorithm, handle: int) -> ManufacturedKey:
        """Make a signing key in the endorsement hierarchy; persistent at `handle`, with 0 its public part alone is kept."""
        if handle:
            template = ak_template(algorithm)
            return self._make_primary("GUEST_AK", algorithm, ESYS_TR.ENDORSEMENT, ESYS_TR.OWNER, template, handle)
        transient, public = self._create_primary(ESYS_TR.ENDORSEMENT, ak_template(algorithm))
        with _tpm_errors("TPM2_FlushContext"):
            self._esapi.flush_context(transient)
        return ManufacturedKey("GUEST_AK", algorithm, 0, public)

    def make_transient_ak(self, algorithm: KeyAlgorithm) -> int:
        """Make that key again; return its handle, for the caller to flush."""
        return self._transient(ak_template(algorithm))

    def make_transient_ek(self, algorithm: KeyAlgorithm) -> int:
        """Make an EK again, whose handle the guest has emptied; return its transient handle, for the caller to flush."""
        return self._transient(ek_template(algorithm))

    def _transient(self, template: bytes) -> int:
        transient, _ = self._create_primary(ESYS_TR.ENDORSEMENT, template)
        handle = int(self._esapi.tr_get_tpm_handle(transient))
        # The TSS forgets the object; the TPM keeps it.
        self._esapi.tr_close(transient)
        return handle

    def _create_primary(self, hierarchy: int, template: bytes) -> tuple[Any, bytes]:
        public = TPM2B_PUBLIC(TPMT_PUBLIC.unmarshal(template)[0])
        with _tpm_errors("TPM2_CreatePrimary"):
            transient, made, *_ = self._esapi.create_primary(TPM2B_SENSITIVE_CREATE(), public, hierarchy)
        return transient, made.publicArea.marshal()

    def _make_primary(
        self, role: str, algorithm: KeyAlgorithm, hierarchy: int, evict_auth: int, template: bytes, handle: int
    ) -> ManufacturedKey:
        transient, public = self._create_primary(hierarchy, template)
        with _tpm_errors("TPM2_EvictControl"):
            try:
                persistent = self._esapi.evict_control(evict_auth, transient, handle)
                self._esapi.tr_close(persistent)
            finally:
                # Also where NV has no room for it (invariant 5).
                self._esapi.flush_context(transient)
        return ManufacturedKey(role, algorithm, handle, public)


def manufacture(
    tpm: SoftwareTpm,
    operations: Operations,
    ek_algorithms: Sequence[KeyAlgorithm],
    ak_algorithm: KeyAlgorithm,
    banks: Sequence[PcrBank],
    *,
    hold: bool = False,
) -> list[ManufacturedKey]:
    """Make a new TPM in `tpm`: seeds by the TPM itself, PCR banks, EKs, AK.

    It is left off, its state in `tpm.permanent`; with `hold` it is left on.
    """
    tpm.manufacture()
    operations.forget()
    operations.startup_clear()
    if set(operations.banks()) != set(banks):
        operations.allocate_banks(banks)
        operations.shutdown_clear()
        assert tpm.permanent is not None
        tpm.power_on(tpm.permanent)
        operations.forget()
        operations.startup_clear()
    keys = operations.make_keys(ek_algorithms, ak_algorithm)
    if not hold:
        operations.shutdown_clear()
        tpm.power_off()
    return keys

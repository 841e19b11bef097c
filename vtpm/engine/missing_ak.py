"""Why a TPM has no AK, told to who wants a quote: the very cause, and what helps."""

from __future__ import annotations

from typing import Final

from vtpm.errors import FailedPreconditionError
from vtpm.tpm.codes import TPM_RC_NV_SPACE, response_code_name
from vtpm.tpm.keys import AK_HANDLE

AK_MISSING: Final = "AK_MISSING"
_START: Final = "then reset the instance with startup CLEAR, at which it gets its AK"
_ROOM: Final = "let the guest undefine NV indices or evict persistent objects that it does not need, "


def missing_ak(rc: int, *, platform_enabled: bool, from_elsewhere: bool) -> FailedPreconditionError:
    """Return the error for a TPM that has no key at the AK's handle. `rc` kept it from getting one; 0: nothing did.

    `from_elsewhere`: its state was set by the VM's side since the service powered it on.
    Without a remedy where the worker can't tell: whether it ever had one is in the store (vtpm.instance.quotes).
    """
    if not platform_enabled:
        return FailedPreconditionError(
            AK_MISSING,
            "the guest's firmware has disabled the platform hierarchy, and the AK in it is out of reach",
            remedy="the AK is there again from the next reset until the firmware does so again",
        )
    if rc == TPM_RC_NV_SPACE:
        return FailedPreconditionError(AK_MISSING, "the TPM has no AK: its NV is full (TPM_RC_NV_SPACE)", remedy=_ROOM + _START)
    if rc:
        return FailedPreconditionError(
            AK_MISSING,
            f"the TPM has no AK: it refused to make one with {response_code_name(rc)}",
            remedy="let the guest put right what that code names, " + _START,
        )
    if from_elsewhere:
        return FailedPreconditionError(
            AK_MISSING,
            "the TPM has no AK: the VM's side has put another TPM's state in the place of the instance's (migration, loadvm)",
            remedy="end the VM and start the instance with startup CLEAR, at which it gets its AK",
        )
    return FailedPreconditionError(AK_MISSING, f"the TPM has no key at the AK's handle 0x{AK_HANDLE:08x}")

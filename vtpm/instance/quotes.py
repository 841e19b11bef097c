"""Whose key a quote is signed by: the instance's AK, as the store has it, or nobody's; and why there is none."""

from __future__ import annotations

from vtpm.engine.interface import Quoted
from vtpm.engine.missing_ak import AK_MISSING
from vtpm.errors import FailedPreconditionError, VtpmError
from vtpm.instance.certification import AK
from vtpm.store.model import InstanceRecord
from vtpm.tpm.keys import AK_HANDLE


def check_signer(record: InstanceRecord, quoted: Quoted) -> None:
    """Return if the key that signed, which the worker has verified, is the AK of `record`.

    The AK is the first that was written down: what a guest puts at its handle comes behind that. An instance whose AK is not
    known (a state from elsewhere that nobody has looked at yet) has none that it could be mistaken for.

    Raises:
        FailedPreconditionError: AK_FOREIGN.
    """
    ak = next((key for key in record.keys if key.role == AK), None)
    if ak is not None and quoted.ak_tpmt_public != ak.tpmt_public:
        raise FailedPreconditionError(
            "AK_FOREIGN",
            f"another key than the instance's AK is at the AK's handle 0x{AK_HANDLE:08x}: somebody with platform authorization "
            "has put it there; its quote is not handed out",
            subject=record.name,
            remedy="remove it with platform authorization (TPM2_EvictControl), then stop the instance and start it with "
            "--startup clear: the AK is made again",
        )


def unsigned(record: InstanceRecord, error: VtpmError) -> VtpmError:
    """Return the error of a quote that nobody could sign, with the cause that the worker can't know."""
    if error.reason != AK_MISSING or error.remedy:
        return error
    again = f"vtpm instance stop {record.name}, then vtpm instance start {record.name} --startup clear"
    if any(key.role == AK for key in record.keys):
        message = "the AK was removed with platform authorization (TPM2_EvictControl)"
        remedy = f"{again}: the same key is made again"
    else:
        message = (
            "the TPM has no AK: its state came from elsewhere (import, migration, loadvm), or its platform seed was changed "
            "(TPM2_ChangePPS), and the service has not started it since"
        )
        remedy = f"{again}: it gets its AK"
    return FailedPreconditionError(AK_MISSING, message, subject=record.name, remedy=remedy)

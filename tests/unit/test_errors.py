"""Errors tell the one who must act what happened to what, and what to do."""

from __future__ import annotations

import grpc
import pytest

from vtpm import errors
from vtpm.errors import ErrorKind, StoreError, TpmError, VtpmError


def test_an_error_is_one_line_of_subject_sentence_and_remedy() -> None:
    full = VtpmError("STORE_FULL", "the disk is full", subject="/var/lib/vtpm", remedy="free space on it")
    assert str(full) == "/var/lib/vtpm: the disk is full (free space on it)"
    assert str(VtpmError("STORE_FULL", "the disk is full", subject="/var/lib/vtpm")) == "/var/lib/vtpm: the disk is full"
    assert str(VtpmError("STORE_FULL", "the disk is full", remedy="free space")) == "the disk is full (free space)"
    assert str(VtpmError("STORE_FULL", "the disk is full")) == "the disk is full"


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_is_a_grpc_status_code(kind: ErrorKind) -> None:
    assert grpc.StatusCode[kind.value] not in {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("VtpmError", ErrorKind.INTERNAL),
        ("InvalidArgumentError", ErrorKind.INVALID_ARGUMENT),
        ("NotFoundError", ErrorKind.NOT_FOUND),
        ("AlreadyExistsError", ErrorKind.ALREADY_EXISTS),
        ("FailedPreconditionError", ErrorKind.FAILED_PRECONDITION),
        ("ConflictError", ErrorKind.ABORTED),
        ("UnavailableError", ErrorKind.UNAVAILABLE),
        ("ConfigError", ErrorKind.FAILED_PRECONDITION),
        ("SealedStateError", ErrorKind.DATA_LOSS),
        ("KeyProviderError", ErrorKind.FAILED_PRECONDITION),
        ("StoreError", ErrorKind.UNAVAILABLE),
        ("EngineError", ErrorKind.UNAVAILABLE),
    ],
)
def test_an_error_is_of_the_kind_that_a_caller_can_act_on(name: str, kind: ErrorKind) -> None:
    error = getattr(errors, name)("REASON", "a sentence")
    assert isinstance(error, VtpmError)
    assert error.kind is kind


def test_one_error_of_another_kind_leaves_its_family_as_it_is() -> None:
    refused = StoreError("STORE_FULL", "the disk is full", kind=ErrorKind.RESOURCE_EXHAUSTED)
    assert refused.kind is ErrorKind.RESOURCE_EXHAUSTED
    assert StoreError("STORE_BUSY", "held").kind is ErrorKind.UNAVAILABLE


def test_metadata_is_a_copy_that_no_one_else_changes() -> None:
    given = {"epoch": "1"}
    refused = VtpmError("EPOCH_STALE", "stale", metadata=given)
    given["epoch"] = "2"
    assert refused.metadata == {"epoch": "1"}
    refused.metadata["epoch"] = "3"
    assert VtpmError("EPOCH_STALE", "stale").metadata == {}


def test_a_tpm_error_carries_the_response_code_by_number_and_name() -> None:
    refused = TpmError(0x1C4, "TPM_RC_VALUE (parameter 1)", "TPM2_PCR_Read failed", subject="web-1")
    assert (refused.reason, refused.kind, refused.rc) == ("TPM_ERROR", ErrorKind.FAILED_PRECONDITION, 0x1C4)
    assert refused.metadata == {"tpm_rc": "0x1c4", "tpm_rc_name": "TPM_RC_VALUE (parameter 1)"}
    assert str(refused) == "web-1: TPM2_PCR_Read failed"


def test_a_small_response_code_has_three_digits() -> None:
    assert TpmError(0x0, "TPM_RC_SUCCESS", "odd").metadata["tpm_rc"] == "0x000"

"""Values that the tests of the conversions begin with."""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid

from cryptography.hazmat.primitives.asymmetric import ec

from vtpm.store.model import Failure, InstanceRecord, InstanceState, KeyRecord, ProfileRecord

TIME = dt.datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=dt.UTC)


def ak_public() -> bytes:
    """A TPMT_PUBLIC of a P-256 signing key (TPM 2.0 Library, Part 2, 12.2.4)."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    point = b"".join(b"\0\x20" + value.to_bytes(32, "big") for value in (numbers.x, numbers.y))
    head = bytes.fromhex("0023000b000504720000")
    return head + bytes.fromhex("00100018000b00030010") + point


AK_PUBLIC = ak_public()


def a_record(name: str = "web-1", **changes: object) -> InstanceRecord:
    record = InstanceRecord(
        id=uuid.uuid4(),
        name=name,
        labels={"team": "web"},
        state=InstanceState.OFF,
        failure=None,
        profile=ProfileRecord(("RSA_2048", "ECC_P384"), "ECC_P256", ("sha256", "sha384")),
        keys=(KeyRecord("AK", "ECC_P256", 0x81800003, AK_PUBLIC),),
        engine="libtpms",
        epoch=0,
        boot_id="",
        revision=1,
        created_at=TIME,
        updated_at=TIME,
    )
    return dataclasses.replace(record, **changes)  # type: ignore[arg-type]


A_FAILURE = Failure("WORKER_LOST", "the worker ended", "vtpm instance reset web-1", TIME)

"""What a worker says of its TPM's keys is a claim; only opened credentials make certificates of it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.store.given import a_new_instance, open_store
from tests.unit.tpm.test_credential import EKS, opened
from vtpm.engine.identity import Challenge, FreshTpm
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.errors import AlreadyExistsError, EngineError, NotFoundError
from vtpm.instance.certification import Certification, description_in
from vtpm.pki.authority import Authority
from vtpm.pki.making import make_issuing, make_root
from vtpm.pki.model import IssuingPolicy
from vtpm.pki.signer import KeySigner
from vtpm.store.model import PlatformRecord
from vtpm.store.store import Store
from vtpm.tpm.keys import KeyAlgorithm, ak_template, name_of
from vtpm.tpm.layouts import NvLayout

NOW = dt.datetime.now(dt.UTC)
INSTANCE = uuid.UUID(int=7)
HANDLES = {KeyAlgorithm.ECC_P256: 0x81010002, KeyAlgorithm.ECC_P384: 0x81010016}


def an_authority() -> Authority:
    root = make_root("root", now=NOW)
    issuing = make_issuing(root, "issuing", now=NOW)
    return Authority([issuing.certificate, root.certificate], KeySigner(issuing.key), IssuingPolicy())


def an_ak() -> bytes:
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    unique = b"".join(struct.pack(">H", 32) + number.to_bytes(32, "big") for number in (numbers.x, numbers.y))
    return ak_template(KeyAlgorithm.ECC_P256)[:-4] + unique


AK = an_ak()


class Worker(FreshTpm):
    """A TPM in a worker whose answers `answer` changes; the credentials are opened as a TPM opens them."""

    def __init__(self, answer: Callable[[list[bytes]], list[bytes]], ak: bytes = AK, eks: Sequence[KeyAlgorithm] = ()) -> None:
        eks = eks or list(HANDLES)
        keys = [pb.ManufacturedKey(role="EK", algorithm=ek, handle=HANDLES[ek], tpmt_public=EKS[ek][1]) for ek in eks]
        keys.append(pb.ManufacturedKey(role="AK", algorithm="ECC_P256", handle=0x81800003, tpmt_public=ak))
        properties = pb.TpmProperties(manufacturer=0x49424D00, vendor="SW   TPM", firmware_version=0x20191023, revision=164)
        super().__init__(_nobody, pb.Manufactured(keys=keys, properties=properties))
        self.answer = answer

    async def activate(self, challenges: Sequence[Challenge]) -> list[bytes]:
        secrets = [
            opened(KeyAlgorithm(item.ek.algorithm), item.credential, name_of(item.ak.tpmt_public)) for item in challenges
        ]
        return self.answer(secrets)


async def _nobody(_request: pb.WorkerRequest) -> pb.WorkerReply:
    raise AssertionError


async def _here(function: Callable[[], Any]) -> Any:
    return function()


def a_certification() -> Certification:
    return Certification(an_authority(), INSTANCE, NvLayout.TCG, PlatformRecord("Maker", "Model", "1"), _here)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path / 'vtpm.db'}")
    yield opened
    opened.close()


async def test_a_tpm_that_opens_all_is_certified() -> None:
    certification = a_certification()
    entries = await certification(Worker(lambda secrets: secrets))
    made = {(item.kind, item.algorithm): item for item in certification.certificates}
    assert set(made) == {("EK", "ECC_P256"), ("EK", "ECC_P384"), ("AK", "ECC_P256"), ("PLATFORM", "")}
    assert len(entries) == 4
    assert all(item.instance == INSTANCE for item in made.values())
    tpm = description_in(made["EK", "ECC_P256"].der)
    assert (tpm.manufacturer, tpm.model, tpm.version) == ("id:49424D00", "SW TPM", "id:20191023")


@pytest.mark.parametrize(
    "answer",
    [
        lambda _secrets: [],
        lambda secrets: secrets[:-1],
        lambda secrets: secrets[::-1],
        lambda secrets: [*secrets[:-1], bytes(32)],
        lambda secrets: [*secrets[:-1], b""],
        lambda secrets: [*secrets, secrets[0]],
    ],
)
async def test_a_tpm_that_does_not_is_not(answer: Callable[[list[bytes]], list[bytes]]) -> None:
    certification = a_certification()
    with pytest.raises(EngineError) as raised:
        await certification(Worker(answer))
    assert raised.value.reason == "IDENTITY_NOT_PROVEN"
    assert certification.certificates == ()


async def test_a_key_that_is_not_of_its_template_is_not_even_asked() -> None:
    loose = bytearray(AK)
    # TPMA_OBJECT without `restricted`: it could sign a made-up quote.
    loose[5] &= 0xFE
    with pytest.raises(EngineError) as raised:
        await a_certification()(Worker(lambda secrets: secrets, bytes(loose)))
    assert raised.value.reason == "IDENTITY_NOT_PROVEN"


async def test_two_instances_can_t_have_one_tpm_s_keys(store: Store) -> None:
    """A worker that answers for two instances at once, with a TPM that can: the second is refused, and the first keeps its."""
    worker, authority = Worker(lambda secrets: secrets), an_authority()
    new = [a_new_instance("web-1"), a_new_instance("web-2")]
    for item in new:
        certification = Certification(authority, item.id, NvLayout.TCG, PlatformRecord("Maker", "Model", "1"), _here)
        await certification(worker)
        made = dataclasses.replace(item, certificates=certification.certificates)
        if item is new[0]:
            store.create(made)
            continue
        with pytest.raises(AlreadyExistsError) as raised:
            store.create(made)
        assert raised.value.reason == "KEY_CERTIFIED_ELSEWHERE"
        with pytest.raises(NotFoundError):
            store.get("web-2")
    assert len(store.certificates.current(new[0].id)) == 4
    assert store.certificates.history(new[1].id) == []

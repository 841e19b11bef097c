"""What a worker or an engine host says is bounded, whatever its bytes are: a message within its bounds, or a violation."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.fuzz import filled
from vtpm.engine import validate, validate_host
from vtpm.engine.stats import BUCKETS_NS
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.validate import ViolationError

INSTANCE = "11111111-1111-1111-1111-111111111111"


def refused(what: Any, *arguments: Any) -> str:
    with pytest.raises(ViolationError) as found:
        what(*arguments)
    return found.value.code


def asked(kind: str) -> pb.WorkerRequest:
    request = pb.WorkerRequest(id=1)
    getattr(request, kind).SetInParent()
    return request


# ---- any bytes ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(message=st.binary(max_size=200), epoch=st.integers(0, 3))
def test_any_bytes_are_a_commit_that_the_store_can_take_or_a_violation(message: bytes, epoch: int) -> None:
    try:
        found = validate.commit(message, epoch)
    except ViolationError:
        return
    assert found.epoch == epoch > 0
    assert 0 < found.version < 1 << 63


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_any_commit_is_one_that_the_store_can_take_or_a_violation(seed: int) -> None:
    rng = random.Random(seed)
    message = filled(pb.Commit, rng)
    assert isinstance(message, pb.Commit)
    message.epoch = rng.choice((0, 1, 1, 1, 1 << 63))
    try:
        found = validate.commit(message.SerializeToString(), 1)
    except ViolationError:
        return
    assert found.epoch == 1
    assert 0 < found.version < 1 << 63
    match found.kind:
        case pb.Commit.CONSUME:
            assert len(found.token) == 16
            assert not found.sealed
        case _:
            assert 0 < len(found.sealed) <= validate.MAX_SNAPSHOT_SIZE
            assert not found.token


@settings(max_examples=500, deadline=None)
@given(kind=st.sampled_from(sorted(validate.REPLIES)), seed=st.integers(0, 1 << 32))
def test_any_reply_is_what_was_asked_for_or_a_violation(kind: str, seed: int) -> None:
    reply = filled(pb.WorkerReply, random.Random(seed))
    assert isinstance(reply, pb.WorkerReply)
    reply.id = 1
    try:
        parsed, body = validate.parse_reply(reply.SerializeToString())
        validate.reply_to(asked(kind), parsed)
    except ViolationError:
        return
    assert parsed.HasField("fault") or body == validate.REPLIES[kind]
    for row in parsed.status.ordinals:
        assert len(row.buckets) == len(BUCKETS_NS) + 1
    for value in parsed.pcr_values.values:
        assert value.index < 24
        assert len(value.digest) in (20, 32, 48, 64)


@settings(max_examples=500, deadline=None)
@given(kind=st.sampled_from(sorted(validate.REPLIES)), seeds=st.tuples(st.integers(0, 1 << 32), st.integers(0, 1 << 32)))
def test_a_reply_is_judged_alike_by_its_request_and_by_the_outline_of_that(kind: str, seeds: tuple[int, int]) -> None:
    requests, reply = (
        filled(which, random.Random(seed)) for which, seed in zip((pb.WorkerRequest, pb.WorkerReply), seeds, strict=True)
    )
    assert isinstance(requests, pb.WorkerRequest)
    assert isinstance(reply, pb.WorkerReply)
    request = requests if requests.WhichOneof("body") else asked(kind)

    def judged(by: pb.WorkerRequest) -> str:
        try:
            validate.reply_to(by, reply)
        except ViolationError as violation:
            return violation.code
        return ""

    outline = validate.outline(request)
    assert outline.WhichOneof("body") == request.WhichOneof("body")
    assert judged(outline) == judged(request)


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (
            pb.WorkerRequest(prove=pb.ActivateCredentials(credentials=[pb.Credential(), pb.Credential(ak=7)])),
            pb.WorkerReply(activated_credentials=pb.ActivatedCredentials(secrets=[b"1", b"2"])),
        ),
        (
            pb.WorkerRequest(measure=pb.Measure(pcr=16, data=b"x")),
            pb.WorkerReply(pcr_values=pb.PcrValues(values=[pb.PcrValue(hash_alg=11, index=16, digest=bytes(32))])),
        ),
        (
            pb.WorkerRequest(manufacture=pb.Manufacture(data_key=bytes(32), hold=True)),
            pb.WorkerReply(manufactured=pb.Manufactured()),
        ),
    ],
)
def test_what_a_good_reply_rests_on_is_in_the_outline(request_: pb.WorkerRequest, reply: pb.WorkerReply) -> None:
    outline = validate.outline(request_)
    validate.reply_to(request_, reply)
    validate.reply_to(outline, reply)
    assert outline.ByteSize() < 10, "no data and no key"


@settings(max_examples=300, deadline=None)
@given(message=st.binary(max_size=300))
def test_any_bytes_are_a_reply_or_a_violation(message: bytes) -> None:
    try:
        reply, kind = validate.parse_reply(message)
    except ViolationError:
        return
    assert bool(reply.id) != (kind in validate.UNSOLICITED)


@settings(max_examples=500, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_what_the_engine_host_says_is_bounded_or_a_violation(seed: int) -> None:
    message = filled(pb.HostReply, random.Random(seed))
    try:
        found = validate_host.host_reply(message.SerializeToString())
    except ViolationError:
        return
    for about in (*found.hello.parked, *found.handed_over.parked, *found.copied.parked):
        assert len(about.instance) == len(INSTANCE)
        assert about.epoch < 1 << 63


# ---- each bound --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"version": 0}, "COMMIT_VERSION"),
        ({"version": 1 << 63}, "COMMIT_VERSION"),
        ({"epoch": 2}, "COMMIT_EPOCH"),
        ({"epoch": 1 << 63}, "COMMIT_EPOCH"),
        ({"sealed": b""}, "COMMIT_SIZE"),
        ({"sealed": bytes(validate.MAX_STATE_SIZE + 1)}, "COMMIT_SIZE"),
        ({"kind": pb.Commit.SNAPSHOT, "sealed": bytes(validate.MAX_SNAPSHOT_SIZE + 1)}, "COMMIT_SIZE"),
        ({"kind": 3}, "COMMIT_KIND"),
        ({"kind": pb.Commit.CONSUME, "sealed": b"", "token": bytes(15)}, "COMMIT_TOKEN"),
        ({"kind": pb.Commit.CONSUME, "sealed": b"x", "token": bytes(16)}, "COMMIT_FIELDS"),
        ({"token": bytes(16)}, "COMMIT_FIELDS"),
        ({"attached": True}, "COMMIT_FIELDS"),
    ],
)
def test_each_bound_of_a_commit_is_kept(fields: dict[str, Any], code: str) -> None:
    good: dict[str, Any] = {"epoch": 1, "version": 5, "sealed": b"sealed"}
    assert validate.commit(pb.Commit(**good).SerializeToString(), 1).version == 5
    assert refused(validate.commit, pb.Commit(**{**good, **fields}).SerializeToString(), 1) == code


def test_a_worker_without_an_instance_commits_nothing() -> None:
    assert refused(validate.commit, pb.Commit(version=1, sealed=b"x").SerializeToString(), 0) == "COMMIT_UNOWNED"


def test_a_whole_snapshot_and_the_use_of_one_are_good() -> None:
    snapshot = pb.Commit(epoch=1, version=1, kind=pb.Commit.SNAPSHOT, sealed=bytes(validate.MAX_SNAPSHOT_SIZE), attached=True)
    assert len(snapshot.SerializeToString()) <= validate.MAX_COMMIT_SIZE
    assert validate.commit(snapshot.SerializeToString(), 1).attached
    use = pb.Commit(epoch=1, version=1, kind=pb.Commit.CONSUME, token=bytes(16))
    assert validate.commit(use.SerializeToString(), 1).token == bytes(16)


def a_row(**changes: Any) -> pb.OrdinalCount:
    fields: dict[str, Any] = {"ordinal": 0x17E, "count": 5, "nanos": 9, "buckets": [0] * (len(BUCKETS_NS) + 1)}
    return pb.OrdinalCount(**{**fields, **changes})


SHA256 = 0x000B
A_KEY: dict[str, Any] = {"role": "EK", "algorithm": "ECC_P256", "handle": 0x81010001, "tpmt_public": b"public"}


@pytest.mark.parametrize(
    ("kind", "reply", "code"),
    [
        ("get_status", pb.WorkerReply(status=pb.Status(ordinals=[a_row(buckets=[1])])), "STATUS_BUCKETS"),
        ("get_status", pb.WorkerReply(status=pb.Status(ordinals=[a_row(), a_row()])), "STATUS_ORDINALS"),
        ("get_status", pb.WorkerReply(status=pb.Status(ordinals=[a_row(ordinal=0x99999)])), "STATUS_ORDINALS"),
        ("get_status", pb.WorkerReply(status=pb.Status(ordinals=[a_row(count=1 << 60)])), "STATUS_COUNT"),
        ("get_status", pb.WorkerReply(status=pb.Status(ordinals=[a_row(count=0, buckets=[1] * 10)])), "STATUS_COUNT"),
        ("get_status", pb.WorkerReply(status=pb.Status(version=1 << 63)), "STATUS_VERSION"),
        ("get_status", pb.WorkerReply(done=pb.Done()), "REPLY_KIND"),
        ("get_status", pb.WorkerReply(), "REPLY_KIND"),
        ("hibernate", pb.WorkerReply(done=pb.Done()), "REPLY_KIND"),
        ("execute", pb.WorkerReply(executed=pb.Executed(response=b"short")), "RESPONSE_SIZE"),
        ("execute", pb.WorkerReply(executed=pb.Executed(response=bytes(10))), "RESPONSE_SIZE"),
        ("execute", pb.WorkerReply(executed=pb.Executed(response=bytes(4097))), "RESPONSE_SIZE"),
        ("read_pcrs", pb.WorkerReply(pcr_values=pb.PcrValues(values=[pb.PcrValue(hash_alg=1)])), "PCR_UNKNOWN"),
        ("read_pcrs", pb.WorkerReply(pcr_values=pb.PcrValues(values=[pb.PcrValue(hash_alg=SHA256, index=24)])), "PCR_UNKNOWN"),
        (
            "read_pcrs",
            pb.WorkerReply(pcr_values=pb.PcrValues(values=[pb.PcrValue(hash_alg=SHA256, digest=b"x")])),
            "PCR_DIGEST",
        ),
        (
            "read_pcrs",
            pb.WorkerReply(pcr_values=pb.PcrValues(values=[pb.PcrValue(hash_alg=SHA256, digest=bytes(32))] * 2)),
            "PCR_TWICE",
        ),
        (
            "measure",
            pb.WorkerReply(pcr_values=pb.PcrValues(values=[pb.PcrValue(hash_alg=SHA256, index=3, digest=bytes(32))])),
            "PCR_OTHER",
        ),
        ("quote", pb.WorkerReply(quoted=pb.Quoted(attest=bytes(5000))), "QUOTE_SIZE"),
        ("get_event_log", pb.WorkerReply(event_log=pb.EventLog(event_log=bytes((256 << 10) + 1))), "EVENT_LOG_SIZE"),
        ("get_keys", pb.WorkerReply(keys=pb.Keys(keys=[pb.ManufacturedKey(**A_KEY)] * 17)), "KEY_COUNT"),
        ("get_keys", pb.WorkerReply(keys=pb.Keys(keys=[pb.ManufacturedKey(**{**A_KEY, "role": "CA"})])), "KEY_KIND"),
        ("get_keys", pb.WorkerReply(keys=pb.Keys(pcr_banks=["sha256", "sha256"])), "KEYS_BANKS"),
        ("get_keys", pb.WorkerReply(keys=pb.Keys(identity_generation=1 << 63)), "KEYS_GENERATION"),
        ("activate_credentials", pb.WorkerReply(activated_credentials=pb.ActivatedCredentials(secrets=[b"x"])), "SECRET_COUNT"),
        ("provision", pb.WorkerReply(provisioned=pb.Provisioned()), "SEALED_SIZE"),
        ("read_nv", pb.WorkerReply(nv_contents=pb.NvContents(data=bytes(2049))), "NV_SIZE"),
        ("load", pb.WorkerReply(fault=pb.Fault(kind="KIND", reason="A_REASON")), "FAULT_KIND"),
        ("load", pb.WorkerReply(fault=pb.Fault(kind="INTERNAL", reason="no name")), "FAULT_REASON"),
        ("load", pb.WorkerReply(fault=pb.Fault(kind="INTERNAL", reason="A_REASON", message="\x1b[2J")), "FAULT_TEXT"),
    ],
)
def test_each_bound_of_a_reply_is_kept(kind: str, reply: pb.WorkerReply, code: str) -> None:
    reply.id = 1
    assert refused(validate.reply_to, asked(kind), reply) == code


def test_a_reply_has_the_room_that_its_kind_needs() -> None:
    assert validate.largest_reply([]) < 100
    assert validate.largest_reply(["get_status"]) < 64 << 10
    assert validate.largest_reply(["get_status", "manufacture"]) > validate.MAX_STATE_SIZE


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (pb.HostReply(wake=pb.Wake(instance="../x", epoch=1)), "HOST_INSTANCE"),
        (pb.HostReply(wake=pb.Wake(instance=f"{INSTANCE}/manufacture", epoch=1)), "HOST_INSTANCE"),
        (pb.HostReply(wake=pb.Wake(instance=INSTANCE, epoch=1 << 63)), "HOST_EPOCH"),
        (pb.HostReply(wake=pb.Wake(instance=INSTANCE, epoch=1, pid=-1)), "HOST_PID"),
        (pb.HostReply(exited=pb.WorkerExited(instance=INSTANCE, epoch=1, pid=0)), "HOST_STATUS"),
        (pb.HostReply(exited=pb.WorkerExited(instance=INSTANCE, epoch=1, pid=5, status=5000)), "HOST_STATUS"),
        (
            pb.HostReply(
                exited=pb.WorkerExited(
                    instance=INSTANCE, epoch=1, pid=5, parked=pb.ParkedInstance(instance=INSTANCE, epoch=2, roles=[pb.DATA])
                )
            ),
            "HOST_INSTANCE",
        ),
        (pb.HostReply(hello=pb.HelloReply(workers=[pb.RunningWorker(instance="x", pid=5)])), "HOST_INSTANCE"),
        (pb.HostReply(hello=pb.HelloReply(version="\n")), "HOST_TEXT"),
        (pb.HostReply(copied=pb.HandedOver(parked=[pb.ParkedInstance(instance=INSTANCE, roles=[pb.OPERATIONS])])), "PARK_ROLE"),
    ],
)
def test_each_bound_of_the_engine_host_is_kept(reply: pb.HostReply, code: str) -> None:
    assert refused(validate_host.host_reply, reply.SerializeToString()) == code

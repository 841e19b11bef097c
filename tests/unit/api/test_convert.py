"""Protos and values say the same thing."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.api.given import A_FAILURE, AK_PUBLIC, TIME, a_record
from vtpm.api import convert
from vtpm.api.pages import make_page_token, parse_page_token
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2 as tpm_pb
from vtpm.errors import InvalidArgumentError
from vtpm.instance.model import InstanceChange, LabelChanges
from vtpm.store.model import InstanceState
from vtpm.tpm.keys import KeyAlgorithm
from vtpm.tpm.pcr import PcrBank, PcrSelection


def reason_of(function: object, *args: object) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        function(*args)  # type: ignore[operator]
    return caught.value.reason


def test_an_instance_is_shown_as_it_is() -> None:
    record = a_record("db", state=InstanceState.FAILED, failure=A_FAILURE, epoch=7, revision=42)
    shown = convert.instance_to_proto(record, Path("/r/tpm.sock"), Path("/r/guest.sock"), Path("/r/control.sock"))
    assert (shown.id, shown.name, dict(shown.labels), shown.engine) == (str(record.id), "db", {"team": "web"}, "libtpms")
    assert (shown.state, shown.epoch, shown.etag) == (pb.FAILED, 7, "42")
    assert (shown.failure.reason, shown.failure.remedy) == ("WORKER_LOST", "vtpm instance reset web-1")
    assert shown.failure.time.ToDatetime(TIME.tzinfo) == TIME
    assert shown.create_time.ToDatetime(TIME.tzinfo) == TIME
    assert list(shown.profile.ek_algorithms) == [pb.RSA_2048, pb.ECC_P384]
    assert list(shown.profile.pcr_banks) == [pb.SHA256, pb.SHA384]


def test_a_running_instance_names_its_sockets_and_keys() -> None:
    shown = convert.instance_to_proto(
        a_record(state=InstanceState.ON), Path("/r/tpm.sock"), Path("/r/guest.sock"), Path("/r/control.sock")
    )
    assert (shown.tpm_socket, shown.guest_socket) == ("/r/tpm.sock", "/r/guest.sock")
    assert shown.control_socket == "/r/control.sock"
    assert not shown.HasField("failure")
    (key,) = shown.keys
    assert (key.role, key.algorithm, key.handle, key.tpmt_public) == (pb.AK, pb.ECC_P256, 0x81800003, AK_PUBLIC)
    assert key.public_pem.startswith("-----BEGIN PUBLIC KEY-----")


def test_every_algorithm_bank_state_and_change_has_its_number() -> None:
    assert [pb.KeyAlgorithm.Name(v) for v in pb.KeyAlgorithm.values()[1:]] == [a.value for a in KeyAlgorithm]
    assert [convert.key_algorithm(v) for v in pb.KeyAlgorithm.values()[1:]] == [a.value for a in KeyAlgorithm]
    assert [PcrBank.from_name(convert.pcr_bank(v)) for v in pb.PcrBank.values()[1:]] == list(PcrBank)
    assert {pb.State.Name(v) for v in pb.State.values()[1:]} == {state.value for state in InstanceState}
    assert convert.event_type(InstanceChange("SYNCED", None)) == pb.InstanceEvent.SYNCED


def test_a_create_request_is_taken_over() -> None:
    request = pb.CreateInstanceRequest(
        name="a", labels={"k": "v"}, engine="tpm_server", request_id="r",
        profile=pb.Profile(ek_algorithms=[pb.RSA_3072], ak_algorithm=pb.RSA_2048, pcr_banks=[pb.SHA1, pb.SHA512]),
    )  # fmt: skip
    made = convert.create_request(request)
    assert (made.name, made.labels, made.engine, made.request_id) == ("a", {"k": "v"}, "tpm_server", "r")
    assert (made.ek_algorithms, made.ak_algorithm, made.pcr_banks) == (("RSA_3072",), "RSA_2048", ("sha1", "sha512"))
    empty = convert.create_request(pb.CreateInstanceRequest())
    assert (empty.ek_algorithms, empty.ak_algorithm, empty.pcr_banks) == ((), "", ())


@pytest.mark.parametrize(
    "profile",
    [
        pb.Profile(ek_algorithms=[pb.KEY_ALGORITHM_UNSPECIFIED]),
        pb.Profile(ek_algorithms=[99]),  # type: ignore[list-item]  # an enum value of a later version
        pb.Profile(ak_algorithm=99),  # type: ignore[arg-type]
        pb.Profile(pcr_banks=[-1]),  # type: ignore[list-item]
        pb.Profile(pcr_banks=[pb.SHA256] * 17),
    ],
)
def test_unknown_profile_values_are_refused(profile: pb.Profile) -> None:
    assert reason_of(convert.create_request, pb.CreateInstanceRequest(profile=profile)) == "PROFILE_INVALID"


def update(*paths: str, **labels: str) -> pb.UpdateInstanceRequest:
    return pb.UpdateInstanceRequest(instance="a", labels=labels, update_mask=FieldMask(paths=paths))


@pytest.mark.parametrize(
    ("request_", "changes"),
    [
        (update("labels", a="1"), LabelChanges(replace=True, set={"a": "1"})),
        (update("labels"), LabelChanges(replace=True)),
        (update("*", a="1"), LabelChanges(replace=True, set={"a": "1"})),
        (update(a="1"), LabelChanges(replace=True, set={"a": "1"})),
        (update("labels.a", "labels.b", a="1", c="3"), LabelChanges(set={"a": "1"}, remove=("b",))),
        (update("labels.`x.y/z`"), LabelChanges(remove=("x.y/z",))),
        (update("labels.x.y"), LabelChanges(remove=("x.y",))),
    ],
)
def test_an_update_mask_says_which_labels_change(request_: pb.UpdateInstanceRequest, changes: LabelChanges) -> None:
    assert convert.label_changes(request_) == changes


@pytest.mark.parametrize("paths", [(), ("name",), ("labels.",), ("labels", "labels.a"), ("labels.a", "state"), ("", "")])
def test_a_mask_of_anything_else_is_refused(paths: tuple[str, ...]) -> None:
    assert reason_of(convert.label_changes, update(*paths)) == "UPDATE_MASK_INVALID"


@pytest.mark.parametrize("etag", ["x", "-1", "1.0", "٣", "9" * 19, " 1"])
def test_an_etag_that_was_never_given_out_is_refused(etag: str) -> None:
    assert reason_of(convert.revision, etag) == "ETAG_INVALID"


def test_an_etag_is_a_revision() -> None:
    assert convert.revision("") is None
    assert convert.revision(convert.etag(a_record(revision=12))) == 12


def test_page_sizes_are_bounded() -> None:
    assert [convert.page_size(asked) for asked in (0, 1, 1000, 2**31 - 1)] == [100, 1, 1000, 1000]
    assert reason_of(convert.page_size, -1) == "PAGE_SIZE_INVALID"


@pytest.mark.parametrize(("ref", "reason"), [
    ("", "INSTANCE_REQUIRED"), ("instances/", "INSTANCE_REQUIRED"), ("x" * 129, "INSTANCE_REF_INVALID"),
    ("a\nb", "INSTANCE_REF_INVALID"),
])  # fmt: skip
def test_what_can_name_no_instance_is_refused(ref: str, reason: str) -> None:
    assert reason_of(convert.instance_ref, ref) == reason


def select(*selections: tuple[str, list[int]]) -> list[tpm_pb.PcrSelection]:
    return [tpm_pb.PcrSelection(hash_algorithm=name, indices=indices) for name, indices in selections]


def test_selections_are_sorted_and_distinct() -> None:
    chosen = convert.pcr_selections(select(("sha256", [7, 0, 7]), ("sha1", [23])))
    assert chosen == (PcrSelection(PcrBank.SHA256, (0, 7)), PcrSelection(PcrBank.SHA1, (23,)))
    assert convert.pcr_selections([]) == ()


@pytest.mark.parametrize(("selections", "reason"), [
    (select(("md5", [0])), "PCR_BANK_UNKNOWN"),
    (select(("", [0])), "PCR_BANK_UNKNOWN"),
    (select(("sha256", [24])), "PCR_INDEX_INVALID"),
    (select(("sha256", [2**32 - 1])), "PCR_INDEX_INVALID"),
    (select(("sha256", [])), "PCR_SELECTION_INVALID"),
    (select(("sha256", [0] * 25)), "PCR_SELECTION_INVALID"),
    (select(("sha256", [0]), ("sha256", [1])), "PCR_SELECTION_INVALID"),
    (select(*[("sha256", [0])] * 5), "PCR_SELECTION_INVALID"),
])  # fmt: skip
def test_selections_that_mean_nothing_are_refused(selections: list[tpm_pb.PcrSelection], reason: str) -> None:
    assert reason_of(convert.pcr_selections, selections) == reason


@given(st.uuids(), st.text(max_size=40))
def test_a_page_token_comes_back_with_its_filter(last: uuid.UUID, wanted: str) -> None:
    assert parse_page_token(make_page_token(last, wanted), wanted) == last


@given(st.uuids(), st.sampled_from(["", "state=ON", "name=a"]))
def test_a_page_token_with_another_filter_is_refused(last: uuid.UUID, wanted: str) -> None:
    token = make_page_token(last, wanted)
    assert reason_of(parse_page_token, token, "labels.team=web") == "PAGE_TOKEN_INVALID"


@given(st.text(max_size=60))
def test_no_text_but_a_token_is_taken_for_one(text: str) -> None:
    if text:
        assert reason_of(parse_page_token, text, "") == "PAGE_TOKEN_INVALID"


# Not the last character: a part of its bits means nothing in base64.
@given(st.uuids(), st.integers(0, 32), st.integers(1, 61))
def test_a_token_of_which_a_character_changed_is_refused_or_another_position(last: uuid.UUID, at: int, by: int) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    token = make_page_token(last, "")
    other = token[:at] + alphabet[(alphabet.index(token[at]) + by) % 64] + token[at + 1 :]
    with contextlib.suppress(InvalidArgumentError):
        assert parse_page_token(other, "") != last

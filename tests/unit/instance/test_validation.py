"""What a caller may name, label and ask for."""

from __future__ import annotations

import dataclasses
import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import ErrorKind, InvalidArgumentError
from vtpm.instance.model import CreateRequest
from vtpm.instance.validation import check_labels, check_name, check_request_id, fingerprint, make_profile
from vtpm.store.filter import parse_filter
from vtpm.store.model import Filter, ProfileRecord

good_names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
good_keys = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9._/-]{0,61}[a-zA-Z0-9])?", fullmatch=True)


@pytest.mark.parametrize("name", ["a", "0", "web-1", "web_1.example", "x" * 63, "0198c0de-0000-7000-8000-00000000000g"])
def test_a_plain_name_is_taken_as_it_is(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-web",
        ".web",
        "_web",
        "Web",
        "wéb",
        "web 1",
        "web/1",
        "../../etc/passwd",
        "web\n",
        "web\0",
        "x" * 64,
        "0198c0de-0000-7000-8000-0000000000aa",
        "0198c0de00007000800000000000000a",
        "١٢٣",
    ],
)
def test_a_name_that_could_be_something_else_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check_name(name)
    assert (refused.value.reason, refused.value.kind) == ("INSTANCE_NAME_INVALID", ErrorKind.INVALID_ARGUMENT)


def test_a_refused_name_is_not_echoed_at_length() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check_name("x" * 100_000)
    assert len(str(refused.value)) < 300


@settings(deadline=None)
@given(name=good_names | st.text(max_size=70))
def test_a_name_that_is_taken_is_safe_in_paths_filters_and_resource_names(name: str) -> None:
    try:
        taken = check_name(name)
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
        assert taken.isascii()
        assert not set(taken) & set("/\\\0\n \"'*")
        assert taken not in {".", ".."}
        assert parse_filter(f"name={taken}") == Filter(name=taken)
    assert reason in {"", "INSTANCE_NAME_INVALID"}


@settings(deadline=None)
@given(identifier=st.uuids(), form=st.sampled_from(["{}", "{{{}}}", "urn:uuid:{}"]))
def test_no_way_to_write_a_uuid_is_a_name(identifier: uuid.UUID, form: str) -> None:
    for text in (str(identifier), identifier.hex):
        with pytest.raises(InvalidArgumentError):
            check_name(form.format(text))


@settings(deadline=None)
@given(labels=st.dictionaries(good_keys, st.text(alphabet=st.characters(codec="ascii", categories=["L", "N"]), max_size=256)))
def test_labels_within_bounds_are_taken_as_they_are(labels: dict[str, str]) -> None:
    taken = check_labels(labels)
    assert taken == labels
    assert taken is not labels


@pytest.mark.parametrize("key", ["", "-a", "a-", "a/", "/a", "a b", "a=b", 'a"', "ä", "a\n", "x" * 64, "x" * 10_000])
def test_a_label_key_that_a_filter_could_not_name_is_refused(key: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check_labels({"good": "", key: "value"})
    assert refused.value.reason == "LABELS_INVALID"
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("value", ["\0", "a\nb", "\x1b[31m", "\u202e", "x" * 257])
def test_a_label_value_that_is_long_or_not_printable_is_refused(value: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check_labels({"note": value})
    assert (refused.value.reason, refused.value.subject) == ("LABELS_INVALID", "note")
    assert value not in str(refused.value)


def test_an_instance_has_no_more_than_64_labels() -> None:
    assert len(check_labels({f"k{number}": "" for number in range(64)})) == 64
    with pytest.raises(InvalidArgumentError, match="64") as refused:
        check_labels({f"k{number}": "" for number in range(65)})
    assert refused.value.reason == "LABELS_INVALID"


@settings(deadline=None)
@given(identifier=st.uuids())
def test_a_request_id_has_one_form_however_it_is_written(identifier: uuid.UUID) -> None:
    for text in (str(identifier), str(identifier).upper(), identifier.hex, f"{{{identifier}}}", identifier.urn):
        assert check_request_id(text) == str(identifier)


def test_no_request_id_stays_none() -> None:
    assert check_request_id("") == ""


@settings(deadline=None)
@given(text=st.text(min_size=1, max_size=31) | st.just("0198c0de-0000-7000-8000-00000000000g"))
def test_a_request_id_that_is_no_uuid_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        check_request_id(text)
    assert refused.value.reason == "REQUEST_ID_INVALID"


def test_a_profile_that_nobody_chose_is_the_documented_one() -> None:
    assert make_profile(CreateRequest()) == ProfileRecord(("RSA_2048", "ECC_P384"), "ECC_P256", ("sha256", "sha384"))


def test_a_profile_has_each_thing_once_and_in_one_order() -> None:
    request = CreateRequest(
        ek_algorithms=("ECC_P384", "RSA_2048", "ECC_P384"), ak_algorithm="RSA_2048", pcr_banks=("sha512", "sha1", "sha512")
    )
    assert make_profile(request) == ProfileRecord(("RSA_2048", "ECC_P384"), "RSA_2048", ("sha1", "sha512"))


@pytest.mark.parametrize(
    ("request_", "about"),
    [
        (CreateRequest(ek_algorithms=("RSA_1024",)), "EK algorithm"),
        (CreateRequest(ek_algorithms=("RSA_2048", "")), "EK algorithm"),
        (CreateRequest(ek_algorithms=("rsa_2048",)), "EK algorithm"),
        (CreateRequest(ak_algorithm="ECC_P384"), "AK algorithm must be one of ECC_P256, RSA_2048"),
        (CreateRequest(pcr_banks=("md5",)), "PCR bank must be one of sha1, sha256, sha384, sha512"),
        (CreateRequest(pcr_banks=("sha256", "x" * 1000)), "PCR bank"),
    ],
)
def test_a_profile_that_no_tpm_has_is_refused_with_what_there_is(request_: CreateRequest, about: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        make_profile(request_)
    assert refused.value.reason == "PROFILE_INVALID"
    assert about in refused.value.message
    assert len(refused.value.subject) <= 80


ASKED = CreateRequest(name="web-1", labels={"a": "1", "b": "2"}, engine="libtpms")


def fingerprint_of(request: CreateRequest) -> bytes:
    return fingerprint(request, make_profile(request))


@pytest.mark.parametrize(
    "same",
    [
        dataclasses.replace(ASKED, labels={"b": "2", "a": "1"}),
        dataclasses.replace(ASKED, request_id="0198c0de-0000-7000-8000-0000000000aa"),
        dataclasses.replace(ASKED, ak_algorithm="ECC_P256"),
        dataclasses.replace(ASKED, ek_algorithms=("ECC_P384", "RSA_2048")),
    ],
    ids=["labels in another order", "its request_id", "a default spelled out", "algorithms in another order"],
)
def test_a_retry_of_the_same_creation_has_the_same_fingerprint(same: CreateRequest) -> None:
    assert fingerprint_of(same) == fingerprint_of(ASKED)


@pytest.mark.parametrize(
    "other",
    [
        dataclasses.replace(ASKED, name="web-2"),
        dataclasses.replace(ASKED, labels={"a": "1"}),
        dataclasses.replace(ASKED, labels={"a": "2", "b": "1"}),
        dataclasses.replace(ASKED, ek_algorithms=("RSA_2048",)),
        dataclasses.replace(ASKED, ak_algorithm="RSA_2048"),
        dataclasses.replace(ASKED, pcr_banks=("sha256",)),
        dataclasses.replace(ASKED, engine="tpm_server"),
    ],
    ids=["name", "fewer labels", "label values", "EK algorithms", "AK algorithm", "PCR banks", "engine"],
)
def test_another_creation_under_the_same_request_id_has_another_fingerprint(other: CreateRequest) -> None:
    assert fingerprint_of(other) != fingerprint_of(ASKED)

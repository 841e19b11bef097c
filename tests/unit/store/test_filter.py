"""The filter language of lists and watches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.errors import ErrorKind, InvalidArgumentError
from vtpm.store.filter import parse_filter
from vtpm.store.model import Filter, InstanceState


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", Filter()),
        ("  \n", Filter()),
        ("state=ON", Filter(state=InstanceState.ON)),
        ("state = FAILED", Filter(state=InstanceState.FAILED)),
        ('state="OFF"', Filter(state=InstanceState.OFF)),
        ("name=web-1", Filter(name="web-1")),
        ("name:web-", Filter(name_prefix="web-")),
        ('name:""', Filter(name_prefix="")),
        ("labels.team=web", Filter(labels={"team": "web"})),
        ("labels.example.com/team=web", Filter(labels={"example.com/team": "web"})),
        ('labels.note="two words"', Filter(labels={"note": "two words"})),
        ("labels.expression=a=b", Filter(labels={"expression": "a=b"})),
        ("labels.url=http://host:1", Filter(labels={"url": "http://host:1"})),
        ("labels.AND=AND", Filter(labels={"AND": "AND"})),
        (
            "state=ON AND name:web- AND labels.a=1\n  AND labels.b=2 ",
            Filter(InstanceState.ON, None, "web-", {"a": "1", "b": "2"}),
        ),
    ],
)
def test_a_filter_says_what_is_wanted(text: str, wanted: Filter) -> None:
    assert parse_filter(text) == wanted


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ("ON", "no term"),
        ("state", "no term"),
        ("state=", "no term"),
        ("=ON", "no term"),
        ("state==", "no state"),
        ("state=ON AND", "no term"),
        ("AND state=ON", "no term"),
        ("state=ON AND AND name=x", "no term"),
        ("state=ON name=x", "no term"),
        ("state=ON and name=x", "no term"),
        ("state=ON OR name=x", "no term"),
        ("NOT state=ON", "no term"),
        ("(state=ON)", "no term"),
        ("name=web*x y", "no term"),
        ('name="web', "no term"),
        ('name=web"', "no term"),
        ('name="a"b', "no term"),
        ("name!=web", "no term"),
        ("name>web", "no term"),
        ("state=on", "no state"),
        ("state=DELETING", "no state"),
        ("state:ON", "'state' can't be compared with ':'"),
        ("labels.team:web", "'labels.team' can't be compared with ':'"),
        ("owner=me", "'owner' can't be compared"),
        ("labels=web", "'labels' can't be compared"),
        ("Name=web", "'Name' can't be compared"),
        ("epoch=1; DROP TABLE instances", "no term"),
        ("name=" + "x" * 5000, "too long"),
    ],
)
def test_a_filter_that_means_nothing_is_refused_with_the_part_that_is_wrong(text: str, about: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_filter(text)
    assert (refused.value.reason, refused.value.subject) == ("FILTER_INVALID", "filter")
    assert refused.value.kind is ErrorKind.INVALID_ARGUMENT
    assert about in refused.value.message
    assert "joined by AND" in refused.value.remedy


def test_a_refusal_echoes_only_the_beginning_of_what_was_sent() -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_filter("?" * 4000)
    assert len(str(refused.value)) < 300


words = st.text(alphabet="abcXYZ019.-_/", min_size=1, max_size=12)
keys = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9._/-]{0,10}[a-zA-Z0-9])?", fullmatch=True)


@settings(deadline=None)
@given(
    state=st.none() | st.sampled_from(InstanceState), prefix=st.none() | words, labels=st.dictionaries(keys, words, max_size=4)
)
def test_a_filter_written_from_its_meaning_has_that_meaning(
    state: InstanceState | None, prefix: str | None, labels: dict[str, str]
) -> None:
    terms = [f"state={state}"] if state else []
    terms += [f"name:{prefix}"] if prefix else []
    terms += [f'labels.{key}="{value}"' for key, value in labels.items()]
    assert parse_filter(" AND ".join(terms)) == Filter(state, None, prefix, labels)


@settings(deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet='stateONAD=:". labelsm', max_size=60))
def test_any_text_is_a_filter_or_is_refused(text: str) -> None:
    try:
        found = parse_filter(text)
    except InvalidArgumentError as refused:
        reason = refused.reason
    else:
        reason = ""
        assert found != Filter() or not text.strip()
    assert reason in {"", "FILTER_INVALID"}


@pytest.mark.parametrize("text", ["state=ON AND state=OFF", "name=a AND name=b", "labels.a=x AND labels.a=x"])
def test_a_field_named_twice_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_filter(text)
    assert "twice" in refused.value.message


def test_a_quoted_value_may_hold_the_joint_and_a_label_has_a_key() -> None:
    assert parse_filter('labels.a="x AND y" AND name=b').labels == {"a": "x AND y"}
    with pytest.raises(InvalidArgumentError):
        parse_filter("labels.=x")

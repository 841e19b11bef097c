"""Lists: ordered by id, in pages, and filtered by the database exactly as a watch filters records."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.store.given import a_new_instance
from vtpm.store.filter import parse_filter
from vtpm.store.model import Filter, InstanceRecord, InstanceState
from vtpm.store.store import Store

NAMES = ("web-1", "web-2", "web_1", "webx1", "db-1", "100%", "a.b")
LABELS: tuple[dict[str, str], ...] = (
    {},
    {"team": "web"},
    {"team": "web", "tier": "1"},
    {"team": "db"},
    {"tier": "1"},
    {"Team": "web"},
    {"team": ""},
)

words = st.sampled_from(["web", "db", "1", "", "Web", "team"])
filters = st.builds(
    Filter,
    state=st.none() | st.sampled_from(InstanceState),
    name=st.none() | st.sampled_from(NAMES),
    name_prefix=st.none() | st.sampled_from(["", "w", "web", "web-", "web_", "%", "100%", "_", "a."]),
    labels=st.dictionaries(st.sampled_from(["team", "tier", "Team"]), words, max_size=2),
)


def listed(store: Store, wanted: Filter, page_size: int = 1000) -> list[InstanceRecord]:
    found: list[InstanceRecord] = []
    while page := store.list(wanted, page_size, found[-1].id if found else None):
        assert len(page) <= page_size
        assert page[0] not in found
        found += page
    return found


@pytest.fixture(scope="module")
def full_store(shared_store: Store) -> Store:
    for name, labels in zip(NAMES, LABELS, strict=True):
        record = shared_store.create(a_new_instance(name, labels))
        if name.startswith("web"):
            shared_store.acquire(record.id, boot_id="boot-1")
    return shared_store


@settings(deadline=None)
@given(wanted=filters)
def test_the_database_and_a_watch_agree_on_what_a_filter_wants(full_store: Store, wanted: Filter) -> None:
    assert listed(full_store, wanted) == [record for record in listed(full_store, Filter()) if wanted.matches(record)]


@settings(deadline=None)
@given(page_size=st.integers(1, 9))
def test_pages_of_any_size_give_every_instance_once_and_in_order(full_store: Store, page_size: int) -> None:
    found = listed(full_store, Filter(), page_size)
    assert sorted(record.name for record in found) == sorted(NAMES)
    assert [record.id.hex for record in found] == sorted(record.id.hex for record in found)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", set(NAMES)),
        ("state=ON", {"web-1", "web-2", "web_1", "webx1"}),
        ("state=OFF AND name:db", {"db-1"}),
        ("name=web-1", {"web-1"}),
        ("name:web_", {"web_1"}),
        ("name:100%", {"100%"}),
        ("labels.team=web", {"web-2", "web_1"}),
        ("labels.team=web AND labels.tier=1", {"web_1"}),
        ('labels.team=""', {"a.b"}),
        ("name:web AND name=db-1", set()),
    ],
)
def test_a_written_filter_lists_what_an_operator_expects(full_store: Store, text: str, names: set[str]) -> None:
    assert {record.name for record in listed(full_store, parse_filter(text))} == names


def test_an_instance_comes_with_all_of_its_labels_though_one_was_asked_for(full_store: Store) -> None:
    (record,) = listed(full_store, parse_filter("labels.tier=1 AND labels.team=web"))
    assert record.labels == {"team": "web", "tier": "1"}


def test_an_instance_created_between_two_pages_moves_no_other(store: Store) -> None:
    for number in range(4):
        store.create(a_new_instance(f"old-{number}"))
    whole = [record.id for record in store.list(Filter(), 10, None)]
    first = store.list(Filter(), 2, None)
    store.create(a_new_instance("new", id=uuid.UUID(int=0)))
    assert [record.id for record in [*first, *store.list(Filter(), 10, first[-1].id)]] == whole


def test_a_page_that_began_at_an_instance_deleted_meanwhile_goes_on_behind_it(store: Store) -> None:
    for number in range(4):
        store.create(a_new_instance(f"web-{number}"))
    whole = [record.id for record in store.list(Filter(), 10, None)]
    store.delete(whole[1], None)
    assert [record.id for record in store.list(Filter(), 10, whole[1])] == whole[2:]


def test_many_instances_come_with_their_own_labels(store: Store) -> None:
    for number in range(3):
        store.create(a_new_instance(f"web-{number}", {"number": str(number), "team": "web"}))
    assert {record.name: dict(record.labels) for record in store.list(Filter(), 10, None)} == {
        f"web-{number}": {"number": str(number), "team": "web"} for number in range(3)
    }


def test_a_prefix_means_the_same_in_a_list_and_in_a_watch(store: Store) -> None:
    record = store.create(a_new_instance("web-1"))
    for text, found in (("name:WEB", []), ("name:web", [record]), ("name:web-%", []), ("name:we_", [])):
        wanted = parse_filter(text)
        assert store.list(wanted, 10, None) == found
        assert wanted.matches(record) is bool(found)

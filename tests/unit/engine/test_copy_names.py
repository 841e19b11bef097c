"""Names of stored descriptors: what is written is read, nothing else is, and what belongs together is found together."""

from __future__ import annotations

import uuid

from hypothesis import given
from hypothesis import strategies as st

from vtpm.engine.copy_names import PREFIX, CopyName, grouped, names_of
from vtpm.engine.software import LIBTPMS
from vtpm.engine.v1 import link_pb2 as pb

_roles = st.sampled_from([pb.DATA_LISTENER, pb.CONTROL_LISTENER, pb.DATA, pb.VM_DATA, pb.CONTROL, pb.VM_CONTROL])
_numbers = st.integers(1, 2**64 - 1)
_names = st.builds(CopyName, st.uuids(), _numbers, _numbers, st.integers(1, 253), _roles, st.integers(0, 2**32 - 1))
_parked = st.builds(
    lambda instance, epoch, version, parts: pb.ParkedInstance(
        instance=str(instance),
        epoch=epoch,
        engine=LIBTPMS,
        snapshot_version=version,
        roles=[role for role, _ in parts],
        zeros=[zeros for _, zeros in parts],
    ),
    st.uuids(),
    _numbers,
    _numbers,
    st.lists(st.tuples(_roles, st.integers(0, 2**32 - 1)), min_size=1, max_size=6),
)


@given(_names)
def test_a_name_says_what_was_put_into_it(name: CopyName) -> None:
    text = str(name)
    assert CopyName.parse(text) == name
    # What systemd takes (FDNAME in sd_notify(3)).
    assert len(text) <= 255
    assert all(" " < character < "\x7f" and character != ":" for character in text)


@given(st.one_of(st.text(), st.text("0123456789.Aa-_", max_size=80).map(PREFIX.__add__)))
def test_anything_else_is_no_name_or_has_its_one_spelling(text: str) -> None:
    name = CopyName.parse(text)
    assert name is None or str(name) == text


def test_names_that_are_nearly_right() -> None:
    right = str(CopyName(uuid.UUID(int=5), 1, 2, 3, pb.DATA, 0))
    assert right == "vtpm1.AAAAAAAAAAAAAAAAAAAABQ.1.2.3.5.0"
    assert CopyName.parse(right) is not None
    for wrong in (
        right + "\n",
        right + ".0",
        right.replace("BQ", "BR"),
        right.replace(".1.", ".01."),
        right.replace(".2.", ".0."),
        right.replace(".3.", ".0."),
        right.replace(".5.", ".99."),
        right.replace(".1.", f".{2**64}."),
        right.replace(".1.", ".١."),
        right.replace("vtpm1", "vtpm2"),
    ):
        assert CopyName.parse(wrong) is None, wrong


@given(st.lists(_parked, max_size=4, unique_by=lambda about: about.instance), st.randoms())
def test_descriptors_find_their_instances_in_whatever_order(instances: list[pb.ParkedInstance], random: object) -> None:
    stored = [(name, number * 100 + at) for number, about in enumerate(instances) for at, name in enumerate(names_of(about))]
    random.shuffle(stored)  # type: ignore[attr-defined]
    groups, others = grouped([*stored, ("stored", 7)], LIBTPMS)
    assert others == [("stored", 7)]
    assert len(groups) == len(instances)
    for group in groups:
        assert group.complete
        (about,) = [about for about in instances if about.instance == group.about.instance]
        assert (group.about.epoch, group.about.snapshot_version) == (about.epoch, about.snapshot_version)
        parts = sorted(zip(about.roles, about.zeros, strict=True))
        assert sorted(zip(group.about.roles, group.about.zeros, strict=True)) == parts
        for name, role in zip(group.names, group.about.roles, strict=True):
            parsed = CopyName.parse(name)
            assert parsed is not None
            assert parsed.role == role


def test_half_a_group_is_seen() -> None:
    about = pb.ParkedInstance(instance=str(uuid.uuid4()), epoch=1, snapshot_version=1, roles=[pb.DATA, pb.DATA, pb.CONTROL])
    names = names_of(about)
    groups, _ = grouped([(names[0], 10), (names[2], 11)], LIBTPMS)
    assert [group.complete for group in groups] == [False]

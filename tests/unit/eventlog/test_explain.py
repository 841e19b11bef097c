"""Why two boots differ, in plain words, with the value that the register would have had."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.eventlogs import BANK, action, boot, driver_config, image, read, record, separator
from vtpm.errors import InvalidArgumentError
from vtpm.eventlog import differences
from vtpm.eventlog.differences import Change, Subject
from vtpm.eventlog.explain import MAX_DIFFERENCES, RegisterDifference, explain, explain_reference
from vtpm.eventlog.reference import parse_reference, reference_of
from vtpm.eventlog.replay import replay
from vtpm.eventlog.types import EventType
from vtpm.eventlog.values import UnverifiedLog

GOOD = boot()


def only(found: tuple[RegisterDifference, ...]) -> RegisterDifference:
    (register,) = found
    return register


@pytest.mark.parametrize(
    ("log", "register", "change", "subject", "words"),
    [
        (boot(command_line="console=ttyS0 init=/bin/sh"), 9, Change.CHANGED, Subject.COMMAND_LINE, ""),
        (boot(initrd=b"initrd 2"), 9, Change.CHANGED, Subject.INITRD, "Linux initrd"),
        (boot(kernel=b"kernel 2"), 4, Change.CHANGED, Subject.BINARY, "BOOTX64.EFI"),
        (boot(secure_boot=b"\0"), 7, Change.CHANGED, Subject.VARIABLE, "SecureBoot = 0' instead of 'variable SecureBoot = 1"),
        (boot(extra=[record(7, EventType.EV_POST_CODE, b"what")]), 7, Change.EXTRA, Subject.FIRMWARE, "what"),
    ],
    ids=["command line", "initrd", "kernel", "secure boot", "extended"],
)
def test_one_altered_thing_is_named_and_is_all_that_differs(
    log: UnverifiedLog, register: int, change: Change, subject: Subject, words: str
) -> None:
    found = only(explain(log, GOOD, BANK))
    assert (found.register, found.name, found.exact, found.explained) == (register, f"PCR {register}", True, True)
    (difference,) = found.differences
    assert (difference.change, difference.subject) == (change, subject)
    assert words in difference.text
    assert found.value == replay(log, BANK).values[register]
    assert found.expected == (replay(GOOD, BANK).values[register],)
    assert difference.without == found.expected[0], "undoing the one difference gives the expected value"


def test_the_same_boot_has_no_difference() -> None:
    assert explain(boot(), GOOD, BANK) == ()


def test_words_of_a_grub_command_that_are_new_or_gone_are_named() -> None:
    def log(line: bytes) -> UnverifiedLog:
        return read(record(8, EventType.EV_IPL, b"kernel_cmdline: " + line + b"\0", line))

    (difference,) = only(explain(log(b"/vmlinuz ro init=/bin/sh"), log(b"/vmlinuz ro quiet"), BANK)).differences
    assert difference.subject is Subject.COMMAND_LINE
    assert difference.text == "the command line differs: adds 'init=/bin/sh' and lacks 'quiet'"


def test_an_event_that_is_missing_is_named_with_its_place() -> None:
    events = [driver_config("SecureBoot", b"\1"), driver_config("PK", b""), separator(7)]
    found = only(explain(read(events[0], events[2]), read(*events), BANK))
    (difference,) = found.differences
    assert (difference.change, difference.subject, difference.event) == (Change.MISSING, Subject.VARIABLE, None)
    assert difference.without == found.expected[0]


def test_events_in_another_order_are_named() -> None:
    one, two, three = action("one"), action("two"), action("three")
    found = only(explain(read(two, one, three), read(one, two, three), BANK))
    (difference,) = found.differences
    assert difference.change is Change.ORDER
    assert difference.without == found.expected[0]


def test_several_differences_are_all_named() -> None:
    log = boot(kernel=b"kernel 2", initrd=b"initrd 2", command_line="panic=1")
    found = explain(log, GOOD, BANK)
    said = [(item.register, difference.subject) for item in found for difference in item.differences]
    assert said == [(4, Subject.BINARY), (9, Subject.COMMAND_LINE), (9, Subject.INITRD)]
    assert all(difference.without not in found[1].expected for difference in found[1].differences)


def test_another_startup_locality_is_named() -> None:
    def started(locality: int) -> UnverifiedLog:
        return read(record(0, EventType.EV_NO_ACTION, b"StartupLocality\0" + bytes([locality])), record(0, 8, b"v"))

    found = only(explain(started(3), started(0), BANK))
    (difference,) = found.differences
    assert (difference.subject, found.explained) == (Subject.FIRMWARE, True)
    assert "locality 03" in difference.text
    assert difference.without == found.expected[0]


def test_a_register_that_only_one_log_extends_is_a_difference() -> None:
    found = explain(read(action("x"), record(9, 6, b"more")), read(action("x"), record(3, 6, b"other")), BANK)
    assert [(item.register, item.value is None, item.expected != ()) for item in found] == [(3, True, True), (9, False, False)]
    assert [item.differences[0].change for item in found] == [Change.MISSING, Change.EXTRA]


def test_more_differences_than_are_named_are_counted() -> None:
    mine = [record(8, EventType.EV_IPL, b"grub_cmd %d\0" % index) for index in range(MAX_DIFFERENCES + 40)]
    theirs = [record(8, EventType.EV_IPL, b"grub_cmd x%d\0" % index) for index in range(MAX_DIFFERENCES + 40)]
    found = only(explain(read(*mine), read(*theirs), BANK))
    assert (len(found.differences), found.dropped) == (MAX_DIFFERENCES, 40)


def test_logs_too_different_to_align_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "MAX_ALIGNMENT", 3)
    found = only(explain(read(action("a"), action("b"), action("c")), read(action("c"), action("a"), action("d")), BANK))
    assert not found.exact


texts = st.lists(st.sampled_from(["a", "b", "c", "d", "e"]), max_size=7)


@settings(deadline=None, max_examples=300)
@given(mine=texts, theirs=texts)
def test_every_difference_is_found_whatever_the_events(mine: list[str], theirs: list[str]) -> None:
    ours, others = read(*map(action, mine)), read(*map(action, theirs))
    found = explain(ours, others, BANK)
    assert bool(found) == (mine != theirs)
    for item in found:
        assert item.explained
        assert item.differences
        gained = [difference for difference in item.differences if difference.change is Change.EXTRA]
        lost = [difference for difference in item.differences if difference.change is Change.MISSING]
        assert len(mine) - len(theirs) == len(gained) - len(lost)
        if len(item.differences) == 1:
            assert item.differences[0].without == (item.expected[0] if theirs else None), "undone, it is as expected"


# ---- reference values -------------------------------------------------------------------------------------------------------


def test_reference_values_made_of_a_boot_accept_it_and_explain_another() -> None:
    reference = parse_reference(reference_of(GOOD, BANK))
    assert explain_reference(boot(), reference, BANK) == ()
    (difference,) = only(explain_reference(boot(kernel=b"kernel 2"), reference, BANK)).differences
    assert (difference.change, difference.subject) == (Change.CHANGED, Subject.BINARY)


def test_reference_values_without_events_say_that_and_not_why() -> None:
    values = reference_of(GOOD, BANK)["pcrs"]
    found = only(explain_reference(boot(kernel=b"kernel 2"), parse_reference({"pcrs": values}), BANK))
    assert (found.register, found.differences, found.explained) == (4, (), False)


def test_any_of_several_values_is_accepted_and_other_registers_are_not_compared() -> None:
    good, other = (replay(log, BANK).values[4].hex() for log in (GOOD, boot(kernel=b"kernel 2")))
    reference = parse_reference({"pcrs": {"sha256": {"4": [good, other]}}})
    assert explain_reference(boot(kernel=b"kernel 2", initrd=b"initrd 2"), reference, BANK) == ()
    assert only(explain_reference(boot(kernel=b"kernel 3"), reference, BANK)).register == 4


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"pcrs": {"sha256": {"4": "00" * 32}}, "more": 1},
        {"pcrs": 4},
        {"pcrs": {"md5": {}}},
        {"pcrs": {"sha256": {"24": "00" * 32}}},
        {"pcrs": {"sha256": {"-1": "00" * 32}}},
        {"pcrs": {"sha256": {"4": "00" * 31}}},
        {"pcrs": {"sha256": {"4": 12345}}},
        {"pcrs": {"sha256": {"4": []}}},
        {"events": {"sha256": {"4": {}}}},
        {"events": {"sha256": {"4": ["x"]}}},
        {"events": {"sha256": {"4": [{"digest": "00" * 32, "data": "zz"}]}}},
        {"events": {"sha256": {"4": [{"what": "no digest"}]}}},
    ],
)
def test_reference_values_of_another_shape_are_refused_by_name(value: Any) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_reference(value)
    assert refused.value.reason == "REFERENCE_INVALID"


def test_images_without_a_path_are_compared_as_images() -> None:
    found = only(explain(read(image(b"", b"one")), read(image(b"", b"two")), BANK))
    assert [difference.subject for difference in found.differences] == [Subject.BINARY]

"""Logs are events with fields, and no secret passes."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import string
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm import log as vtpm_log
from vtpm.errors import SealedStateError
from vtpm.log import SourceLog

SECRET_FIELDS = (
    "data_key key auth password secret state_blob blob sealed command response nonce plaintext".split()  # noqa: SIM905  # a list of words
)
secrets = st.text(alphabet=string.ascii_lowercase + string.digits, min_size=12, max_size=40)


@pytest.fixture(autouse=True)
def _unconfigured() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def written(act: Callable[[Any], object], log_format: str = "json", level: str = "info") -> str:
    """Return what `act` makes a fresh logger write to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        vtpm_log.configure(log_format, level)
        act(structlog.get_logger("test"))
    return stderr.getvalue()


def event(act: Callable[[Any], object]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(written(act))
    return found


def test_an_event_is_a_line_of_json_with_its_fields() -> None:
    line = event(lambda log: log.info("instance.thawed", instance="web-1", micros=300))
    assert dt.datetime.fromisoformat(line.pop("timestamp")).utcoffset() == dt.timedelta(0)
    assert line == {"event": "instance.thawed", "level": "info", "instance": "web-1", "micros": 300}


def test_what_is_not_a_terminal_gets_json() -> None:
    assert json.loads(written(lambda log: log.info("instance.thawed"), "auto"))["event"] == "instance.thawed"


def test_a_person_gets_a_line_of_text() -> None:
    text = written(lambda log: log.warning("instance.failed", instance="web-1"), "console")
    assert "instance.failed" in text
    assert "web-1" in text
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


@pytest.mark.parametrize(("level", "wanted"), [("debug", "diwe"), ("info", "iwe"), ("warning", "we"), ("error", "e")])
def test_only_events_as_important_as_asked_for_are_written(level: str, wanted: str) -> None:
    def each_level(log: Any) -> None:
        log.debug("d")
        log.info("i")
        log.warning("w")
        log.error("e")

    assert "".join(json.loads(line)["event"] for line in written(each_level, level=level).splitlines()) == wanted


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("field", SECRET_FIELDS)
def test_a_field_that_could_carry_a_secret_is_withheld(field: str, log_format: str) -> None:
    for value in ("hunter2hunter2", 271828182845, ["hunter2hunter2"], {"deep": "hunter2hunter2"}):
        text = written(lambda log, value=value: log.info("mistake", **{field: value}), log_format)  # type: ignore[misc]
        assert "hunter2" not in text
        assert "271828182845" not in text
        assert "[withheld]" in text


@settings(deadline=None)
@given(secret=secrets, field=st.sampled_from(SECRET_FIELDS))
def test_no_secret_passes_whatever_it_is(secret: str, field: str) -> None:
    assert event(lambda log: log.info("mistake", **{field: secret}))[field] == "[withheld]"


@settings(deadline=None)
@given(value=st.binary(max_size=64), field=st.sampled_from(["pcr", "digest", "text", "instance", "x"]))
def test_bytes_are_withheld_under_any_name(value: bytes, field: str) -> None:
    for form in (value, bytearray(value), memoryview(value)):
        assert event(lambda log, form=form: log.info("mistake", **{field: form}))[field] == "[withheld]"  # type: ignore[misc]


def test_bytes_in_place_of_the_event_are_withheld() -> None:
    assert event(lambda log: log.info(b"seed bytes"))["event"] == "[withheld]"


def test_fields_that_came_earlier_are_guarded_too() -> None:
    structlog.contextvars.bind_contextvars(password="hunter2hunter2", request="r-1")
    line = event(lambda log: log.bind(nonce="abcabcabc").info("mistake"))
    assert (line["password"], line["nonce"], line["request"]) == ("[withheld]", "[withheld]", "r-1")


def test_the_name_of_a_control_command_is_no_secret() -> None:
    assert event(lambda log: log.info("wire.failed", command="SET_LOCALITY"))["command"] == "SET_LOCALITY"


@pytest.mark.parametrize("text", ["80010000000C00000144", "A" * 41, "SET LOCALITY", "set_locality"])
def test_what_is_no_command_name_is_withheld(text: str) -> None:
    assert event(lambda log: log.info("wire.failed", command=text))["command"] == "[withheld]"


def test_a_long_text_is_cut() -> None:
    line = event(lambda log: log.info("odd", error="x" * 100_000))
    assert line["error"] == "x" * 2000 + "…"
    assert event(lambda log: log.info("odd", error="x" * 2000))["error"] == "x" * 2000


def test_an_exception_is_logged_with_its_traceback_on_one_line() -> None:
    def fail(log: Any) -> None:
        try:
            raise SealedStateError("ENVELOPE_TRUNCATED", "sealed state of only 3 bytes", subject="web-1")
        except SealedStateError:
            log.exception("instance.thaw_failed")

    line = event(fail)
    assert "Traceback" in line["exception"]
    assert "web-1: sealed state of only 3 bytes" in line["exception"]


def test_a_traceback_in_json_shows_no_local_variable() -> None:
    def fail(log: Any) -> None:
        data_key = "hunter2" * 2
        try:
            raise ValueError(len(data_key))
        except ValueError:
            log.exception("instance.thaw_failed")

    assert "hunter2hunter2" not in written(fail)


def test_a_text_that_looks_like_json_stays_a_text() -> None:
    assert event(lambda log: log.info("odd", name='"}\n{"event": "forged'))["name"] == '"}\n{"event": "forged'
    assert len(written(lambda log: log.info("odd", name="a\nb")).splitlines()) == 1


def test_a_traceback_on_a_console_shows_no_local_variables() -> None:
    def fail() -> None:
        data_key = "hunter2hunter2"
        raise ValueError(len(data_key))

    def act(log: Any) -> None:
        try:
            fail()
        except ValueError:
            log.exception("boom")

    text = written(act, "console")
    assert "ValueError" in text
    assert "hunter2hunter2" not in text


def test_secrets_inside_of_containers_and_in_capitals_are_withheld() -> None:
    line = event(
        lambda log: log.info("x", f={"auth": "HUNTERTWO", "fine": 1}, items=[b"abc", ("ok", b"abc")], password="HUNTERTWO")
    )
    assert line["f"] == {"auth": "[withheld]", "fine": 1}
    assert line["items"] == ["[withheld]", ["ok", "[withheld]"]]
    assert line["password"] == "[withheld]"


class Lines:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.kept.append((event, fields))

    error = warning


def test_one_source_gets_so_many_lines_and_what_was_withheld_is_counted() -> None:
    lines, now = Lines(), 0.0
    log = SourceLog(lines, lines=3, every_s=10, now=lambda: now)
    for _ in range(1000):
        log.warning("vm-a", "trouble", reason="A")
    log.error("vm-b", "trouble", reason="B")
    assert [fields["reason"] for _, fields in lines.kept] == ["A", "A", "A", "B"]
    now = 10.0
    log.warning("vm-a", "trouble", reason="A")
    assert lines.kept[-1] == ("trouble", {"reason": "A", "withheld_before": 997})


def test_any_number_of_sources_takes_bounded_memory() -> None:
    log = SourceLog(Lines(), lines=1)
    for number in range(5000):
        log.warning(f"vm-{number}", "trouble")
    assert len(log._sources) <= 1024

"""Logging: events with fields, as JSON or for a console. No secret, auth value or state byte passes."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any, Final

import structlog

_WITHHELD: Final = "[withheld]"
# Fields of these names never belong in a log; they are withheld in case one is passed by mistake.
_FORBIDDEN: Final = frozenset(
    (
        "data_key",
        "key",
        "auth",
        "password",
        "secret",
        "state_blob",
        "blob",
        "sealed",
        "command",
        "response",
        "nonce",
        "plaintext",
    )
)
_MAX_TEXT: Final = 2000
_MAX_DEPTH: Final = 4
_LINES: Final = 5
_EVERY_S: Final = 10.0
_MAX_SOURCES: Final = 1024


def _guard(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Withhold fields that could carry a secret, and bytes of any name, however deep they are."""
    for name, value in event.items():
        event[name] = _guarded(name, value, _MAX_DEPTH)
    return event


def _guarded(name: str, value: Any, depth: int) -> Any:
    # The name of a command is no secret, its bytes are a guest's.
    if name in _FORBIDDEN and not (name == "command" and _is_name(value)):
        return _WITHHELD
    match value:
        case bytes() | bytearray() | memoryview():
            return _WITHHELD
        case str():
            return value if len(value) <= _MAX_TEXT else value[:_MAX_TEXT] + "…"
        case dict() | list() | tuple() | set() | frozenset() if depth == 0:
            return _WITHHELD
        case dict():
            return {key: _guarded(str(key), item, depth - 1) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_guarded("", item, depth - 1) for item in value]
        case _:
            return value


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and len(value) <= 40 and value.isupper()


def configure(log_format: str, level: str) -> None:
    """Set logging up: `auto` writes for people on a terminal and JSON elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    # Not the default formatter of exceptions: it shows local variables, and there are keys among them.
    plain = structlog.dev.plain_traceback
    renderer: Any = structlog.dev.ConsoleRenderer(exception_formatter=plain) if console else structlog.processors.JSONRenderer()
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _guard,
    ]
    if not console:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")


class SourceLog:
    """Lines about many sources, of each so many within a time: whoever makes trouble must not fill the log with it.

    What was withheld of a source is counted, and said with its next line. Used from any thread.
    """

    def __init__(
        self, logger: Any, *, lines: int = _LINES, every_s: float = _EVERY_S, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._lines = lines
        self._every_s = every_s
        self._now = now
        # Source → [when its time began, lines since then, lines withheld]; those that spoke last are last.
        self._sources: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def _withheld(self, source: str) -> int | None:
        """Return how many lines were withheld before this one; None if this one is too."""
        with self._lock:
            now = self._now()
            row = self._sources.pop(source, None) or [now, 0, 0]
            self._sources[source] = row
            if len(self._sources) > _MAX_SOURCES:
                self._sources.popitem(last=False)
            if now - row[0] >= self._every_s:
                row[0], row[1] = now, 0
            if row[1] >= self._lines:
                row[2] += 1
                return None
            row[1] += 1
            withheld, row[2] = int(row[2]), 0
            return withheld

    def warning(self, source: str, event: str, **fields: Any) -> None:
        """Log a warning about `source`, if there were not too many."""
        self._say(self._logger.warning, source, event, fields)

    def error(self, source: str, event: str, **fields: Any) -> None:
        """Log an error about `source`, if there were not too many."""
        self._say(self._logger.error, source, event, fields)

    def _say(self, log: Callable[..., object], source: str, event: str, fields: MutableMapping[str, Any]) -> None:
        withheld = self._withheld(source)
        if withheld is not None:
            log(event, **fields, **({"withheld_before": withheld} if withheld else {}))

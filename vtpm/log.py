"""Logging: events with fields, as JSON or for a console. No secret, auth value or state byte passes."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final

import structlog

# Fields of these names never belong in a log; they are blacked out in case one is passed by mistake.
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
# `command` as a name is fine, as bytes it is a guest's.
_MAX_TEXT: Final = 2000


def _guard(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Black out fields that could carry a secret, and bytes of any name."""
    for name, value in event.items():
        if isinstance(value, (bytes, bytearray, memoryview)) or (name in _FORBIDDEN and not _is_name(value)):
            event[name] = "[withheld]"
        elif isinstance(value, str) and len(value) > _MAX_TEXT:
            event[name] = value[:_MAX_TEXT] + "…"
    return event


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and len(value) <= 40 and value.isupper()


def configure(log_format: str, level: str) -> None:
    """Set logging up: `auto` writes for people on a terminal and JSON elsewhere."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
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

"""The end of the process, when a part of it is broken that everything else depends on."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final, NoReturn

import structlog

log: Final = structlog.get_logger("vtpm.daemon")

# EX_SOFTWARE of sysexits.h.
EXIT_BROKEN: Final = 70
_REMEDY: Final = "restart the daemon, whose instances run on; report the error with this line"


def end_process(part: str, error: BaseException) -> NoReturn:
    """Say that `part` is broken, and where, and end the process at once: half a daemon would keep guests waiting.

    What runs, runs on with the engine host, and the next daemon takes it over.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace is not None else ""
    try:
        log.critical("daemon.broken", part=part, error=type(error).__name__, where=where, remedy=_REMEDY)
        sys.stderr.flush()
    finally:
        os._exit(EXIT_BROKEN)

"""How a worker ends: exit statuses, and the exception that carries one to the end of its loop."""

from __future__ import annotations

import contextlib
import os
from typing import Final

EXIT_STOPPED: Final = 0
EXIT_COMMIT_REFUSED: Final = 81
EXIT_COMMIT_TIMEOUT: Final = 82
EXIT_TPM_FAILED: Final = 83
# The VM has ended, as its control channel says.
EXIT_POWERED_OFF: Final = 84
# All that the TPM has is sealed in the store, and its descriptors are with the engine host.
EXIT_HIBERNATED: Final = 85


class Exit(BaseException):
    """Ends the worker with an exit status; caught on the way only where power goes anyway."""

    def __init__(self, status: int) -> None:
        self.status = status


def last_words(text: str) -> None:
    """Write a line to standard error, if somebody takes it; a worker neither waits nor ends for that."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))

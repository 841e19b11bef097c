"""Exit codes of the `vtpm` command, by kind of error; documented in docs/cli.md."""

from __future__ import annotations

from typing import Final

from vtpm.errors import ErrorKind

OK: Final = 0
INTERNAL: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
ALREADY_EXISTS: Final = 4
PRECONDITION: Final = 5
UNAVAILABLE: Final = 6
PERMISSION: Final = 7
EXHAUSTED: Final = 8
DATA_LOSS: Final = 9
PARTIAL: Final = 10
DIFFERENT: Final = 11
INTERRUPTED: Final = 130

BY_KIND: Final = {
    ErrorKind.INVALID_ARGUMENT: USAGE,
    ErrorKind.NOT_FOUND: NOT_FOUND,
    ErrorKind.ALREADY_EXISTS: ALREADY_EXISTS,
    ErrorKind.PERMISSION_DENIED: PERMISSION,
    ErrorKind.FAILED_PRECONDITION: PRECONDITION,
    ErrorKind.ABORTED: PRECONDITION,
    ErrorKind.RESOURCE_EXHAUSTED: EXHAUSTED,
    ErrorKind.UNAVAILABLE: UNAVAILABLE,
    ErrorKind.DEADLINE_EXCEEDED: UNAVAILABLE,
    ErrorKind.UNIMPLEMENTED: USAGE,
    ErrorKind.DATA_LOSS: DATA_LOSS,
    ErrorKind.INTERNAL: INTERNAL,
}

MEANINGS: Final = (
    (OK, "done"),
    (INTERNAL, "an internal error; the daemon's log has more"),
    (USAGE, "the command line or a value is wrong"),
    (NOT_FOUND, "there is no such instance"),
    (ALREADY_EXISTS, "the name is taken"),
    (PRECONDITION, "the state does not allow it, or somebody else changed it meanwhile"),
    (UNAVAILABLE, "the daemon, its engine or its store is not reachable; a retry may help"),
    (PERMISSION, "not allowed"),
    (EXHAUSTED, "a limit is reached"),
    (DATA_LOSS, "sealed state is damaged"),
    (PARTIAL, "some of several were done, others not"),
    (DIFFERENT, "what was compared is not the same"),
    (INTERRUPTED, "interrupted"),
)

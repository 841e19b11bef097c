"""A user and a group of its own for each worker of an engine host that runs as root.

No signal, no file, no /proc entry and no resource limit of a user then reaches from one worker to another, to the engine host
or to the daemon, whatever the system call filter would let through (credentials(7)). The number is the process' own: no other
live process has it, and it is given again only after the process is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Final

from vtpm.engine import sandbox
from vtpm.errors import EngineError

# 0x70000000 to 0x7ffdffff are nobody's (systemd.io/UIDS-GIDS); a process number is below 1 << 22 (PID_MAX_LIMIT).
FIRST_UID: Final = 0x7000_0000
_COUNT: Final = 1 << 22
# What the engine host needs to make such a worker, and to end one (capabilities(7)).
_NEEDED: Final = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}


def why_not() -> str:
    """Say why workers can't have users of their own here; empty if they can."""
    if os.geteuid() != 0:
        return "the engine host does not run as root"
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.M)
    effective = int(found[1], 16) if found else 0
    for name, number in _NEEDED.items():
        if not effective >> number & 1:
            return f"the engine host has no {name}"
    for kind in ("uid_map", "gid_map"):
        if not _mapped(Path("/proc/self", kind).read_text()):
            return f"the engine host's user namespace has no {FIRST_UID} to {FIRST_UID + _COUNT - 1} in its {kind}"
    if Path("/proc/self/setgroups").read_text().strip() != "allow":
        return "the engine host's user namespace does not allow setgroups"
    return ""


def _mapped(text: str) -> bool:
    for line in text.splitlines():
        first, _, count = (int(word) for word in line.split())
        if first <= FIRST_UID and first + count >= FIRST_UID + _COUNT:
            return True
    return False


def own_uid() -> int:
    """Return the number of this process's own user and group."""
    return FIRST_UID + os.getpid()


def become_own() -> None:
    """Become this process's own user, with its group alone and without capabilities, for good.

    The kernel forgets the parent-death signal with that: see to it afterwards.

    Raises:
        EngineError: the kernel refuses.
    """
    uid = own_uid()
    # Without CAP_SETPCAP they stay, and mean nothing to a process that starts no program.
    with contextlib.suppress(PermissionError):
        sandbox.drop_capability_bounds()
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise EngineError("SANDBOX_FAILED", f"a worker can't become a user of its own: {error}") from error
    # Where fs.suid_dumpable is not 0, that would be undone.
    sandbox.forbid_dumps()

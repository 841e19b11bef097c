"""Workers are users of their own where the engine host may make them so, and elsewhere it says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vtpm.engine.worker_uids import FIRST_UID

WHY_NOT = [sys.executable, "-c", "from vtpm.engine.worker_uids import why_not; print(why_not())"]
BECOME = """
import os
from vtpm.engine import sandbox, worker_uids
worker_uids.become_own()
assert os.getresuid() == os.getresgid() == (worker_uids.FIRST_UID + os.getpid(),) * 3
assert os.getgroups() == []
sandbox.drop_capabilities()
for back in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.kill(os.getppid(), 0)):
    try:
        back()
    except PermissionError:
        continue
    raise AssertionError
print("done")
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def said(*command: str) -> str:
    """What a process in other circumstances says."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("name", ["kill", "setuid", "setgid"])
def test_a_root_without_a_capability_that_it_needs_is_told_which(name: str) -> None:
    assert said("setpriv", f"--bounding-set=-{name}", *WHY_NOT) == f"the engine host has no CAP_{name.upper()}"


def test_a_root_of_a_user_namespace_without_the_numbers_is_told_so() -> None:
    if subprocess.run(["unshare", "-Ur", "true"], check=False, capture_output=True).returncode:
        pytest.skip("the host allows no user namespaces")
    assert f"has no {FIRST_UID} to " in said("unshare", "-Ur", *WHY_NOT)


def test_a_process_that_has_become_its_own_user_cannot_go_back() -> None:
    assert said(sys.executable, "-c", BECOME) == "done"

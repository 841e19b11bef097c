"""A real engine host, with workers that turn on the daemon; it is started as vtpm.engine.host is.

It forks workers of ours, behind their sandbox, with their instance's real sockets. For an instance that is named in
VTPM_HOSTILE_PLAN, a JSON file of {instance: [script, seed, slot]}, what runs there is a script of `tests.hostile.scripts` once
the worker has its state: what somebody could run who has broken into it. Each writes into its slot of VTPM_HOSTILE_COUNTS, a
file of unsigned 64-bit numbers, how many messages it has sent.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
from pathlib import Path
from typing import NoReturn

from tests.hostile.scripts import SCRIPTS, Lines, Sent
from vtpm.engine import children, host
from vtpm.engine.exits import Exit
from vtpm.engine.v1 import link_pb2 as pb
from vtpm.engine.worker import Worker

_PLAN = Path(os.environ["VTPM_HOSTILE_PLAN"])
_COUNTS_PATH = Path(os.environ["VTPM_HOSTILE_COUNTS"])
with _COUNTS_PATH.open("r+b") as _file:
    # Shared with who reads the file, and written without a system call, which the sandbox would not allow.
    _COUNTS = mmap.mmap(_file.fileno(), 0)


class HostileWorker(Worker):
    """A worker that runs a script as soon as it has its state, if one was chosen when it was forked."""

    plan: list[object] | None = None

    def run(self) -> NoReturn:
        if self.plan is not None:
            script, seed, slot = self.plan
            lines = Lines(
                host=self._host,
                operations=self._ops,
                commits=self._durable,
                serve=self._duties.serve,
                sent=Sent(_COUNTS, int(str(slot))),
            )
            try:
                # When the daemon has hung up, what comes is the end.
                with contextlib.suppress(OSError):
                    SCRIPTS[str(script)](lines, int(str(seed)))
            except Exit as end:
                os._exit(end.status)
            lines.wait_for_the_end()
        super().run()


class HostileNursery(children.Nursery):
    """Forks a worker of its own for an instance that is in the plan, and takes a spare for any other."""

    def take(self, order: pb.Spawn) -> tuple[children.Child, bool]:
        plan = json.loads(_PLAN.read_text()).get(order.instance)
        if plan is None:
            return super().take(order)
        HostileWorker.plan = plan
        try:
            child = self._fork(order)
        finally:
            HostileWorker.plan = None
        child.instance, child.epoch = order.instance, order.epoch
        return child, True


if __name__ == "__main__":
    children.Worker = HostileWorker  # type: ignore[attr-defined]  # what the nursery makes of a fork
    host.Nursery = HostileNursery  # type: ignore[attr-defined]  # and what forks
    sys.exit(host.main(sys.argv[1:]))

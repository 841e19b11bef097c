"""One run: guests, chaos, and at the end a quiet look at everything."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

from tests.support.daemon import DaemonProcess
from tests.torture.chaos import Chaos
from tests.torture.guest import Guest


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did and found; `violations` empty means that nothing was lost."""

    seed: int
    seconds: float
    acknowledged: int
    counts: Counter[str]
    violations: list[str]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.seconds:.0f} s, {self.acknowledged} commands acknowledged and checked"]
        lines += [f"  {name}: {count}" for name, count in sorted(self.counts.items())]
        lines += [f"  LOST: {violation}" for violation in self.violations]
        return "\n".join([*lines, f"losses: {len(self.violations)}"])


def torture(seconds: float, seed: int, instances: int) -> Report:
    """Run for `seconds`; the same seed does the same things in the same order, at times that the machine decides."""
    ended = threading.Event()
    # With what hibernates by itself, if this version has it, hibernating all the time.
    with DaemonProcess(environment={"VTPM_IDLE_TIMEOUT_S": "0.5"}) as daemon:
        begun = time.monotonic()
        address = f"unix:{daemon.runtime_dir / 'operator.sock'}"
        guests = [Guest(address, f"vm-{number}", seed, ended) for number in range(instances)]
        chaos = Chaos(daemon, seed, ended)
        for guest in guests:
            guest.start()
        violations = []
        try:
            while time.monotonic() - begun < seconds and not ended.is_set():
                chaos.turn()
        except BaseException as error:
            violations.append(f"the daemon: {type(error).__name__}: {error}\n{daemon.log_text()[-3000:]}")
            sys.stderr.write(violations[-1])
            if not isinstance(error, Exception):
                raise
        finally:
            ended.set()
            if daemon.process is None or daemon.process.poll() is not None:
                with contextlib.suppress(RuntimeError):
                    daemon.start()
            for guest in guests:
                guest.join()
        for guest in guests:
            if guest.failure is None:
                guest.look_at_the_end()
        violations += [f"{guest.failure}" for guest in guests if guest.failure is not None]
        if violations:
            with contextlib.suppress(OSError):
                violations.append(f"the daemon's last words: {daemon.log_text()[-3000:]}")
        counts: Counter[str] = Counter(chaos.counts)
        for guest in guests:
            counts += guest.counts
        return Report(seed, time.monotonic() - begun, sum(guest.model.acknowledged for guest in guests), counts, violations)

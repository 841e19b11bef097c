"""One run: hostile workers of some instances, one after the other, and two honest instances beside them."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.hostile.honest import Honest
from tests.hostile.scripts import SCRIPTS, SLOW
from tests.hostile.stage import HostileStage
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.cli.client import Client
from vtpm.errors import VtpmError

# What the daemon may take on top while it is attacked.
MORE_MEMORY = 32 << 20
_ATTACKERS = 4
_LIFE_S = 1.5
_CALL_TIMEOUT_S = 1.0
_SELECTION = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0, 7])


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did and found; `violations` empty means that nobody but the hostile workers noticed."""

    seed: int
    seconds: float
    messages: int
    lives: Counter[str]
    ends: Counter[str]
    more_memory: int
    acknowledged: int
    slowest_s: float
    violations: list[str]

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, {self.seconds:.0f} s: {self.messages} hostile messages of {sum(self.lives.values())} workers",
            *(f"  did {name}: {count}" for name, count in sorted(self.lives.items())),
            *(f"  ended by {name}: {count}" for name, count in sorted(self.ends.items())),
            f"honest instances: {self.acknowledged} increments acknowledged and there",
            f"  the slowest took {self.slowest_s * 1e3:.0f} ms",
            f"the daemon's memory: + {self.more_memory / 2**20:.1f} MiB at most",
            *(f"  NOTICED: {violation}" for violation in self.violations),
        ]
        return "\n".join([*lines, f"noticed: {len(self.violations)}"])


class Attacker(threading.Thread):
    """An instance whose worker is hostile, and the operator who brings it back."""

    def __init__(self, stage: HostileStage, name: str, rng: random.Random, ended: threading.Event) -> None:
        super().__init__(name=name)
        self._stage = stage
        self._rng = rng
        self._ended = ended
        self._client = Client(f"unix:{stage.daemon.runtime_dir / 'operator.sock'}")
        self.id = self._create()
        self.lives: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Life after life, until the end."""
        try:
            while not self._ended.is_set():
                (script,) = self._rng.choices(list(SCRIPTS), [1 if name in SLOW else 5 for name in SCRIPTS])
                self.live(script, self._rng.getrandbits(32))
        except BaseException as error:  # noqa: BLE001  # told to whoever joins this thread
            self.failure = error
        self._client.close()

    def live(self, script: str, seed: int) -> None:
        """Power on with a hostile worker, ask it for this and that, and see how it ends."""
        self._stage.turn(self.id, script, seed)
        self.lives[script] += 1
        started = threading.Thread(target=self._start)
        started.start()
        end = time.monotonic() + _LIFE_S
        while time.monotonic() < end and (self._get().state != pb.FAILED):
            if not started.is_alive():
                self._ask()
            time.sleep(0.02)
        found = self._get()
        if found.state == pb.FAILED and found.failure.reason.startswith("ENVELOPE_"):
            # A worker before this one has committed what is no state: that is lost, and it was the instance's own.
            self.ends["its own state"] += 1
        elif found.state == pb.FAILED:
            # Whatever it did to its own instance, an operator is told what that was, and what to do.
            assert found.failure.reason, str(found.failure)
            assert found.failure.remedy, str(found.failure)
            code = found.failure.message.partition("(")[2].partition(":")[0]
            self.ends[f"{found.failure.reason} {code}".strip() if code.isupper() else found.failure.reason] += 1
        else:
            self.ends[f"its operator, as it did {script}"] += 1
        self._stage.forgive(self.id)
        started.join()
        instances = self._client.instances
        self._call(instances.StopInstance, pb.StopInstanceRequest(instance=self.name), timeout_s=30)
        if found.failure.reason.startswith("ENVELOPE_"):
            self._call(instances.DeleteInstance, pb.DeleteInstanceRequest(instance=self.name), timeout_s=30)
            self.id = self._create()

    def _create(self) -> str:
        profile = pb.Profile(ek_algorithms=[pb.ECC_P256])
        made: pb.Instance = self._client.call(
            self._client.instances.CreateInstance, pb.CreateInstanceRequest(name=self.name, profile=profile)
        )
        return made.id

    def _start(self) -> None:
        client = Client(f"unix:{self._stage.daemon.runtime_dir / 'operator.sock'}")
        request = pb.StartInstanceRequest(instance=self.name, startup=pb.STARTUP_CLEAR)
        with contextlib.suppress(VtpmError):
            client.call(client.instances.StartInstance, request, timeout_s=_LIFE_S)
        client.close()

    def _get(self) -> pb.Instance:
        # From whoever has just lost its worker the daemon answers all the same.
        found: pb.Instance = self._client.call(self._client.instances.GetInstance, pb.GetInstanceRequest(instance=self.name))
        return found

    def _ask(self) -> None:
        tpm = self._client.tpm
        name = self.name
        choices = (
            (tpm.ReadPcrs, tpm_pb2.ReadPcrsRequest(instance=name, selections=[_SELECTION])),
            (tpm.Quote, tpm_pb2.QuoteRequest(instance=name, selections=[_SELECTION], nonce=b"hostile")),
            (tpm.GetEventLog, tpm_pb2.GetEventLogRequest(instance=name)),
            (tpm.Execute, tpm_pb2.ExecuteRequest(instance=name, command=bytes.fromhex("80010000000c0000017b0008"))),
            (self._client.instances.HibernateInstance, pb.HibernateInstanceRequest(instance=name)),
        )
        method, request = self._rng.choice(choices)
        self._call(method, request, timeout_s=_CALL_TIMEOUT_S)

    def _call(self, method: object, request: object, timeout_s: float) -> None:
        with contextlib.suppress(VtpmError):
            self._client.call(method, request, timeout_s=timeout_s)


def hostile(seconds: float, seed: int) -> Report:
    """Run for `seconds`; the same seed does the same things, at times that the machine decides."""
    ended, attacked = threading.Event(), threading.Event()
    violations: list[str] = []
    with HostileStage() as stage:
        honest = [Honest(stage.daemon, f"honest-{number}", ended) for number in range(2)]
        attackers = [
            Attacker(stage, f"hostile-{number}", random.Random(f"{seed} {number}"), attacked) for number in range(_ATTACKERS)
        ]
        for guest in honest:
            guest.start()
        # What the daemon loads only when it is first needed is no one's attack.
        for script in ("any_answers", "mute", "commit_storm"):
            attackers[0].live(script, seed)
        pid, host_pid = stage.pid, stage.host.pid if stage.host else 0
        before = stage.begin_to_watch_memory()
        begun = time.monotonic()
        for attacker in attackers:
            attacker.start()
        while time.monotonic() - begun < seconds and not _noticed([*honest, *attackers]):
            try:
                assert "vtpm_commits_total" in stage.scrape()
            except (OSError, AssertionError) as error:
                violations.append(f"the metrics: {error!r}")
                break
            attacked.wait(1)
        attacked.set()
        for attacker in attackers:
            attacker.join()
        ended.set()
        for guest in honest:
            guest.join()
        more_memory = stage.peak_memory() - before
        if stage.daemon.process is None or stage.daemon.process.poll() is not None or stage.pid != pid:
            violations.append("the daemon has ended")
        if stage.host is None or stage.host.poll() is not None or stage.host.pid != host_pid:
            violations.append("the engine host has ended")
        for guest in honest:
            try:
                guest.look_at_the_end()
            except (AssertionError, OSError, VtpmError) as error:
                violations.append(f"{guest.name}: {error}")
        violations += [f"{attacker.name}: {attacker.failure!r}" for attacker in attackers if attacker.failure is not None]
        if more_memory > MORE_MEMORY:
            violations.append(f"the daemon's memory grew by {more_memory / 2**20:.1f} MiB")
        if violations:
            violations.append(f"the daemon's last words: {stage.daemon.log_text()[-3000:]}")
            violations.append(f"the engine host's last words: {(stage.daemon.root / 'host.log').read_text()[-2000:]}")
        return Report(
            seed,
            time.monotonic() - begun,
            stage.sent,
            sum((attacker.lives for attacker in attackers), Counter()),
            sum((attacker.ends for attacker in attackers), Counter()),
            more_memory,
            sum(guest.acknowledged for guest in honest),
            max(guest.slowest_s for guest in honest),
            violations,
        )


def _noticed(threads: Sequence[Honest | Attacker]) -> bool:
    return any(thread.failure is not None for thread in threads)

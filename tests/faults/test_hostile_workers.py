"""A worker that somebody has broken into harms its own instance: each known way to harm others, and a minute of all."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.honest import Honest
from tests.hostile.run import MORE_MEMORY, hostile
from tests.hostile.stage import HostileStage
from tests.support.certs import certificates
from tests.support.waiting import eventually
from vtpm.api.v1 import instance_pb2 as pb
from vtpm.api.v1 import tpm_pb2
from vtpm.errors import VtpmError

_SECONDS = 60.0


@pytest.fixture
def stage() -> Iterator[HostileStage]:
    with HostileStage() as found:
        yield found


@contextlib.contextmanager
def unnoticed_by_others(stage: HostileStage) -> Iterator[None]:
    """Two honest instances at work all the while, whose VMs must notice nothing; nor may the daemon grow."""
    ended = threading.Event()
    honest = [Honest(stage.daemon, f"honest-{number}", ended) for number in range(2)]
    for guest in honest:
        guest.start()
    before = stage.begin_to_watch_memory()
    try:
        yield
        # Some of what they do comes after all of that.
        at_least = [guest.acknowledged + 100 for guest in honest]
        eventually(
            lambda: (
                any(guest.failure for guest in honest)
                or all(guest.acknowledged > least for guest, least in zip(honest, at_least, strict=True))
            ),
            60,
        )
    finally:
        ended.set()
        for guest in honest:
            guest.join()
    for guest in honest:
        guest.look_at_the_end()
    assert stage.peak_memory() - before <= MORE_MEMORY
    assert "vtpm_commits_total" in stage.scrape()


def power_on(stage: HostileStage, name: str) -> None:
    with contextlib.suppress(VtpmError):
        stage.daemon.power_on(name)


@pytest.mark.parametrize(
    ("script", "codes"),
    [
        ("short_commit", {"COMMIT_MALFORMED"}),
        ("version_beyond_sqlite", {"COMMIT_VERSION"}),
        ("another_epoch", {"COMMIT_EPOCH"}),
        ("unknown_kind", {"COMMIT_KIND"}),
        ("short_token", {"COMMIT_TOKEN"}),
        ("large_state", {"COMMIT_SIZE"}),
        ("commit_storm", {"COMMIT_OUTSTANDING"}),
        ("unread_answers", {"COMMIT_UNREAD", "COMMIT_OUTSTANDING"}),
        ("commit_after_snapshot", {"COMMIT_OVER"}),
        ("imported_flood", {"FRAMES_TOO_MANY", "UNASKED_AGAIN"}),
        ("touched_flood", {"FRAMES_TOO_MANY", "UNASKED_AGAIN"}),
        ("noise_on_the_host", {"PARK_MALFORMED", "GOING_ON", "PARK_EMPTY"}),
        ("bogus_load", None),
        ("short_histogram", {"STATUS_BUCKETS"}),
    ],
)
def test_the_first_violation_ends_that_worker_alone_and_is_told_in_one_line(
    stage: HostileStage, script: str, codes: set[str] | None
) -> None:
    victim = stage.daemon.create("broken-into")
    with unnoticed_by_others(stage):
        stage.turn(victim.id, script, 1)
        power_on(stage, "broken-into")
        # Command counts are asked for every ten seconds.
        failed = stage.daemon.until("broken-into", pb.FAILED, 30)
    assert failed.failure.reason == "WORKER_MISBEHAVED"
    assert failed.failure.remedy
    (line,) = stage.lines("engine.worker_misbehaved", victim.id)
    assert codes is None or line["violation"] in codes
    assert f"({line['violation']}:" in failed.failure.message
    # Its operator takes it back, with an honest worker.
    stage.forgive(victim.id)
    request = pb.ResetInstanceRequest(instance="broken-into", startup=pb.STARTUP_CLEAR)
    if script == "unread_answers":
        # It has committed what is no state: that is what it has lost, and its own.
        with pytest.raises(VtpmError, match="sealed state"):
            stage.daemon.client.call(stage.daemon.client.instances.ResetInstance, request)
        return
    assert stage.daemon.client.call(stage.daemon.client.instances.ResetInstance, request).state == pb.ON


def test_good_commits_without_a_pause_keep_nobody_waiting(stage: HostileStage) -> None:
    greedy = stage.daemon.create("greedy")
    with unnoticed_by_others(stage):
        stage.turn(greedy.id, "steady_commits", 3)
        stage.daemon.power_on("greedy")
        eventually(lambda: stage.sent > 50)
    assert stage.daemon.get("greedy").state == pb.ON


def test_a_daemon_that_begins_does_not_wait_for_a_mute_worker(stage: HostileStage) -> None:
    mute = stage.daemon.create("mute")
    stage.turn(mute.id, "mute")
    stage.daemon.power_on("mute")
    honest = stage.daemon.running("honest")
    stage.daemon.kill()
    stage.daemon.start()
    selection = tpm_pb2.PcrSelection(hash_algorithm="sha256", indices=[0])
    read = tpm_pb2.ReadPcrsRequest(instance="honest", selections=[selection])
    assert stage.daemon.client.call(stage.daemon.client.tpm.ReadPcrs, read).values
    assert stage.daemon.get("honest").epoch == honest.epoch
    assert stage.daemon.get("mute").state == pb.ON


def test_a_drain_does_not_wait_for_mute_workers(stage: HostileStage) -> None:
    for number in range(9):
        mute = stage.daemon.create(f"mute-{number}")
        stage.turn(mute.id, "mute")
        stage.daemon.power_on(f"mute-{number}")
    for number in range(3):
        stage.daemon.running(f"honest-{number}")
    hosts = stage.daemon.client.host
    awake: set[str] = set()
    for progress in hosts.DrainHost(pb.DrainHostRequest()):
        awake = {failure.instance for failure in progress.failures}
    assert awake == {f"mute-{number}" for number in range(9)}
    assert all(stage.daemon.get(f"honest-{number}").hibernated for number in range(3))


def test_renewal_does_not_wait_for_mute_workers() -> None:
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        pytest.skip("libfaketime is not installed")
    with HostileStage({"VTPM_CA_AK_LIFETIME_HOURS": "1"}) as stage:
        daemon = stage.daemon
        for number in range(6):
            stage.turn(daemon.create(f"mute-{number}").id, "mute")
            daemon.power_on(f"mute-{number}")
        daemon.running("honest")
        before = certificates(daemon, "honest")["AK", "ECC_P256"].serial
        daemon.stop()
        daemon.environment |= {"LD_PRELOAD": str(libraries[0]), "FAKETIME": "+45m", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        daemon.start()
        eventually(lambda: certificates(daemon, "honest")["AK", "ECC_P256"].serial != before, 60, told=daemon.log_text)


def test_the_log_of_what_one_worker_does_again_and_again_is_bounded(stage: HostileStage) -> None:
    victim = stage.daemon.create("again")
    for life in range(12):
        stage.turn(victim.id, "short_commit", life)
        power_on(stage, "again")
        stage.daemon.until("again", pb.FAILED, 30)
        stage.daemon.client.call(stage.daemon.client.instances.StopInstance, pb.StopInstanceRequest(instance="again"))
    assert len(stage.lines("engine.worker_misbehaved", victim.id)) < 12
    assert Path(stage.daemon.log_path).stat().st_size < 1 << 20


@pytest.mark.timeout(400)
def test_a_minute_of_hostile_workers_is_noticed_by_nobody_else() -> None:
    report = hostile(_SECONDS, secrets.randbelow(1 << 32))
    # Says the seed, should it fail.
    assert not report.violations, str(report)
    assert report.messages
    assert report.acknowledged
    assert any("WORKER_MISBEHAVED" in name for name in report.ends), str(report)

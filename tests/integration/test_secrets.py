"""Invariant 4 and the wall around a worker: where plaintext and keys are, and where they are not."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

from tests.support import raw
from tests.support.daemon import DaemonProcess, worker_pids
from vtpm.api.v1 import instance_pb2 as pb

MARK = b"a secret of the guest, 40 bytes at least"


def worker_of(daemon: DaemonProcess) -> int:
    (pid,) = worker_pids(daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid)
    return pid


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def test_a_worker_is_walled_in(own_daemon: DaemonProcess) -> None:
    own_daemon.running("web-1")
    pid = worker_of(own_daemon)
    fields = status(pid)
    assert (fields["Seccomp"], fields["NoNewPrivs"]) == ("2", "1")
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)
    assert re.search(r"Max processes\s+0\s+0", limits)
    # Not dumpable: its files under /proc belong to root, whoever it runs as.
    assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
    kinds = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
    outside = [kind for kind in kinds if not kind.startswith(("socket:", "anon_inode:[eventpoll]"))]
    # Standard input, and one pipe for its standard output and error.
    assert all(kind == "/dev/null" or kind.startswith("pipe:") for kind in outside), outside
    assert len({kind for kind in outside if kind.startswith("pipe:")}) == 1
    assert {fields[kind] for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert re.search(r"Max file size\s+0\s+0", limits)


def test_the_daemon_and_the_engine_host_leave_no_core_dumps(own_daemon: DaemonProcess) -> None:
    host = own_daemon.client.host.GetHost(pb.GetHostRequest()).engine_host_pid
    assert own_daemon.process is not None
    for pid in (host, own_daemon.process.pid):
        assert re.search(r"Max core file size\s+0\s+0", Path(f"/proc/{pid}/limits").read_text())


def files_of(daemon: DaemonProcess) -> bytes:
    paths = [path for path in daemon.root.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() for path in paths)


def test_what_a_guest_stores_is_on_no_disk_and_in_no_log_in_the_clear(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.ORDINARY, counter=False, size=len(MARK)))
    raw.succeed(sock, raw.nv_write(MARK))
    daemon.vtpm("key", "rotate")
    daemon.vtpm("instance", "stop", "web-1")
    assert MARK[:16] not in files_of(daemon)
    daemon.vtpm("instance", "start", "web-1")
    read = raw.succeed(raw.connect(daemon.get("web-1").tpm_socket), raw.nv_read(raw.ORDINARY, len(MARK)))
    assert raw.nv_value(read) == MARK


def test_keys_are_in_the_key_file_alone(own_daemon: DaemonProcess) -> None:
    import json

    daemon = own_daemon
    daemon.running("web-1")
    key_file = daemon.state_dir / "keys.json"
    text = key_file.read_text()
    secrets = re.findall(r'"([A-Za-z0-9+/=_-]{40,})"', text)
    assert secrets, json.dumps(list(json.loads(text)))
    others = b"".join(p.read_bytes() for p in daemon.root.rglob("*") if p.is_file() and p != key_file)
    for secret in secrets:
        assert secret.encode() not in others
    assert daemon.process is not None
    arguments = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (worker_of(daemon), daemon.process.pid))
    assert not any(secret.encode() in arguments for secret in secrets)


def test_rotation_wraps_data_keys_anew_and_leaves_states_alone(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    sock = raw.connect(daemon.running("web-1").tpm_socket)
    raw.succeed(sock, raw.nv_define(raw.COUNTER, counter=True))
    daemon.create("web-2")

    def rows() -> tuple[list[bytes], list[bytes]]:
        with sqlite3.connect(f"file:{daemon.state_dir / 'vtpm.db'}?mode=ro", uri=True) as store:
            states = [blob for (blob,) in store.execute("SELECT blob FROM states ORDER BY instance")]
            wrapped = store.execute("SELECT * FROM data_keys ORDER BY instance").fetchall()
        return states, wrapped

    states, wrapped = rows()
    key_ids = {daemon.client.host.GetHost(pb.GetHostRequest()).key_id}
    daemon.vtpm("key", "rotate")
    key_ids.add(daemon.client.host.GetHost(pb.GetHostRequest()).key_id)
    assert len(key_ids) == 2
    after_states, after_wrapped = rows()
    assert after_states == states
    assert all(old != new for old, new in zip(wrapped, after_wrapped, strict=True))
    # A running instance goes on, and everything starts again under the new key.
    raw.succeed(sock, raw.nv_increment())
    before = raw.counter_of(sock)
    daemon.vtpm("instance", "stop", "web-1")
    daemon.stop()
    daemon.start()
    assert daemon.power_on("web-2").state == pb.ON
    assert raw.counter_of(raw.connect(daemon.power_on("web-1").tpm_socket)) == before


def test_deletion_erases_the_data_key_from_the_files(own_daemon: DaemonProcess) -> None:
    daemon = own_daemon
    made = daemon.create("web-1")
    with sqlite3.connect(f"file:{daemon.state_dir / 'vtpm.db'}?mode=ro", uri=True) as store:
        (wrapped,) = store.execute("SELECT blob FROM data_keys").fetchone()
    assert wrapped in files_of(daemon)
    daemon.client.instances.DeleteInstance(pb.DeleteInstanceRequest(instance=made.id))
    left = files_of(daemon)
    # A sealed state may linger in the write-ahead log for a while: without its data key it is noise.
    assert wrapped not in left, "the wrapped data key is still in a file of the store"

"""Composition root: reads the configuration, builds the parts, runs them, shuts down in order.

Order of the end: no new calls, running calls finish (drain), commits in flight finish, the store closes. What is powered on
runs on with the engine host, and the next daemon takes it over.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import structlog
import uvloop
from sqlalchemy import make_url

from vtpm import __version__, files
from vtpm.api.server import ApiServer
from vtpm.certification import begin_upkeep, look_after_identities, open_desk
from vtpm.config import Settings
from vtpm.engine import sandbox
from vtpm.engine.belt import Belt, Room
from vtpm.engine.committer import CommitReport, Committer
from vtpm.engine.limits import InstanceLimits
from vtpm.engine.stats import BUCKETS_NS
from vtpm.engine.worker_engine import worker_engines
from vtpm.engine.workers import Workers
from vtpm.errors import ConfigError, UnavailableError, VtpmError
from vtpm.instance.activation import Activations
from vtpm.instance.anchors import open_freshness
from vtpm.instance.claims import Claims
from vtpm.instance.durability import Durability
from vtpm.instance.lifecycle import Lifecycle
from vtpm.instance.manager import InstanceManager
from vtpm.instance.sockets import InstanceSockets
from vtpm.instance.watch import ChangeHub
from vtpm.log import SourceLog, configure
from vtpm.metrics import Metrics
from vtpm.seal.keys import load_key_provider
from vtpm.store.model import InstanceState
from vtpm.store.row_key import open_row_key
from vtpm.store.store import Store
from vtpm.wire.fdstore import ServiceManagerStore
from vtpm.wire.mssim import MssimServers
from vtpm.wire.pki_http import DistributionServer
from vtpm.wire.swtpm import ControlSockets
from vtpm.wire.systemd import ActivatedListener, inherited, notify
from vtpm.wire.vsock import Relay, VsockServer

log: Final = structlog.get_logger("vtpm.daemon")

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
_METRICS_INTERVAL_S: Final = 10.0
# Beside the sockets of instances: the store's, gRPC's, and what calls and commits need.
_OWN_DESCRIPTORS: Final = 48
# The client's, gRPC's, and ours to gRPC.
_GUEST_CONNECTION_DESCRIPTORS: Final = 3
# Those of each instance, and some for those that are busy.
_DESCRIPTORS: Final = 1 << 20
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Daemon:
    """One daemon: `run` serves until `stop` is called."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begin the orderly end."""
        self._stopping.set()

    async def run(self) -> None:
        """Build, recover, serve, drain.

        Raises:
            VtpmError: something that the daemon can't run without is missing or damaged; nothing was changed.
        """
        settings = self._settings
        async with contextlib.AsyncExitStack() as stack:
            for directory in (settings.state_dir, settings.runtime_dir):
                stack.enter_context(owned_directory(directory))
            check_place(Path(make_url(settings.store_url).database or ""))
            metrics = Metrics(BUCKETS_NS)
            store = await asyncio.to_thread(Store.open, settings.store_url)
            stack.callback(store.close)
            keys = await asyncio.to_thread(
                load_key_provider,
                settings.key_provider,
                state_dir=settings.state_dir,
                options=settings.key_provider_options,
                create=store.is_empty(),
            )
            await asyncio.to_thread(open_row_key, store, keys)
            freshness = open_freshness(settings, store, keys)
            # After the last commit, before the store closes.
            stack.push_async_callback(freshness.close)
            desk = await open_desk(settings, store, keys, stack)
            committer = Committer(store.commit, lambda report: _observe(metrics, report))
            stack.callback(committer.close)
            boot_id = _BOOT_ID.read_text().strip()
            given = inherited(os.environ)
            manager_store = ServiceManagerStore.open(os.environ, [name for name, _ in given.stored])
            if manager_store is not None:
                stack.callback(manager_store.close)
            room = Room(to_come=_sockets_of(store.counts()))
            workers = Workers(
                settings.runtime_dir,
                committer,
                memory_limit=settings.worker_memory_limit_mb << 20,
                commit_timeout_s=settings.commit_timeout_s,
                command_timeout_s=settings.command_timeout_s,
                limits=InstanceLimits(settings.command_rate, settings.command_burst, settings.max_connections),
                belt=Belt(manager_store, room=room.left),
                judge=Claims(store, boot_id),
                stored=given.stored,
            )
            hidden = (settings.state_dir, settings.runtime_dir)
            engines = worker_engines(workers, tpm_server_path=settings.tpm_server_path, hidden=hidden)
            lifecycle = Lifecycle(
                store,
                keys,
                engines,
                InstanceSockets(settings.runtime_dir),
                ChangeHub(),
                boot_id=boot_id,
                max_running=settings.max_running,
                idle_timeout_s=settings.idle_timeout_s,
            )
            lifecycle.thaws.observe = metrics.observe_thaw
            stack.push_async_callback(lifecycle.close)
            creation = look_after_identities(lifecycle, settings, metrics, desk)
            lifecycle.thaws.pause()
            await lifecycle.recover()
            await freshness.begin(lifecycle)
            lifecycle.thaws.go_on()
            lifecycle.thaws.on_hibernated.append(lambda _instance: freshness.soon())
            if settings.anchor != "none":
                lifecycle.check_fresh = freshness.check
            manager = InstanceManager(
                lifecycle,
                creation,
                default_engine=settings.default_engine,
                state_dir=settings.state_dir,
                runtime_dir=settings.runtime_dir,
                engine_host_pid=lambda: workers.host_pid,
            )
            manager.rewrap_anchor = freshness.rewrap
            manager.maintenance.anchor = freshness.update
            control = ControlSockets(manager)
            manager.subscribe(control.on_change)
            await control.start()
            stack.push_async_callback(control.close)
            mssim = MssimServers(manager, settings.mssim_address, settings.mssim_ports)
            mssim.start()
            stack.push_async_callback(mssim.close, settings.drain_timeout_s)
            if settings.vsock_port:
                vsock = VsockServer(Relay(manager, settings.vsock_cids), settings.vsock_port)
                vsock.start()
                stack.push_async_callback(vsock.close)
            # Before anybody can ask for an instance: what waits in the pool is for the first of them too.
            await begin_upkeep(manager, lifecycle, creation, settings, stack)
            listener = given.listener
            own_socket = settings.runtime_dir / "api.sock" if listener else None
            activations = Activations(lifecycle, creation.identity, timeout_s=settings.activation_timeout_s)
            api = ApiServer(
                manager,
                settings,
                metrics,
                Durability(lifecycle, freshness),
                desk,
                activations,
                operator_socket=own_socket,
                guest_connections=_room_for_guests(room.to_come),
            )
            await api.start()
            stack.push_async_callback(api.stop)
            # The guest sockets come with the loop's next turn.
            await asyncio.sleep(0)
            room.to_come = 0
            activated = ActivatedListener(listener, own_socket) if listener and own_socket else None
            if activated is not None:
                stack.push_async_callback(activated.close)
                activated.start()
            if settings.metrics_address:
                scraped = DistributionServer(settings.metrics_address, metrics.published, setting="metrics_address")
                await scraped.start()
                stack.push_async_callback(scraped.close)
                observer = asyncio.get_running_loop().create_task(_observe_instances(manager, metrics))
                stack.callback(observer.cancel)
            notify("READY=1")
            log.info("daemon.ready", version=__version__, socket=str(settings.operator_socket), pid=os.getpid())
            await self._stopping.wait()
            notify("STOPPING=1")
            log.info("daemon.draining", timeout_s=settings.drain_timeout_s)
            if activated is not None:
                await activated.stop_accepting()
            await api.drain(settings.drain_timeout_s)
        log.info("daemon.stopped")


def _sockets_of(counts: Mapping[InstanceState, int]) -> int:
    """How many sockets the daemon listens on for instances: one each, and one more for what is ON.

    Raises:
        UnavailableError: DESCRIPTORS_EXHAUSTED, it may not open so many; halfway through, libraries would end the process.
    """
    sockets = sum(counts.values()) + counts.get(InstanceState.ON, 0)
    wanted, limit = sandbox.open_descriptors() + sockets + _OWN_DESCRIPTORS, sandbox.descriptor_limit()
    if wanted > limit:
        text = f"the sockets of the instances need {wanted:,} descriptors, and the daemon may open {limit:,}"
        raise UnavailableError("DESCRIPTORS_EXHAUSTED", text, remedy="raise LimitNOFILE= of the unit (ulimit -Hn)")
    return sockets


def _room_for_guests(to_come: int) -> int:
    """How many connections of guests there is room for: half of the descriptors that are left."""
    left = sandbox.descriptor_limit() - sandbox.open_descriptors() - to_come - _OWN_DESCRIPTORS
    return max(1, left // 2 // _GUEST_CONNECTION_DESCRIPTORS)


def _observe(metrics: Metrics, report: CommitReport) -> None:
    metrics.observe_commit(report.batch_size, report.refused, report.seconds)


async def _observe_instances(manager: InstanceManager, metrics: Metrics) -> None:
    """Collect from time to time what only the workers and the store know."""
    lines = SourceLog(log)
    while True:
        try:
            for row in await manager.drain_command_counts():
                metrics.observe_ordinals(row.ordinal, row.count, row.nanos, list(row.buckets))
            host = await manager.host()
            metrics.set_instances(host.counts, awake=host.awake, hibernated=host.hibernated)
        except VtpmError as error:
            lines.warning("metrics", "metrics.collection_failed", reason=error.reason)
        except Exception as error:  # noqa: BLE001  # the next turn has other numbers
            lines.error("metrics", "metrics.collection_failed", reason="INTERNAL", error=type(error).__name__)
        await asyncio.sleep(_METRICS_INTERVAL_S)


def check_place(path: Path, *, service: bool = False) -> None:
    """Refuse a place for a file where somebody else could put another; `service` as in vtpm.files.

    Raises:
        ConfigError: DIRECTORY_NOT_TRUSTED or DIRECTORY_UNUSABLE.
    """
    try:
        files.check_parents(path, service=service)
    except files.UnsafePathError as error:
        raise not_trusted(path, error) from None
    except OSError as error:
        raise ConfigError(
            "DIRECTORY_UNUSABLE", f"{error.strerror}", subject=str(path), remedy="check the directories above it"
        ) from None


def not_trusted(path: Path, error: files.UnsafePathError) -> ConfigError:
    """Return the error of a path at which somebody else could put another thing."""
    own = error.place == str(path) and error.reason in ("OWNER", "WRITABLE")
    return ConfigError(
        f"DIRECTORY_{error.reason}" if own else "DIRECTORY_NOT_TRUSTED",
        f"somebody else could put another in its place: {error.strerror}",
        subject=str(path),
        remedy=error.remedy,
    )


@contextlib.contextmanager
def owned_directory(path: Path) -> Iterator[None]:
    """Make `path`, 0700, and hold its lock: one daemon at a time.

    Raises:
        ConfigError: it can't be made, it or one above it is somebody else's or open to others, or another daemon has it.
    """
    try:
        with files.open_directory(path, trusted=True, make=0o700) as directory:
            status = os.fstat(directory.fd)
            if status.st_uid != os.geteuid():
                raise ConfigError(
                    "DIRECTORY_OWNER",
                    f"the directory belongs to uid {status.st_uid}, the daemon runs as {os.geteuid()}",
                    subject=str(path),
                    remedy="run as its owner, or give another directory",
                )
            if status.st_mode & 0o022:
                raise ConfigError(
                    "DIRECTORY_WRITABLE", "others may write to the directory", subject=str(path), remedy=f"chmod go-w '{path}'"
                )
            lock = directory.open("daemon.lock", os.O_RDWR | os.O_CREAT)
    except files.UnsafePathError as error:
        raise not_trusted(path, error) from None
    except OSError as error:
        raise ConfigError(
            "DIRECTORY_UNUSABLE",
            f"the directory can't be used: {error.strerror}",
            subject=str(path),
            remedy="check its owner and mode, or move it: --state-dir, --runtime-dir",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise ConfigError(
            "DAEMON_RUNNING",
            "another daemon uses this directory",
            subject=str(path),
            remedy="stop it, or give this one other directories: --state-dir, --runtime-dir",
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def parse_arguments(arguments: list[str]) -> dict[str, Any]:
    """Turn `--state-dir X` and the like into settings; every option of vtpm.config.Settings is a flag."""
    parser = argparse.ArgumentParser(
        prog="server.py",
        description="The vTPM daemon: a TPM 2.0 for every VM. Every option: docs/configuration.md.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vtpm {__version__}")
    parser.add_argument(
        "--config-file", metavar="VALUE", help="The TOML file; default: /etc/vtpm/vtpm.toml or the XDG directory's."
    )
    for name, field in Settings.model_fields.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=(field.description or "").replace("%", "%%")
        )
    return {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}


def main(arguments: list[str]) -> int:
    """Run the daemon in the foreground; returns the exit status."""
    try:
        settings = Settings.load(parse_arguments(arguments))
        # What is made is for this user alone, but where a mode says otherwise.
        os.umask(0o077)
        configure(settings.log_format, settings.log_level)
        sandbox.forbid_dumps()
        sandbox.raise_descriptor_limit(_DESCRIPTORS)
        uvloop.run(_serve(settings))
    except ConfigError as error:
        return _say(error, EXIT_CONFIG)
    except VtpmError as error:
        return _say(error, EXIT_FAILED)
    return EXIT_OK


def _say(error: VtpmError, status: int) -> int:
    sys.stderr.write(f"vtpm: {error.reason}: {error}\n")
    return status


async def _serve(settings: Settings) -> None:
    daemon = Daemon(settings)
    loop = asyncio.get_running_loop()
    on_signal: Callable[[], None] = daemon.stop
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await daemon.run()

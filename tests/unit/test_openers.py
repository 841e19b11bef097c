"""All files are opened by vtpm.files and every server is looked at by vtpm.peers, but for what stands here with its reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2] / "vtpm"
OPENERS: Final = ("files.py", "peers.py")

# What touches a file, a directory or a socket by a name. `replace` is not looked for: so many texts have it.
METHODS: Final = {
    "open",
    *("read_text", "read_bytes", "write_text", "write_bytes", "touch", "mkdir", "rmdir", "iterdir"),
    *("chmod", "lchmod", "chown", "unlink", "rename", "symlink_to", "hardlink_to", "connect", "sock_connect", "bind"),
}
FUNCTIONS: Final = {
    *(f"os.{name}" for name in ("open", "chmod", "chown", "lchown", "mkdir", "makedirs", "mkfifo", "mknod", "link", "symlink")),
    *(f"os.{name}" for name in ("unlink", "remove", "rename", "replace", "rmdir", "truncate", "listdir", "scandir", "utime")),
    *("open", "io.open", "os.fdopen", "shutil.rmtree", "shutil.copy", "shutil.copyfile", "shutil.move"),
    *("tempfile.TemporaryDirectory", "tempfile.mkdtemp", "tempfile.mkstemp", "tempfile.NamedTemporaryFile"),
    *("sqlite3.connect", "grpc.insecure_channel", "grpc.aio.insecure_channel"),
}
# Why each place that is left may be as it is. A new one: use vtpm.files or vtpm.peers, or say here why not.
ALLOWED: Final[dict[str, dict[str, set[str]]]] = {
    "in the runtime or state directory: ours alone, and its parents are looked at before it is used (daemon.owned_directory)": {
        "api/guests.py": {
            *("asyncio.get_running_loop().sock_connect", "path.unlink", "self._directory.mkdir", "shutil.rmtree"),
        },
        "api/server.py": {"self._operator_socket.unlink"},
        "api/sockets.py": {"bound.rename", "bound.unlink"},
        "engine/host.py": {"path.unlink"},
        "engine/link.py": {"listener.bind", "path.unlink", "sock.connect"},
        "instance/sockets.py": {
            *("directory.mkdir", "listener.bind", "path.unlink", "self._root.iterdir", "self._root.mkdir", "shutil.rmtree"),
            "self.directory(instance).iterdir",
        },
        "wire/doors.py": {"bound.rename", "bound.unlink", "listener.bind"},
        "wire/systemd.py": {"asyncio.get_running_loop().sock_connect"},
        "wire/vsock.py": {"asyncio.get_running_loop().sock_connect"},
    },
    "the store's own database, whose parents are looked at before it is opened (daemon.check_place)": {
        "store/commits.py": {"sqlite3.connect"},
        "store/freshness.py": {"sqlite3.connect"},
        "store/snapshots.py": {"sqlite3.connect"},
        "store/wal.py": {"os.open"},
    },
    "a copy in a directory that was made for it, 0700, where nobody could put another (files.scratch_directory)": {
        "cli/backup.py": {"sqlite3.connect"},
        "store/backup.py": {"Store.open", "sqlite3.connect", "store.open"},
    },
    "what others made, opened to be read and looked at; or a database in memory": {"store/foreign.py": {"sqlite3.connect"}},
    "only after this process has written it, or an anchor beside one that was read: a name in a directory that is trusted": {
        "cli/backup.py": {"written.unlink"},
        "seal/anchor_tpm2.py": {"self._next.unlink", "self._path.unlink"},
    },
    "single names in a directory that is held by a descriptor (files.Directory)": {
        "cli/dropin_linear.py": {"self._held().open"},
        "cli/dropin_serve.py": {"directory.unlink", "listener.bind", "os.rename"},
        "cli/dropin_state.py": {"directory.unlink", "place.unlink", "self._held().open"},
        "cli/swtpm_files.py": {"place.open", "place.unlink"},
        "daemon.py": {"directory.open"},
        "store/backup.py": {"os.link", "source.open"},
        "store/backup_file.py": {"directory.open"},
    },
    "a descriptor that was opened and looked at, or the name of one in /proc": {
        "api/sockets.py": {"os.chmod", "os.chown"},
        "cli/dropin_process.py": {"open"},
        "engine/link.py": {"os.fdopen"},
        "engine/syscalls.py": {"open"},
        "seal/file_provider.py": {"open"},
        "store/backup_file.py": {"open"},
    },
    "a device: opened without waiting, and looked at": {"cli/dropin_device.py": {"os.open"}},
    "the engine host's log: appended to, never by a link, and no device or pipe": {"engine/host_log.py": {"os.open"}},
    "the null device, by its fixed name": {
        "engine/link.py": {"Path(os.devnull).open"},
        "cli/dropin_process.py": {"os.open"},
        "engine/sandbox.py": {"os.open"},
        "engine/standalone.py": {"os.open"},
    },
    "a fixed name of the kernel's": {
        "daemon.py": {"_BOOT_ID.read_text"},
        "engine/isolation.py": {"Path('/proc/self', name).write_text"},
        "engine/sandbox.py": {"Path('/proc/self/maps').read_text"},
        "engine/worker_uids.py": {
            *("Path('/proc/self', kind).read_text", "Path('/proc/self/setgroups').read_text"),
            "Path('/proc/self/status').read_text",
        },
    },
    "a new directory, 0700, of an unguessable name": {"cli/dropin_certs.py": {"tempfile.TemporaryDirectory"}},
    "in a worker's own file system, where nobody but its program is; what that one left is looked at": {
        "engine/tpm_server.py": {
            *("(self._directory / _NV_FILE).open", "(self._directory / _NV_FILE).unlink", "os.fdopen", "os.open"),
        },
    },
    "a server that vtpm.peers holds for it, or no unix socket": {"cli/client.py": {"grpc.insecure_channel"}},
    "a port, no name": {"engine/tpm_server.py": {"sock.connect"}, "wire/vsock.py": {"listener.bind"}},
    "no file and no server: a method of ours or of a library's that has such a name": {
        "cli/dropin_control.py": {"tpm.connect"},
        "cli/dropin_daemon.py": {"peers.connect"},
        "daemon.py": {"ServiceManagerStore.open"},
        "engine/duties.py": {"self._durable.open"},
        "engine/sleepers.py": {"WorkerLink.open", "self.stock.bind"},
        "engine/stock.py": {"WorkerLink.open"},
        "engine/worker.py": {"self._channels.open"},
        "engine/workers.py": {"HostLink.connect", "WorkerLink.open"},
        "pki/pkcs11.py": {"token.open"},
        "store/database.py": {"read.connect"},
        "store/store.py": {"database.connect", "self._read_engine.connect"},
        "wire/control_client.py": {"peers.connect"},
    },
}


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        method = isinstance(node.func, ast.Attribute) and node.func.attr in METHODS and not text.startswith("os.")
        if method or text in FUNCTIONS:
            yield text


def found() -> set[tuple[str, str]]:
    seen: set[tuple[str, str]] = set()
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name not in OPENERS and "_pb2" not in name:
            seen.update((name, call) for call in calls(ast.parse(path.read_text())))
    return seen


def test_files_are_opened_and_servers_are_reached_in_one_way() -> None:
    allowed = {(name, call) for places in ALLOWED.values() for name, some in places.items() for call in some}
    assert found() - allowed == set(), "use vtpm.files or vtpm.peers, or say in ALLOWED why not"
    assert allowed - found() == set(), "what is gone needs no reason any more"


def test_the_search_sees_what_it_is_for() -> None:
    code = """
with open(name) as file: pass
os.open(name, os.O_RDONLY); Path(name).write_bytes(b""); path.chmod(0o600); os.chown(name, 1, 1)
socket.connect(name); grpc.insecure_channel(name); sqlite3.connect(name)
"""
    assert len(list(calls(ast.parse(code)))) == 8

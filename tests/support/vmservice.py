"""A VM that runs the service itself: Python, its packages, libtpms and swtpm on a disk, this project's code beside it.

For what this host's kernel lacks: AF_VSOCK with a peer, and /dev/vtpmx. It boots with SeaBIOS and without a TPM of its own.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from tests.support.vm import Vm
from tests.support.vmassets import COMMAND_LINE, Assets, AssetsUnavailableError, Cpio, cache_directory, kernel_package, modules

ROOT = Path(__file__).resolve().parents[2]
MEMORY_MIB = 768
DISK = "/disk"
_MODULES = (
    "virtio_blk",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vsock_loopback",
    "tpm_vtpm_proxy",
)
# Of Python's own library, what a daemon never loads.
_UNNEEDED = ("test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "site-packages", "dist-packages")
_PROGRAMS = ("swtpm", "swtpm_ioctl")
_LIBRARIES = ("libtpms.so.0", "libseccomp.so.2", "libtss2-esys.so.0", "libtss2-mu.so.0", "libtss2-tctildr.so.0")
_KEPT_BUILDS = 2
_START = f"""
mkdir -p {DISK}
while read -r module; do insmod /service/$module; done </service/order
mount -t ext4 -o ro /dev/vda {DISK}
for place in dev proc sys; do mount -o bind /$place {DISK}/$place; done
mount -o bind /service/code {DISK}/code
mount -t tmpfs tmpfs {DISK}/tmp
"""
_ENTER = (
    f"chroot {DISK} /bin/env -i PATH=/bin HOME=/tmp PYTHONHOME=/python PYTHONPATH=/site:/code PYTHONDONTWRITEBYTECODE=1 "
    "LD_LIBRARY_PATH=/python/lib"
)


class ServiceVm(Vm):
    """The VM; `start_service` once it has booted, then `python` and `inside`."""

    def __init__(self, assets: Assets, disk: Path, initrd: Path, directory: Path) -> None:
        super().__init__(assets, _NoTpm(), directory)
        self._disk = disk
        self._initrd = initrd

    # Where the service's /tmp is for what runs beside it.
    tmp = f"{DISK}/tmp"

    def start_service(self) -> None:
        """Mount what the service needs."""
        self.run(_START)

    def inside(self, words: str) -> str:
        """The shell's words for a command with the disk as its root."""
        return f"{_ENTER} {words}"

    def python(self, words: str) -> str:
        """The same for Python."""
        return self.inside(f"/python/bin/python {words}")

    def _command(self, qmp: int, guest: int) -> list[str]:
        words = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB)]
        words += ["-machine", "q35", "-nodefaults", "-display", "none", "-serial", f"file:{self._serial}"]
        words += ["-chardev", f"socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control"]
        words += ["-chardev", f"socket,id=agent,fd={guest}", "-device", "virtio-serial-pci"]
        words += ["-device", "virtserialport,chardev=agent,name=vtpm.agent"]
        words += ["-drive", f"if=none,id=disk,format=raw,readonly=on,file={self._disk}"]
        words += ["-device", "virtio-blk-pci,drive=disk"]
        return [*words, "-kernel", str(self.assets.kernel), "-initrd", str(self._initrd), "-append", COMMAND_LINE]


class _NoTpm:
    """This VM is a host and has no TPM: nobody may plug one in."""

    def plug(self) -> Path:
        raise NotImplementedError


def build(assets: Assets, directory: Path) -> ServiceVm:
    """Return the VM, with its disk from the cache or made anew; `directory` is for what belongs to this VM alone.

    Raises:
        AssetsUnavailableError: something that goes onto the disk is not installed.
    """
    disk = _disk()
    initrd = directory / "initrd"
    initrd.write_bytes(assets.initrd.read_bytes() + _code())
    return ServiceVm(assets, disk, initrd, directory)


# ---- disk ----------------------------------------------------------------------------------------------------------------


def _disk() -> Path:
    cache = cache_directory()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        disk = cache / f"service-{_key()}.ext4"
        if not disk.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as directory:
                made = Path(directory) / "disk"
                _make_disk(Path(directory) / "root", made)
                made.rename(disk)
        os.utime(disk)
        for old in sorted(cache.glob("service-*"), key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT_BUILDS:]:
            old.unlink()
    return disk


def _key() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(sys.version.encode())
    for distribution in _distributions():
        digest.update(f"{distribution.name}={distribution.version}\n".encode())
    for path in _system_files().values():
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _distributions() -> list[importlib.metadata.Distribution]:
    """What the daemon needs, by the requirements in pyproject.toml."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = ["vtpm"]
    while todo:
        distribution = importlib.metadata.distribution(todo.pop())
        for line in distribution.requires or []:
            requirement = Requirement(line)
            name = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                found[name] = importlib.metadata.distribution(name)
                todo.append(name)
    return [found[name] for name in sorted(found)]


def _system_files() -> dict[str, Path]:
    """Programs and libraries from this host, by their paths on the disk; not those that they load."""
    found = {"sbin/ldconfig": Path("/sbin/ldconfig"), "bin/env": Path("/usr/bin/env")}
    for name in _PROGRAMS:
        place = shutil.which(name)
        if place is None:
            raise AssetsUnavailableError(f"{name} is not installed: ./script/setup test")
        found[f"bin/{name}"] = Path(place)
    listed = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    for name in _LIBRARIES:
        match = re.search(rf"^\s{re.escape(name)} .*x86-64.* => (\S+)$", listed, re.M)
        if match is None:
            raise AssetsUnavailableError(f"{name} is not installed: ./script/setup test")
        found[f"usr/lib/x86_64-linux-gnu/{name}"] = Path(match[1]).resolve()
    return found


def _make_disk(root: Path, disk: Path) -> None:
    for directory in ("dev", "proc", "sys", "tmp", "code", "etc", "site", "python/bin", "python/lib"):
        (root / directory).mkdir(parents=True)
    (root / "etc/ld.so.conf").write_text("/usr/lib/x86_64-linux-gnu\n")
    (root / "etc/passwd").write_text("root:x:0:0:root:/tmp:/bin/sh\n")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = Path(os.path.realpath(sys.executable))
    shutil.copy(interpreter, root / "python/bin/python")
    shutil.copytree(
        sysconfig.get_path("stdlib"),
        root / "python/lib" / version,
        ignore=lambda _directory, names: [name for name in names if name in (*_UNNEEDED, "__pycache__")],
    )
    for distribution in _distributions():
        for file in distribution.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = root / "site" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), target)
    for path, source in _system_files().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / path)
    _copy_libraries(root)
    _compile(root / "python/lib" / version, root / "site")
    subprocess.run(["/sbin/ldconfig", "-r", str(root)], check=True)
    size = sum(-(-path.lstat().st_size // 4096) + 1 for path in root.rglob("*")) * 4096
    make = shutil.which("mkfs.ext4") or "/sbin/mkfs.ext4"
    options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-d", str(root)]
    subprocess.run([make, *options, str(disk), f"{(size * 5 // 4 >> 10) + 16384}k"], check=True, capture_output=True)


def _copy_libraries(root: Path) -> None:
    """What the binaries on the disk load from the system."""
    binaries = [path for path in root.rglob("*") if path.is_file() and path.read_bytes()[:4] == b"\x7fELF"]
    copied: set[str] = set()
    for binary in binaries:
        told = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False).stdout
        for name, path in re.findall(r"^\s(?:(\S+) => )?(/\S+) \(0x", told, re.M):
            if path.startswith(str(root)) or path in copied:
                continue
            copied.add(path)
            # The loader is named by its path, the others are looked for.
            target = root / (f"usr/lib/x86_64-linux-gnu/{name}" if name else path.lstrip("/"))
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(os.path.realpath(path), target)


def _compile(*directories: Path) -> None:
    # Unchecked, as times are those of copies.
    words = [sys.executable, "-m", "compileall", "-q", "-j", "2", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([*words, *map(str, directories)], check=False, capture_output=True)


# ---- code ----------------------------------------------------------------------------------------------------------------


def _code() -> bytes:
    """An archive of this project's code and of kernel modules, to be unpacked over the initramfs."""
    archive = Cpio()
    with tempfile.TemporaryDirectory(prefix="vtpm-e2e-") as directory:
        code = Path(directory) / "code"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "vtpm", code / "vtpm", ignore=ignore)
        shutil.copy(ROOT / "server.py", code)
        for name in ("__init__.py", "support/__init__.py", "support/vsock.py"):
            (code / "tests" / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / "tests" / name, code / "tests" / name)
        # The key providers are found by it.
        for file in importlib.metadata.distribution("vtpm").files or []:
            if file.name in ("METADATA", "entry_points.txt"):
                (code / file).parent.mkdir(exist_ok=True)
                shutil.copy(file.locate(), code / file)
        shutil.copytree(ROOT / "tests/e2e/service", code / "service", ignore=ignore)
        _compile(code)
        archive.add("service", stat.S_IFDIR | 0o755)
        archive.add("service/code", stat.S_IFDIR | 0o755)
        for path in sorted(code.rglob("*")):
            name = f"service/{path.relative_to(Path(directory))}"
            if path.is_dir():
                archive.add(name, stat.S_IFDIR | 0o755)
            else:
                archive.add(name, stat.S_IFREG | 0o755, path.read_bytes())
    names = []
    for name, data in _kernel_modules():
        archive.add(f"service/{name}.ko", stat.S_IFREG | 0o644, data)
        names.append(f"{name}.ko\n")
    archive.add("service/order", stat.S_IFREG | 0o644, "".join(names).encode())
    return gzip.compress(archive.finish(), 1, mtime=0)


def _kernel_modules() -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory(prefix="vtpm-e2e-") as directory:
        subprocess.run(["dpkg-deb", "-x", str(kernel_package(cache_directory())), directory], check=True)
        yield from modules(Path(directory), _MODULES)

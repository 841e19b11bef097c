"""What the test VM boots, made of Debian packages: kernel, initramfs, and a signed UKI for Secure Boot.

Packages are downloaded and unpacked, never installed, into VTPM_E2E_CACHE (default: ~/.cache/vtpm-e2e); as any user. A build
is found again by the hash of all that went into it. Remove the directory to get newer packages.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import lzma
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

GUEST = Path(__file__).resolve().parents[1] / "e2e" / "guest"
COMMAND_LINE = "console=ttyS0 quiet panic=-1"
RELEASE = 'ID=vtpm-e2e\nNAME="vTPM end-to-end tests"\nVERSION_ID=1\n'
OVMF_KEYS = Path("/usr/share/ovmf")

_META_KERNEL = "linux-image-cloud-amd64"
_PACKAGES = ("busybox-static", "systemd-boot-efi", "sbsigntool")
# In the order of their dependencies; what a kernel has built in is left out. Not stripped: Secure Boot asks for the signature
# at the end.
_MODULES = (
    "efivarfs",
    "virtio_ring",
    "virtio",
    "virtio_pci_legacy_dev",
    "virtio_pci_modern_dev",
    "virtio_pci",
    "virtio_console",
)
_STUBBED = "libcurl-gnutls.so.4"
_DOWNLOAD_TIMEOUT_S = 300
_KEPT_BUILDS = 3


class AssetsUnavailableError(Exception):
    """Nothing is cached and nothing can be downloaded; the text says what was tried."""


@dataclass(frozen=True, slots=True)
class Assets:
    """Files that a VM boots."""

    kernel: Path
    initrd: Path
    # A directory to be served as an EFI system partition. Its UKI is signed, and has kernel, initrd, RELEASE and COMMAND_LINE.
    esp: Path


def cache_directory() -> Path:
    """Where packages and builds are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("VTPM_E2E_CACHE") or base / "vtpm-e2e")


def prepare(cache: Path | None = None) -> Assets:
    """Return the assets, downloading and building what is missing; processes that ask at once take turns.

    Raises:
        AssetsUnavailableError: a package is missing and cannot be downloaded.
    """
    if platform.machine() != "x86_64":
        raise AssetsUnavailableError(
            f"the test VM is x86_64 and takes tpm2-tools from this host, which is {platform.machine()}"
        )
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packages = _packages(cache)
        libraries = _libraries()
        build = cache / f"build-{_key(packages, libraries)}"
        if not build.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as directory:
                made = Path(directory) / "made"
                made.mkdir()
                _build(made, packages, libraries)
                made.rename(build)
        os.utime(build)
        for old in sorted(cache.glob("build-*"), key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT_BUILDS:]:
            shutil.rmtree(old, ignore_errors=True)
    return Assets(build / "vmlinuz", build / "initrd", build / "esp")


# ---- packages ------------------------------------------------------------------------------------------------------------


def _packages(cache: Path) -> list[Path]:
    """The packages' files, the kernel first."""
    debs = cache / "debs"
    debs.mkdir(exist_ok=True)
    patterns = ("linux-image-*-cloud-amd64", *_PACKAGES)
    found = [sorted(debs.glob(f"{pattern}_*.deb"), key=lambda path: path.stat().st_mtime) for pattern in patterns]
    if not all(found):
        _download(cache, debs)
        found = [sorted(debs.glob(f"{pattern}_*.deb"), key=lambda path: path.stat().st_mtime) for pattern in patterns]
    return [versions[-1] for versions in found]


def kernel_package(cache: Path) -> Path:
    """The package that the kernel of `prepare` is from."""
    return _packages(cache)[0]


def _download(cache: Path, debs: Path) -> None:
    if shutil.which("apt-get") is None:
        raise AssetsUnavailableError(f"{cache} has no packages, and without apt-get there is no way to download them")
    with tempfile.TemporaryDirectory(dir=cache, prefix="downloading-") as directory:
        target = Path(directory)
        try:
            _fetch(target)
        except AssetsUnavailableError as first:
            # The host's package lists may be absent or old.
            try:
                _fetch(target, *_own_lists(target))
            except AssetsUnavailableError as second:
                text = f"{cache} has no packages, and they cannot be downloaded: {first}; with new package lists: {second}"
                raise AssetsUnavailableError(text) from None
        for deb in target.glob("*.deb"):
            deb.rename(debs / deb.name)


def _fetch(target: Path, *options: str) -> None:
    depends = _apt("apt-cache", *options, "depends", _META_KERNEL).decode()
    kernel = re.search(r"Depends: (linux-image-\S+)", depends)
    if kernel is None:
        raise AssetsUnavailableError(f"{_META_KERNEL} depends on no kernel")
    _apt("apt-get", *options, "download", "-q", kernel[1], *_PACKAGES, cwd=target)


def _own_lists(target: Path) -> tuple[str, ...]:
    """Options for apt to use lists that are downloaded now; any user may."""
    lists, archives = target / "lists", target / "cache"
    for directory in (lists, archives):
        (directory / "partial").mkdir(parents=True)
    options = ("-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={archives}")
    _apt("apt-get", *options, "update", "-q", "-o", "APT::Update::Error-Mode=any")
    return options


def _apt(*command: str, cwd: Path | None = None) -> bytes:
    # As root, apt would download as a user of its own, who cannot write here.
    tool, *rest = command
    words = [tool, "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=2", *rest]
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, check=False, timeout=_DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise AssetsUnavailableError(f"{tool} took longer than {_DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise AssetsUnavailableError(f"{tool}: {lines[-1]}")
    return done.stdout


def _key(packages: Sequence[Path], libraries: dict[str, Path]) -> str:
    digest = hashlib.sha256()
    recipe = [Path(__file__), *sorted(GUEST.iterdir()), *sorted(OVMF_KEYS.glob("PkKek-1-snakeoil.*"))]
    for file in [*recipe, *libraries.values()]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for package in packages:
        digest.update(package.name.encode())
    return digest.hexdigest()[:16]


# ---- build ---------------------------------------------------------------------------------------------------------------


def _build(target: Path, packages: Sequence[Path], libraries: dict[str, Path]) -> None:
    with tempfile.TemporaryDirectory(prefix="vtpm-e2e-") as directory:
        root = Path(directory)
        for package in packages:
            subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)
        (kernel,) = (root / "boot").glob("vmlinuz-*")
        shutil.copyfile(kernel, target / "vmlinuz")
        (target / "initrd").write_bytes(_initrd(root, libraries))
        _uki(root, target)


def _libraries() -> dict[str, Path]:
    """tpm2-tools' binary and what it loads, by the path that each has in the guest."""
    tool = shutil.which("tpm2")
    if tool is None:
        raise AssetsUnavailableError("tpm2-tools is not installed: ./script/setup test")
    text = subprocess.run(["ldd", tool], check=True, capture_output=True, text=True).stdout
    paths = {name: Path(path) for name, path in re.findall(r"^\s(\S+) => (\S+)", text, re.M)}
    driver = "libtss2-tcti-device.so.0"
    paths[driver] = paths["libtss2-mu.so.0"].with_name(driver)
    (loader,) = re.findall(r"^\s(/lib\S*/ld-linux\S+)", text, re.M)
    found = {"bin/tpm2": Path(tool), loader.lstrip("/"): Path(loader)}
    todo = [*_needed(Path(tool)), driver]
    while todo:
        name = todo.pop()
        path = f"usr/lib/x86_64-linux-gnu/{name}"
        # What only the stubbed library needs is not needed.
        if name in (_STUBBED, Path(loader).name) or path in found:
            continue
        found[path] = paths[name].resolve()
        todo += _needed(paths[name])
    return dict(sorted(found.items()))


def _needed(binary: Path) -> list[str]:
    text = subprocess.run(["objdump", "-p", str(binary)], check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\s+NEEDED\s+(\S+)", text, re.M)


def _initrd(root: Path, libraries: dict[str, Path]) -> bytes:
    """The initramfs, the same bytes for the same files: the firmware measures it."""
    archive = Cpio()
    files = {path: (file.read_bytes(), 0o755) for path, file in libraries.items()}
    files["bin/busybox"] = (
        next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists()).read_bytes(),
        0o755,
    )
    files["init"] = ((GUEST / "init").read_bytes(), 0o755)
    files[f"usr/lib/x86_64-linux-gnu/{_STUBBED}"] = (_curl_stub(), 0o755)
    found = dict(modules(root, _MODULES))
    for name, data in found.items():
        files[f"modules/{name}.ko"] = (data, 0o644)
    files["modules/order"] = ("".join(f"{name}.ko\n" for name in found).encode(), 0o644)
    directories = {"dev", *(str(parent) for path in files for parent in Path(path).parents if parent != Path())}
    for path in sorted(directories):
        archive.add(path, stat.S_IFDIR | 0o755)
    # The kernel opens it before /init can mount anything.
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    for path, (data, mode) in sorted(files.items()):
        archive.add(path, stat.S_IFREG | mode, data)
    return gzip.compress(archive.finish(), 6, mtime=0)


def modules(root: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Modules of the kernel that was unpacked to `root`; what it has built in is left out."""
    for name in names:
        for path in root.glob(f"**/kernel/**/{name}.ko*"):
            data = path.read_bytes()
            yield name, lzma.decompress(data) if path.suffix == ".xz" else data


def _curl_stub() -> bytes:
    with tempfile.TemporaryDirectory(prefix="vtpm-e2e-") as directory:
        versions, library = Path(directory) / "versions", Path(directory) / "stub.so"
        versions.write_text("CURL_GNUTLS_3 { global: curl_*; };\n")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-s", "-w", f"-Wl,-soname,{_STUBBED}", f"-Wl,--version-script={versions}"]
        subprocess.run([*command, "-o", str(library), str(GUEST / "curl_stub.c")], check=True)
        return library.read_bytes()


class Cpio:
    """Writes a newc archive whose files belong to root and have no times."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._inode = 0

    def add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        self._pad()
        self._data += data
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._data)

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


def _uki(root: Path, target: Path) -> None:
    """Kernel, initramfs and command line in one PE behind systemd's stub, signed."""
    uki = target / "esp" / "EFI" / "BOOT" / "BOOTX64.EFI"
    uki.parent.mkdir(parents=True)
    stub = root / "usr/lib/systemd/boot/efi/linuxx64.efi.stub"
    with tempfile.TemporaryDirectory(prefix="vtpm-e2e-") as directory:
        work = Path(directory)
        (work / "cmdline").write_text(COMMAND_LINE)
        (work / "osrel").write_text(RELEASE)
        # -p keeps the stub's time stamp, so that the same input gives the same file.
        command = ["objcopy", "-p"]
        sections = (
            (".osrel", 0x20000, work / "osrel"),
            (".cmdline", 0x30000, work / "cmdline"),
            (".linux", 0x2000000, target / "vmlinuz"),
            (".initrd", 0x3000000, target / "initrd"),
        )
        for name, address, file in sections:
            command += ["--add-section", f"{name}={file}", "--change-section-vma", f"{name}={address:#x}"]
        subprocess.run([*command, str(stub), str(work / "unsigned.efi")], check=True)
        with _snakeoil_key(work) as key:
            sign = [str(root / "usr/bin/sbsign"), "--key", str(key), "--cert", str(OVMF_KEYS / "PkKek-1-snakeoil.pem")]
            subprocess.run([*sign, "--output", str(uki), str(work / "unsigned.efi")], check=True, capture_output=True)


@contextmanager
def _snakeoil_key(work: Path) -> Iterator[Path]:
    """The key that the ovmf package publishes for tests; its password is public too."""
    key = work / "key.pem"
    published = str(OVMF_KEYS / "PkKek-1-snakeoil.key")
    subprocess.run(
        ["openssl", "rsa", "-in", published, "-passin", "pass:snakeoil", "-out", str(key)], check=True, capture_output=True
    )
    yield key
    key.unlink()

"""Typed settings: flags over environment (`VTPM_…`) over a TOML file over defaults.

docs/configuration.md is made from this model.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from vtpm import files
from vtpm.errors import ConfigError

# sun_path has 108 bytes with its end mark (unix(7)); the longest socket is instances/<uuid>/tpm.sock.ctrl.
_MAX_SOCKET_PATH: Final = 107
_LONGEST_SOCKET: Final = len("/instances/") + 36 + len("/tpm.sock.ctrl")
_MAX_FILE_SIZE: Final = 1 << 20
# The last number means "any" (vsock(7)), for ports and for CIDs.
_MAX_VSOCK: Final = (1 << 32) - 2
_MAX_MSSIM_PORT: Final = 65534
# Where the login manager keeps users' runtime directories (file-hierarchy(7)).
_LOGINS: Final = Path("/run/user")


def _is_root() -> bool:
    return os.geteuid() == 0


def _home(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / fallback


def default_state_dir() -> Path:
    """Where state lives: /var/lib/vtpm for root, $XDG_STATE_HOME/vtpm otherwise."""
    return Path("/var/lib/vtpm") if _is_root() else _home("XDG_STATE_HOME", ".local/state") / "vtpm"


def default_runtime_dir() -> Path:
    """Where sockets live: /run/vtpm for root, $XDG_RUNTIME_DIR/vtpm otherwise; without that variable see Operations."""
    if _is_root():
        return Path("/run/vtpm")
    value = os.environ.get("XDG_RUNTIME_DIR", "")
    if value.startswith("/"):
        return Path(value) / "vtpm"
    # What the variable would be, where the login manager has made it. No place in /tmp: whoever comes first has a name there.
    login = _LOGINS / str(os.geteuid())
    with contextlib.suppress(OSError):
        if login.lstat().st_uid == os.geteuid():
            return login / "vtpm"
    return default_state_dir() / "run"


def default_config_file() -> Path:
    """Where the file is looked for when none is named."""
    return Path("/etc/vtpm/vtpm.toml") if _is_root() else _home("XDG_CONFIG_HOME", ".config") / "vtpm" / "vtpm.toml"


class Settings(BaseSettings):
    """Every setting of the daemon; the CLI uses the directories alone."""

    model_config = SettingsConfigDict(env_prefix="VTPM_", extra="forbid", frozen=True, validate_default=True)

    state_dir: Path = Field(default_factory=default_state_dir, description="Directory of the store and the key file; 0700.")
    runtime_dir: Path = Field(
        default_factory=default_runtime_dir, description="Directory of the sockets; 0700, or 0710 with socket_group."
    )
    store_url: str = Field(default="", description="Database of the store; default: `vtpm.db` in the state directory.")
    key_provider: str = Field(default="file", description="Key provider that wraps the data keys, by its entry point name.")
    key_provider_options: dict[str, str] = Field(
        default_factory=dict,
        description="Options of the key provider; `file` knows `path`, the key file. JSON in a flag or variable.",
    )
    default_engine: Literal["libtpms", "tpm_server"] = Field(
        default="libtpms", description="Engine of instances that are created without naming one."
    )
    tpm_server_path: str = Field(
        default="tpm_server",
        description="IBM's TPM simulator, for instances of the engine `tpm_server`; a path, or a name on PATH.",
    )
    commit_timeout_s: float = Field(
        default=60,
        gt=0,
        le=3600,
        description="How long a command that changed NV waits to become durable before its instance is FAILED.",
    )
    command_timeout_s: float = Field(
        default=30, gt=0, le=3600, description="How long a worker may take to stop when asked, before it is killed."
    )
    drain_timeout_s: float = Field(
        default=10, ge=0, le=3600, description="How long running calls may take when the daemon stops."
    )
    idle_timeout_s: float = Field(
        default=30,
        ge=0,
        le=86400,
        description="Without a command for so long an instance hibernates: it has no process until the next one; 0: never.",
    )
    max_running: int = Field(default=0, ge=0, description="How many instances may be ON at once; 0: no limit.")
    worker_memory_limit_mb: int = Field(default=256, ge=64, le=4096, description="Bound of a worker's data segment in MiB.")
    max_connections: int = Field(
        default=16,
        ge=1,
        le=32,
        description="How many connections an instance's data socket takes, besides its VM's own.",
    )
    command_rate: float = Field(
        default=0,
        ge=0,
        le=1e6,
        description="How many commands a second an instance may run for its VM; faster ones wait, and faster gRPC calls are "
        "refused. 0: no limit.",
    )
    command_burst: int = Field(
        default=1000, ge=1, le=1_000_000, description="How many commands may come at once after a pause, with `command_rate`."
    )
    max_calls: int = Field(
        default=1024,
        ge=16,
        le=1_000_000,
        description="How many gRPC calls may be under way at once in the whole daemon; guests have half of them at most.",
    )
    max_guest_calls: int = Field(
        default=32, ge=1, le=1024, description="How many gRPC calls may be under way at once on one guest socket."
    )
    max_guest_connections: int = Field(
        default=4, ge=1, le=256, description="How many connections one guest socket takes; more are closed."
    )
    max_all_guest_connections: int = Field(
        default=1024,
        ge=16,
        le=100_000,
        description="How many connections all guest sockets take together; fewer where few files may be open. When all "
        "are taken, a guest with fewer of them gets the place of a silent one of who has most.",
    )
    receive_timeout_s: float = Field(
        default=10,
        gt=0,
        le=3600,
        description="How long the request of a gRPC call may take to be there, and a guest to take the answer.",
    )
    stream_idle_timeout_s: float = Field(
        default=300, ge=0, le=86400, description="Without a message for so long a guest's stream ends; 0: never."
    )
    max_message_size_bytes: int = Field(
        default=4 << 20,
        ge=64 << 10,
        le=64 << 20,
        description="Largest gRPC message of an operator; a guest's have 1 MiB.",
    )
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto", description="How to log; `auto` writes for people on a terminal and JSON elsewhere."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least important events to log."
    )
    metrics_address: str = Field(default="", description="`host:port` of the Prometheus metrics; empty: none.")
    otel_endpoint: str = Field(
        default="", description="OTLP/gRPC endpoint for traces of gRPC calls, such as `http://127.0.0.1:4317`; empty: none."
    )
    socket_group: str = Field(default="", description="Group that may use the operators' socket besides the daemon's user.")
    mssim_ports: dict[str, int] = Field(
        default_factory=dict,
        description="TPM simulator ports (mssim protocol): instance name or id to command port; the platform port is the next "
        "one. The protocol has no authentication: whoever reaches the ports has that TPM. JSON in a flag or variable.",
    )
    mssim_address: str = Field(default="127.0.0.1", description="IP address that `mssim_ports` are on.")
    mssim_allow_remote: bool = Field(
        default=False, description="Allow an `mssim_address` that is not loopback, and with it other hosts."
    )
    anchor: Literal["none", "file", "tpm2"] = Field(
        default="none",
        description="Rollback protection: where the newest states are remembered, so that an older store is noticed. `file`: "
        "`anchor_path`; `tpm2`: the host's TPM, with a file. See docs/rollback.md.",
    )
    anchor_path: str = Field(
        default="",
        description="File of the anchor, best on another volume than the store; default with `tpm2`: `anchor` in the state "
        "directory.",
    )
    anchor_interval_s: float = Field(
        default=0,
        ge=0,
        le=86400,
        description="How old the anchor may be: a store put back to a copy younger than that is not noticed. 0: 10 with "
        "`file`, 600 with `tpm2`, as a TPM's NV wears out.",
    )
    anchor_tcti: str = Field(
        default="device:/dev/tpmrm0", description="TCTI of the host's TPM for `tpm2`, such as `device:/dev/tpmrm0`."
    )
    anchor_nv_index: int = Field(
        default=0x01800A00,
        ge=0x01000000,
        le=0x01FFFFFE,
        description="NV index of the anchor in the host's TPM for `tpm2`; the next one is used too.",
    )
    vsock_port: int = Field(
        default=0, ge=0, le=_MAX_VSOCK, description="AF_VSOCK port for the gRPC calls of VMs and paravisors; 0: none."
    )
    vsock_cids: dict[int, str] = Field(
        default_factory=dict,
        description="Whose calls on `vsock_port` go where: CID of the VM to instance name or id. JSON in a flag or variable.",
    )
    ca: Literal["auto", "manual", "none"] = Field(
        default="auto",
        description="The CA: `auto` makes one where there is none, `manual` leaves that to `vtpm ca`, `none`: no CA.",
    )
    ca_name: str = Field(default="vTPM", min_length=1, max_length=32, description="Beginning of the names of CAs made here.")
    ca_trust_domain: str = Field(
        default="vtpm.internal",
        pattern=r"^[a-z0-9._-]{1,255}$",
        description="SPIFFE trust domain of the ids in AK certificates.",
    )
    ca_ek_lifetime_days: int = Field(
        default=3650, ge=1, le=36500, description="How long EK and platform certificates are valid; never longer than their CA."
    )
    ca_ak_lifetime_hours: int = Field(default=24, ge=1, le=8760, description="How long AK certificates are valid.")
    ca_crl_lifetime_hours: int = Field(
        default=24, ge=1, le=8760, description="Time from a CRL to its nextUpdate; a new one is made after half of it."
    )
    ca_policy_oid: str = Field(
        default="",
        pattern=r"^(([01]\.([1-3]?[0-9])|2\.(0|[1-9][0-9]{0,9}))(\.(0|[1-9][0-9]{0,9})){1,30})?$",
        description="Certificate policy (OID) that certificates name; empty: none, and anyPolicy in platform certificates.",
    )
    ca_policy_uri: str = Field(
        default="", pattern=r"^(https?://[!-~]{1,200})?$", description="Where that policy can be read (CPS URI)."
    )
    ca_pkcs11_module: str = Field(default="", description="PKCS#11 library of the token with the CA's key.")
    ca_pkcs11_pin_file: str = Field(
        default="", description="File with that token's PIN; else it is taken from the variable `VTPM_CA_PKCS11_PIN`."
    )
    pki_http_address: str = Field(
        default="", description="`host:port` to serve CRLs and CA certificates on over HTTP; empty: none."
    )
    pki_base_url: str = Field(
        default="",
        pattern=r"^(http://[!-~]{1,200})?$",
        description="URL by which relying parties reach `pki_http_address`; certificates name it. Empty: they name none.",
    )

    pool_size: int = Field(
        default=4,
        ge=0,
        le=1000,
        description="How many TPMs of the default profile are kept ready, so that a creation need not make one; 0: none.",
    )
    activation_timeout_s: float = Field(
        default=120, gt=0, le=3600, description="How long a guest may take to prove an AK of its own (ActivationService)."
    )
    platform_manufacturer: str = Field(
        default="vTPM", min_length=1, max_length=256, description="What platform certificates name as the VMs' manufacturer."
    )
    platform_model: str = Field(
        default="vTPM VM", min_length=1, max_length=256, description="What they name as model, unless a creation says another."
    )
    platform_version: str = Field(default="1", min_length=1, max_length=256, description="What they name as version.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and the file come in by `load`; the environment stands between them."""
        return (init_settings, env_settings)

    @field_validator("state_dir", "runtime_dir", mode="after")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))  # noqa: PTH100  # resolve() would follow links

    @field_validator("mssim_ports", mode="after")
    @classmethod
    def _port_pairs(cls, value: dict[str, int]) -> dict[str, int]:
        owners: dict[int, str] = {}
        for ref, command_port in value.items():
            if not ref or not 1 <= command_port <= _MAX_MSSIM_PORT:
                raise ValueError(f"{ref!r}: the command port is 1 to {_MAX_MSSIM_PORT}, for an instance's name or id")
            for port in (command_port, command_port + 1):
                if port in owners:
                    raise ValueError(
                        f"{owners[port]!r} and {ref!r} both have port {port}: each has its command port and the next"
                    )
                owners[port] = ref
        return value

    @field_validator("mssim_address", mode="after")
    @classmethod
    def _ip_address(cls, value: str) -> str:
        return str(ipaddress.ip_address(value))

    @field_validator("vsock_cids", mode="after")
    @classmethod
    def _one_vm_each(cls, value: dict[int, str]) -> dict[int, str]:
        if any(not 0 <= cid <= _MAX_VSOCK for cid in value) or "" in value.values():
            raise ValueError(f"a CID is 0 to {_MAX_VSOCK}, and has an instance's name or id")
        if len(set(value.values())) < len(value):
            raise ValueError("an instance is the TPM of one VM: no two CIDs may have the same")
        return value

    @model_validator(mode="after")
    def _check(self) -> Settings:
        longest = len(os.fsencode(self.runtime_dir)) + _LONGEST_SOCKET
        if longest > _MAX_SOCKET_PATH:
            room = _MAX_SOCKET_PATH - _LONGEST_SOCKET
            raise ValueError(f"runtime_dir: the path is too long for sockets under it; at most {room} bytes, such as /run/vtpm")
        if not self.mssim_allow_remote and not ipaddress.ip_address(self.mssim_address).is_loopback:
            raise ValueError(
                f"mssim_address: {self.mssim_address} is not a loopback address, and the protocol has no authentication; "
                "to have it so all the same, set mssim_allow_remote = true"
            )
        if self.anchor == "file" and not self.anchor_path:
            raise ValueError(
                "anchor_path: the anchor needs a file, on a volume that whoever can put back the store can't: "
                "in the state directory it would be put back with it"
            )
        if self.anchor_path and not self.anchor_path.startswith("/"):
            raise ValueError("anchor_path: an absolute path, such as /srv/vtpm-anchor/anchor")
        if not self.store_url:
            object.__setattr__(self, "store_url", f"sqlite:///{self.state_dir / 'vtpm.db'}")
        return self

    @property
    def operator_socket(self) -> Path:
        """The operators' gRPC socket."""
        return self.runtime_dir / "operator.sock"

    @classmethod
    def load(cls, cli: Mapping[str, object]) -> Settings:
        """Read the settings; `cli` holds what flags gave, `config_file` among them.

        Raises:
            ConfigError: a line for each problem, with where it is and what is allowed.
        """
        named = cli.get("config_file") or os.environ.get("VTPM_CONFIG_FILE", "")
        path = Path(str(named)) if named else default_config_file()
        values = _read_file(path, required=bool(named))
        # The environment stands between file and flags, so that a file's value yields to it.
        for name in list(values):
            if f"VTPM_{name.upper()}" in os.environ:
                del values[name]
        flags = {name: _from_text(name, value) for name, value in cli.items() if name != "config_file"}
        try:
            return cls(**{**values, **flags})
        except ValidationError as error:
            raise _describe(error, path, values, flags) from None
        except ValueError as error:
            raise ConfigError("CONFIG_INVALID", str(error).splitlines()[0], subject="environment") from None


# Settings that are tables, each with an example of the JSON that a flag takes.
_TABLES: Final = {
    "key_provider_options": '{"path": "…"}',
    "mssim_ports": '{"vm-a": 2321}',
    "vsock_cids": '{"3": "vm-a"}',
}


def _from_text(name: str, value: object) -> object:
    if name in _TABLES and isinstance(value, str):
        import json

        try:
            return json.loads(value)
        except ValueError:
            raise ConfigError(
                "CONFIG_INVALID",
                "the value is no JSON object",
                subject=f"--{name.replace('_', '-')}",
                remedy=f"write {_TABLES[name]}",
            ) from None
    return value


def _read_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        text = files.read(path, _MAX_FILE_SIZE, follow=True, trusted=True, owned=True)
    except FileNotFoundError:
        if not required:
            return {}
        raise ConfigError(
            "CONFIG_FILE_MISSING",
            "the configuration file does not exist",
            subject=str(path),
            remedy="check --config-file or VTPM_CONFIG_FILE",
        ) from None
    except files.UnsafePathError as error:
        raise ConfigError(
            "CONFIG_FILE_NOT_TRUSTED",
            f"somebody else may have written the file: {error.strerror}",
            subject=str(path),
            remedy=error.remedy,
        ) from None
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise ConfigError(
                "CONFIG_FILE_INVALID", f"the file has more than {_MAX_FILE_SIZE} bytes", subject=str(path)
            ) from None
        raise ConfigError("CONFIG_FILE_UNREADABLE", f"the file can't be read: {error.strerror}", subject=str(path)) from None
    try:
        return tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError("CONFIG_FILE_INVALID", f"the file is no TOML: {error}", subject=str(path)) from None


def _describe(error: ValidationError, path: Path, values: Mapping[str, object], flags: Mapping[str, object]) -> ConfigError:
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
        if not name:
            lines.append(message)
            continue
        if name in flags:
            where = f"--{name.replace('_', '-')}"
        elif name in values:
            where = f"{path}: {name}"
        else:
            where = f"VTPM_{name.upper()}"
        lines.append(f"{where}: {message}")
    return ConfigError("CONFIG_INVALID", "\n".join(lines), remedy="every setting: docs/configuration.md; vtpm config check")

"""Settings: flags over environment over a file over defaults, and every mistake named with its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtpm.config import (
    Settings,
    default_config_file,
    default_runtime_dir,
    default_state_dir,
)
from vtpm.errors import ConfigError

NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.upper().startswith(("VTPM_", "XDG_")):
                patch.delenv(name)
        yield


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    file = tmp_path / "vtpm.toml"
    file.touch()
    return file


@pytest.fixture
def unprivileged_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the home directory of a user who is not root, and be that user."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setenv("HOME", directory)
        if os.geteuid() != 0:
            yield Path(directory)
            return
        os.chown(directory, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(directory)
        finally:
            os.seteuid(0)


def load(config_file: Path, text: str = "", **flags: object) -> Settings:
    config_file.write_text(text)
    return Settings.load({"config_file": str(config_file), **flags})


def refusal(config_file: Path, text: str = "", **flags: object) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load(config_file, text, **flags)
    return refused.value


# ---- where values come from ----------------------------------------------------------------------------------------------


def test_nothing_needs_to_be_set(config_file: Path) -> None:
    settings = load(config_file)
    assert (settings.key_provider, settings.default_engine, settings.log_level) == ("file", "libtpms", "info")
    assert settings.store_url == f"sqlite:///{settings.state_dir}/vtpm.db"
    assert settings.operator_socket == settings.runtime_dir / "operator.sock"


def test_flags_win_over_the_environment_and_that_over_the_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'log_level = "debug"\nlog_format = "json"\nmax_running = 3\n'
    monkeypatch.setenv("VTPM_LOG_FORMAT", "console")
    monkeypatch.setenv("VTPM_MAX_RUNNING", "4")
    settings = load(config_file, text, max_running=5)
    assert (settings.log_level, settings.log_format, settings.max_running) == ("debug", "console", 5)


def test_the_environment_names_the_file(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file.write_text("max_running = 7")
    monkeypatch.setenv("VTPM_CONFIG_FILE", str(config_file))
    assert Settings.load({}).max_running == 7


def test_a_file_that_a_flag_names_wins_over_one_that_the_environment_names(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VTPM_CONFIG_FILE", "/nonexistent/vtpm.toml")
    assert load(config_file, "max_running = 7").max_running == 7


def test_options_of_a_key_provider_come_as_a_table_or_as_json(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"path": "/mnt/keys.json"}
    assert load(config_file, '[key_provider_options]\npath = "/mnt/keys.json"').key_provider_options == wanted
    assert load(config_file, key_provider_options='{"path": "/mnt/keys.json"}').key_provider_options == wanted
    monkeypatch.setenv("VTPM_KEY_PROVIDER_OPTIONS", '{"path": "/mnt/keys.json"}')
    assert load(config_file).key_provider_options == wanted


def test_simulator_ports_and_vsock_cids_come_as_tables_or_as_json(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ports, cids = {"vm-a": 2321, "vm-b": 2323}, {3: "vm-a", 4: "vm-b"}
    by_file = load(config_file, "[mssim_ports]\nvm-a = 2321\nvm-b = 2323\n[vsock_cids]\n3 = 'vm-a'\n4 = 'vm-b'")
    by_flag = load(config_file, mssim_ports='{"vm-a": 2321, "vm-b": 2323}', vsock_cids='{"3": "vm-a", "4": "vm-b"}')
    monkeypatch.setenv("VTPM_MSSIM_PORTS", '{"vm-a": 2321, "vm-b": 2323}')
    monkeypatch.setenv("VTPM_VSOCK_CIDS", '{"3": "vm-a", "4": "vm-b"}')
    for loaded in (by_file, by_flag, load(config_file)):
        assert (loaded.mssim_ports, loaded.vsock_cids) == (ports, cids)


def test_nothing_listens_beyond_unix_sockets_unless_it_is_set(config_file: Path) -> None:
    settings = load(config_file)
    assert (settings.mssim_ports, settings.mssim_address, settings.mssim_allow_remote) == ({}, "127.0.0.1", False)
    assert (settings.vsock_port, settings.vsock_cids) == (0, {})


def test_a_store_that_is_named_is_used(config_file: Path) -> None:
    assert load(config_file, store_url="sqlite:////srv/vtpm.db").store_url == "sqlite:////srv/vtpm.db"


def test_paths_become_absolute_and_links_are_not_followed(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert load(config_file, state_dir=str(tmp_path / "link" / ".." / "link")).state_dir == tmp_path / "link"
    assert load(config_file, state_dir="state").state_dir == Path.cwd() / "state"
    assert load(config_file, state_dir="~/state").state_dir == Path.home() / "state"


def test_settings_do_not_change_afterwards(config_file: Path) -> None:
    with pytest.raises(pydantic.ValidationError):
        load(config_file).log_level = "debug"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has these defaults")
def test_root_keeps_things_where_system_services_do() -> None:
    assert default_state_dir() == Path("/var/lib/vtpm")
    assert default_runtime_dir() == Path("/run/vtpm")
    assert default_config_file() == Path("/etc/vtpm/vtpm.toml")


def test_a_user_keeps_things_at_home(unprivileged_home: Path) -> None:
    assert default_state_dir() == unprivileged_home / ".local/state/vtpm"
    assert default_config_file() == unprivileged_home / ".config/vtpm/vtpm.toml"
    assert default_runtime_dir() == unprivileged_home / ".local/state/vtpm/run"


@pytest.mark.usefixtures("unprivileged_home")
def test_a_user_who_names_directories_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg/state")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg/config")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert default_state_dir() == Path("/xdg/state/vtpm")
    assert default_config_file() == Path("/xdg/config/vtpm/vtpm.toml")
    assert default_runtime_dir() == Path("/run/user/7/vtpm")


def test_a_directory_that_is_not_absolute_does_not_count(unprivileged_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert default_state_dir() == unprivileged_home / ".local/state/vtpm"
    assert default_runtime_dir() == unprivileged_home / ".local/state/vtpm/run"


def test_the_file_at_home_is_read_though_nobody_names_it(unprivileged_home: Path) -> None:
    assert Settings.load({}).max_running == 0
    (unprivileged_home / ".config/vtpm").mkdir(parents=True)
    (unprivileged_home / ".config/vtpm/vtpm.toml").write_text("max_running = 9")
    assert Settings.load({}).max_running == 9


# ---- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("commit_timeout_s", "0"),
        ("commit_timeout_s", "3601"),
        ("command_timeout_s", "-1"),
        ("drain_timeout_s", "-0.1"),
        ("max_running", "-1"),
        ("max_running", "1.5"),
        ("worker_memory_limit_mb", "63"),
        ("worker_memory_limit_mb", "4097"),
        ("max_message_size_bytes", "65535"),
        ("max_message_size_bytes", "67108865"),
        ("log_format", "xml"),
        ("log_level", "INFO"),
        ("default_engine", "swtpm"),
        ("vsock_port", "-1"),
        ("vsock_port", "4294967295"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_where_it_is(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    by_flag, by_file = refusal(config_file, **{name: value}), refusal(config_file, f'{name} = "{value}"')
    monkeypatch.setenv(f"VTPM_{name.upper()}", value)
    by_environment = refusal(config_file)
    assert [refused.reason for refused in (by_flag, by_file, by_environment)] == ["CONFIG_INVALID"] * 3
    assert by_flag.message.startswith(f"--{name.replace('_', '-')}: ")
    assert by_file.message.startswith(f"{config_file}: {name}: ")
    assert by_environment.message.startswith(f"VTPM_{name.upper()}: ")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ('{"vm-a": 0}', "'vm-a'"),
        ('{"vm-a": 65535}', "65534"),
        ('{"vm-a": -1}', "'vm-a'"),
        ('{"": 2321}', "''"),
        ('{"vm-a": 2321, "vm-b": 2321}', "'vm-a' and 'vm-b' both have port 2321"),
        ('{"vm-a": 2321, "vm-b": 2322}', "'vm-a' and 'vm-b' both have port 2322"),
        ('{"vm-a": 2322, "vm-b": 2321}', "'vm-a' and 'vm-b' both have port 2322"),
        ('{"vm-a": "many"}', "integer"),
        ("2321", "dictionary"),
    ],
)
def test_simulator_ports_are_pairs_that_do_not_meet(config_file: Path, value: str, named: str) -> None:
    refused = refusal(config_file, mssim_ports=value)
    assert refused.message.startswith("--mssim-ports: ")
    assert named in refused.message


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.1", "::", "2001:db8::1"])
def test_simulator_ports_stay_on_this_host_unless_that_is_said(config_file: Path, address: str) -> None:
    refused = refusal(config_file, mssim_address=address)
    assert "mssim_address: " in refused.message
    assert "mssim_allow_remote" in refused.message
    assert load(config_file, mssim_address=address, mssim_allow_remote="true").mssim_address == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_addresses_of_simulator_ports_need_no_leave(config_file: Path, address: str) -> None:
    assert load(config_file, mssim_address=address).mssim_address == address


@pytest.mark.parametrize("address", ["localhost", "", "127.0.0.1:2321", "127.1"])
def test_what_is_no_ip_address_is_refused(config_file: Path, address: str) -> None:
    assert refusal(config_file, mssim_address=address).message.startswith("--mssim-address: ")


@pytest.mark.parametrize(
    "value", ['{"-1": "a"}', '{"4294967295": "a"}', '{"three": "a"}', '{"3": ""}', '{"3": "a", "4": "a"}', '{"3": 4}', "{"]
)
def test_each_cid_is_a_number_with_an_instance_of_its_own(config_file: Path, value: str) -> None:
    refused = refusal(config_file, vsock_cids=value)
    assert "--vsock-cids" in f"{refused.subject} {refused.message}"


def test_each_mistake_has_a_line(config_file: Path) -> None:
    refused = refusal(config_file, 'log_level = "loud"\nlog_levle = "info"', max_running=-1)
    assert len(refused.message.splitlines()) == 3
    assert f"{config_file}: log_levle: there is no such setting" in refused.message.splitlines()
    assert "docs/configuration.md" in refused.remedy


def test_a_flag_that_is_no_setting_is_named(config_file: Path) -> None:
    assert refusal(config_file, no_such="x").message == "--no-such: there is no such setting"


def test_the_runtime_directory_leaves_room_for_the_longest_socket(config_file: Path) -> None:
    longest_socket = "/instances/0198c0de-0000-7000-8000-0000000000aa/tpm.sock.ctrl"
    room = 107 - len(longest_socket)
    fitting = "/" + "r" * (room - 1)
    assert len(f"{load(config_file, runtime_dir=fitting).runtime_dir}{longest_socket}") == 107
    refused = refusal(config_file, runtime_dir=fitting + "r")
    assert "too long for sockets" in refused.message
    assert f"at most {room} bytes" in refused.message
    assert "too long" in refusal(config_file, runtime_dir="/" + "ü" * (room // 2)).message


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_a_file_that_was_named_and_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    missing = str(tmp_path / "missing.toml")
    if by == "environment":
        monkeypatch.setenv("VTPM_CONFIG_FILE", missing)
    with pytest.raises(ConfigError) as refused:
        Settings.load({"config_file": missing} if by == "flag" else {})
    assert (refused.value.reason, refused.value.subject) == ("CONFIG_FILE_MISSING", missing)


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Settings.load({"config_file": str(tmp_path)})
    assert (refused.value.reason, refused.value.subject) == ("CONFIG_FILE_UNREADABLE", str(tmp_path))


@pytest.mark.parametrize("content", [b"log_level = ", b"log_level info", b"[a]\n[a]", b"\xff\xfe\x00", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_refused(config_file: Path, content: bytes) -> None:
    config_file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        Settings.load({"config_file": str(config_file)})
    assert (refused.value.reason, refused.value.subject) == ("CONFIG_FILE_INVALID", str(config_file))


@pytest.mark.parametrize("value", ['{"pin": "hunter2', '["hunter2"]', '{"pin": ["hunter2"]}', "hunter2"])
def test_options_that_cannot_be_read_are_refused_and_not_shown(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    by_flag = refusal(config_file, key_provider_options=value)
    monkeypatch.setenv("VTPM_KEY_PROVIDER_OPTIONS", value)
    by_environment = refusal(config_file)
    for refused in (by_flag, by_environment):
        assert refused.reason == "CONFIG_INVALID"
        assert "key" in str(refused).lower()
        assert "hunter2" not in str(refused) + repr(refused)


@settings(deadline=None)
@given(text=st.text(max_size=80) | st.from_regex(r"(log_level|max_running|state_dir) = [\"0-9a-z/]{0,9}\n", fullmatch=True))
def test_any_file_gives_settings_or_a_refusal_by_name(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    try:
        Settings.load({"config_file": str(file)})
    except ConfigError as refused:
        reason = refused.reason
    else:
        reason = ""
    assert reason in {"", "CONFIG_INVALID", "CONFIG_FILE_INVALID"}


# ---- the anchor ----------------------------------------------------------------------------------------------------------


def test_an_anchor_in_a_file_needs_a_place_of_its_own() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({"anchor": "file"})
    assert "anchor_path" in str(caught.value)
    assert Settings.load({"anchor": "file", "anchor_path": "/srv/anchor"}).anchor == "file"
    with pytest.raises(ConfigError, match="absolute"):
        Settings.load({"anchor": "tpm2", "anchor_path": "anchor"})
    assert Settings.load({"anchor": "tpm2"}).anchor_path == ""


@pytest.mark.parametrize("index", [0, 0x00FFFFFF, 0x01FFFFFF, 0x81000000])
def test_an_anchor_in_a_tpm_is_two_nv_indices(index: int) -> None:
    with pytest.raises(ConfigError, match="anchor-nv-index"):
        Settings.load({"anchor": "tpm2", "anchor_nv_index": index})

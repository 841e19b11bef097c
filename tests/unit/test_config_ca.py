"""Settings of the CA and its distribution points."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from vtpm.certification import authority_options
from vtpm.config import Settings
from vtpm.errors import ConfigError


def load(tmp_path: Path, **values: object) -> Settings:
    file = tmp_path / "vtpm.toml"
    file.write_text('runtime_dir = "/run/vtpm"\n')
    return Settings.load({"config_file": file, **values})


def test_a_ca_without_any_setting(tmp_path: Path) -> None:
    options = authority_options(load(tmp_path))
    assert (options.mode, options.name, options.pkcs11_module) == ("auto", "vTPM", "")
    assert options.policy.base_url == ""
    assert options.policy.ak_lifetime == dt.timedelta(hours=24)


def test_settings_reach_the_certificates(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        ca_trust_domain="vms.example.org",
        ca_ek_lifetime_days="100",
        ca_crl_lifetime_hours="12",
        ca_policy_oid="1.3.6.1.4.1.55555.1",
        pki_base_url="http://pki.example:8080",
    )
    policy = authority_options(settings).policy
    assert (policy.trust_domain, policy.policy_oid) == ("vms.example.org", "1.3.6.1.4.1.55555.1")
    assert (policy.ek_lifetime, policy.crl_lifetime) == (dt.timedelta(days=100), dt.timedelta(hours=12))
    assert policy.base_url == "http://pki.example:8080"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ca", "yes"),
        ("ca_name", ""),
        ("ca_name", "x" * 33),
        ("ca_trust_domain", "Example.org"),
        ("ca_trust_domain", "a/b"),
        ("ca_ek_lifetime_days", "0"),
        ("ca_ak_lifetime_hours", "9000"),
        ("ca_policy_oid", "1.2.x"),
        ("ca_policy_oid", "3.1.2"),
        ("ca_policy_oid", "1.02.3"),
        ("ca_policy_oid", "1.40.3"),
        ("ca_policy_uri", "ftp://example.org/"),
        ("ca_policy_uri", "http://exa mple.org/"),
        ("pki_base_url", "https://pki.example"),
        ("pki_base_url", "http://pki.example/ä"),
    ],
)
def test_what_certificates_cannot_say_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **{name: value})
    assert name.replace("_", "-") in str(caught.value) or name in str(caught.value)

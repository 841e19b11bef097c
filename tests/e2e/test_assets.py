"""What the VMs boot is measured, so it must be the same whenever it is made of the same."""

from __future__ import annotations

from pathlib import Path

from tests.support.vmassets import Assets, cache_directory, prepare


def test_the_same_input_gives_the_same_files(assets: Assets, tmp_path: Path) -> None:
    (tmp_path / "debs").symlink_to(cache_directory() / "debs")
    again = prepare(tmp_path)
    assert again.initrd.parent.name == assets.initrd.parent.name
    for one, other in zip((assets.kernel, assets.initrd), (again.kernel, again.initrd), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_what_is_built_is_not_built_again(assets: Assets) -> None:
    before = assets.initrd.stat().st_mtime_ns
    assert prepare() == assets
    assert assets.initrd.stat().st_mtime_ns == before

"""The pins are whole: a version, an address that names it, and a digest per architecture."""

import re
from pathlib import Path

import pytest

from fusevm.host.vmm.firecracker import pins
from fusevm.host.vmm.firecracker.versions import Version, judge_versions


@pytest.mark.parametrize("table", [pins.RELEASES, pins.KERNELS])
def test_every_architecture_has_an_address_and_a_digest(table: dict[str, pins.Pin]):
    assert set(table) == {"x86_64", "aarch64"}
    for architecture, pin in table.items():
        assert re.fullmatch("[0-9a-f]{64}", pin.sha256)
        assert pin.url.startswith("https://")
        assert architecture in pin.url
    assert len({pin.sha256 for pin in table.values()}) == len(table)


def test_what_is_installed_is_what_the_driver_accepts():
    pinned = Version(*pins.VERSION)
    assert judge_versions(pinned, pinned) == ""
    for pin in pins.RELEASES.values():
        assert pin.url.count(f"v{pins.VERSION_TEXT}") == 2
    assert pins.release_folder(Path("/var/lib/fuse")) == Path("/var/lib/fuse/firecracker/1.16.1")

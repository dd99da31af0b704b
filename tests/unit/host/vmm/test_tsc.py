"""The frequency of the time stamp counter."""

import platform
import re
from pathlib import Path

import msgspec
import pytest

from fusevm.host.process import boot_id
from fusevm.host.vmm import tsc

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has the counter")


def test_frequency_is_cycles_per_millisecond():
    assert tsc.frequency_khz((1000, 0), (1000 + 2_600_000_000, 1_000_000_000)) == 2_600_000


async def test_measuring_twice_agrees_to_some_parts_in_a_million():
    first, second = await tsc.measure_tsc_khz(), await tsc.measure_tsc_khz()
    assert abs(first - second) / first < 50e-6


async def test_the_kernel_agrees_roughly():
    mhz = re.search(r"cpu MHz\s*:\s*([0-9.]+)", Path("/proc/cpuinfo").read_text())
    if mhz is None:
        pytest.skip("the kernel tells no frequency")
    assert 0.2 < await tsc.measure_tsc_khz() / (float(mhz.group(1)) * 1000) < 5


async def test_without_executable_memory_the_kernels_word_is_taken(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError

    monkeypatch.setattr(tsc.mmap, "mmap", refuse)
    assert await tsc.measure_tsc_khz() > 100_000


async def test_it_is_measured_once_per_boot_of_the_host(tmp_path):
    khz = await tsc.ensure_tsc_khz(tmp_path)
    path = tmp_path / "tsc.json"
    assert msgspec.json.decode(path.read_bytes()) == {"boot_id": boot_id(), "khz": khz}
    path.write_bytes(msgspec.json.encode({"boot_id": boot_id(), "khz": 4711}))
    assert await tsc.ensure_tsc_khz(tmp_path) == 4711
    for stale in (msgspec.json.encode({"boot_id": "another", "khz": 4711}), b"broken", b"{}"):
        path.write_bytes(stale)
        assert await tsc.ensure_tsc_khz(tmp_path) > 100_000


def test_the_counter_grows():
    counter = tsc.CycleCounter()
    values = [counter.read() for _ in range(100)]
    counter.close()
    assert values == sorted(values)
    assert values[0] < values[-1]

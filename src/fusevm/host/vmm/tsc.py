"""The frequency of this host's time stamp counter, which QEMU's software emulation shows to guests.

A guest that is told (`tsc_early_khz`) need not calibrate against emulated timers, which fails in most boots and is
never exact. Measured with the instruction itself against CLOCK_MONOTONIC_RAW, once per boot of the host. x86-64 only.
"""

import asyncio
import ctypes
import mmap
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec

from fusevm.host.process import boot_id
from fusevm.model.errors import NotSupported
from fusevm.wire.decode import UNREADABLE

#: rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
#: The clocks are read to some 50 ns at each end: over 100 ms that is one part in a million.
_SPAN_S = 0.1
_READINGS = 25
_CPU_MHZ = re.compile(r"^cpu MHz\s*:\s*([0-9.]+)", re.MULTILINE)

Reading = tuple[int, int]


class _Cached(msgspec.Struct, frozen=True, kw_only=True):
    boot_id: str
    khz: int


async def ensure_tsc_khz(cache_dir: Path | None) -> int:
    """Return the frequency in kHz, measured in 0.1 s unless a file in `cache_dir` knows it for this boot.

    Raises NotSupported on a machine without such a counter.
    """
    path = cache_dir / "tsc.json" if cache_dir is not None else None
    cached = await asyncio.to_thread(_load, path) if path is not None else None
    if cached is not None:
        return cached
    khz = await measure_tsc_khz()
    if path is not None:
        await asyncio.to_thread(_save, path, _Cached(boot_id=boot_id(), khz=khz))
    return khz


async def measure_tsc_khz(span_s: float = _SPAN_S) -> int:
    """Measure the frequency in kHz; where code cannot be run from data, take the kernel's word. Raises NotSupported."""
    try:
        counter = CycleCounter()
    except OSError:  # MemoryDenyWriteExecute and the like
        return _kernels_word()
    try:
        first = _read_both(counter)
        await asyncio.sleep(span_s)
        return frequency_khz(first, _read_both(counter))
    finally:
        counter.close()


def frequency_khz(first: Reading, last: Reading) -> int:
    """Return the frequency in kHz from two readings of (counter, nanoseconds)."""
    return round((last[0] - first[0]) * 1_000_000 / (last[1] - first[1]))


class CycleCounter:
    """The time stamp counter, read by ten bytes of machine code in executable memory. Making one raises OSError."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._page.write(_RDTSC)
        self._anchor = ctypes.c_char.from_buffer(self._page)
        prototype = ctypes.CFUNCTYPE(ctypes.c_uint64)
        self._function = cast(Callable[[], int], prototype(ctypes.addressof(self._anchor)))

    def read(self) -> int:
        """Return the counter."""
        return self._function()

    def close(self) -> None:
        """Give the memory back."""
        del self._function, self._anchor
        self._page.close()


def _read_both(cycles: CycleCounter) -> Reading:
    """Read counter and clock at the same time: of several attempts, the one with the least time around it."""
    best: tuple[int, Reading] | None = None
    for _ in range(_READINGS):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        counter = cycles.read()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if best is None or after - before < best[0]:
            best = (after - before, (counter, (before + after) // 2))
    return best[1] if best is not None else (0, 0)


def _kernels_word() -> int:
    found = _CPU_MHZ.search(Path("/proc/cpuinfo").read_text())
    if found is None:
        raise NotSupported(feature="Software emulation without a time stamp counter")
    return round(float(found.group(1)) * 1000)


def _load(path: Path) -> int | None:
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_Cached)
    except (OSError, *UNREADABLE):
        return None
    return cached.khz if cached.boot_id == boot_id() else None


def _save(path: Path, cached: _Cached) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(msgspec.json.encode(cached))
    temporary.replace(path)

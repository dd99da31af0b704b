"""Kernel and initramfs of this host for a driver, found or fetched.

A host without a kernel (no network at the first start) still serves: its machines run on, can be stopped and deleted;
creates say what is missing, and try again.

Owns: the search. Must not: boot machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from fusevm.host.config import HostConfig
from fusevm.host.images.initramfs import agent_path, ensure_initramfs
from fusevm.host.images.kernel import FOR_FIRECRACKER, Kernel, KernelStore
from fusevm.host.images.progress import ProgressEvent
from fusevm.host.vmm.firecracker.pins import KERNELS
from fusevm.model.errors import Error, KernelCorrupt

log = structlog.get_logger()


class BootFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What every machine boots from."""

    kernel: Path
    initramfs: Path
    kernel_digest: str
    kernel_version: str
    #: First digits of the agent's digest.
    agent_version: str


class BootFileFinder:
    """Finds the boot files once, and again after a failure."""

    def __init__(self, config: HostConfig, driver: Literal["qemu", "firecracker"] = "qemu") -> None:
        self._config = config
        self._driver = driver
        self._kernels = KernelStore(config.artefacts)
        self._lock = asyncio.Lock()
        self.found: BootFiles | None = None

    async def find(self) -> BootFiles:
        """Return the boot files, made or fetched if needed. Raises KernelCorrupt, VmmMissing, CommandFailed, ..."""
        async with self._lock:
            if self.found is None:
                kernel = await self._find_kernel()
                is_firecracker = self._driver == "firecracker"
                initramfs = await ensure_initramfs(self._config.artefacts, kernel, with_vsock=is_firecracker)
                self.found = BootFiles(
                    kernel=kernel.vmlinux,
                    initramfs=initramfs,
                    kernel_digest=kernel.digest,
                    kernel_version=kernel.record.version,
                    agent_version=initramfs.stem.partition("-")[0],
                )
            return self.found

    async def _find_kernel(self) -> Kernel:
        """The one of the settings; for Firecracker the one that it is tested with, if installed; else Debian's."""
        if self._driver == "firecracker" and self._config.kernel is None:
            pin = KERNELS.get(platform.machine())
            for name in (FOR_FIRECRACKER, *([pin.key] if pin is not None else [])):
                with contextlib.suppress(KernelCorrupt):
                    return await self._kernels.resolve(name)
            remedy = "`fuse host install` fetches it; until then Debian's cloud kernel serves"
            log.warning("pinned_kernel_missing", remedy=remedy)
        return await self._kernels.ensure(self._config.kernel, progress=_tell)

    async def try_find(self) -> BootFiles | None:
        """Return the boot files, or None: the log says why."""
        try:
            return await self.find()
        except (Error, OSError) as e:
            log.warning("boot_files_missing", problem=str(e), remedy="creates are refused until this is solved")
            return None


def _tell(event: ProgressEvent) -> None:
    """Fetching a kernel takes a while: say what is being done, but not every byte."""
    if event.done_bytes is None:
        log.info("boot_files_progress", step=event.step, detail=event.detail)


def has_agent() -> bool:
    """Was a guest agent built into this installation?"""
    try:
        agent_path()
    except Error:
        return False
    return True

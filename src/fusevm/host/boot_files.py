"""Kernel and initramfs of this host, found or fetched, and the driver that fits them.

A host without a kernel (no network at the first start) still serves: its machines run on, can be stopped and deleted;
creates say what is missing, and try again.

Owns: the search. Must not: boot machines, but for the driver's own probe.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import structlog

from fusevm.host.config import HostConfig
from fusevm.host.images.initramfs import agent_path, ensure_initramfs
from fusevm.host.images.kernel import KernelStore
from fusevm.host.images.progress import ProgressEvent
from fusevm.host.vmm.probe import Choice, choose_accelerator
from fusevm.model.errors import Error

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

    def __init__(self, config: HostConfig) -> None:
        self._config = config
        self._kernels = KernelStore(config.artefacts)
        self._lock = asyncio.Lock()
        self.found: BootFiles | None = None

    async def find(self) -> BootFiles:
        """Return the boot files, made or fetched if needed. Raises KernelCorrupt, VmmMissing, CommandFailed, ..."""
        async with self._lock:
            if self.found is None:
                kernel = await self._kernels.ensure(self._config.kernel, progress=_tell)
                initramfs = await ensure_initramfs(self._config.artefacts, kernel)
                self.found = BootFiles(
                    kernel=kernel.vmlinux,
                    initramfs=initramfs,
                    kernel_digest=kernel.digest,
                    kernel_version=kernel.record.version,
                    agent_version=initramfs.stem.partition("-")[0],
                )
            return self.found

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


async def choose_driver(config: HostConfig, files: BootFiles | None) -> Choice:
    """Decide how machines are run: as configured, or by trying KVM (seconds, once per boot of the host)."""
    if config.driver == "qemu":
        return Choice(accelerator="tcg", why="QEMU in software emulation, as configured")
    if files is None:
        return Choice(accelerator="tcg", why="software emulation: KVM could not be tried without a kernel")
    try:
        return await choose_accelerator(files.kernel, files.initramfs, config.data_root)
    except (Error, OSError) as e:
        # What is missing is missing for creates, too: they say so.
        log.warning("kvm_not_tried", problem=str(e))
        return Choice(accelerator="tcg", why=f"software emulation: KVM could not be tried ({e})")


def has_agent() -> bool:
    """Was a guest agent built into this installation?"""
    try:
        agent_path()
    except Error:
        return False
    return True

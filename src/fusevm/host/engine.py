"""What runs machines on this host: a driver, why this one, and what each of its VMMs takes.

`choose_engine` is the daemon's; tests give `main.serve` another one.

Owns: the choice put together. Must not: start machines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from fusevm.host.boot_files import BootFiles, choose_driver
from fusevm.host.config import HostConfig
from fusevm.host.run import run
from fusevm.host.vmm.driver import Driver
from fusevm.host.vmm.qemu import PROGRAM, QemuDriver
from fusevm.host.vmm.qemu_args import overhead_mib
from fusevm.model.errors import Error

log = structlog.get_logger()

_VERSION_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A driver with what is told about it."""

    driver: Driver
    #: For people: the driver with its accelerator, and why it is this one.
    title: str
    why: str
    #: Of the VMM program, as it says itself; empty when it cannot be asked.
    version: str
    #: Memory of a VMM beside its guest's: booked by admission, allowed by the control group.
    overhead_mib: int


ChooseEngine: TypeAlias = Callable[[HostConfig, BootFiles | None], Awaitable[Engine]]


async def choose_engine(config: HostConfig, files: BootFiles | None) -> Engine:
    """As configured, or what this host can do."""
    choice = await choose_driver(config, files)
    driver = QemuDriver(accelerator=choice.accelerator, cache_dir=config.data_root)
    return Engine(
        driver=driver,
        title=f"{driver.name} ({choice.accelerator})",
        why=choice.why,
        version=await observe_vmm_version(),
        overhead_mib=overhead_mib(choice.accelerator),
    )


async def observe_vmm_version() -> str:
    """The version that QEMU says it has; empty when it cannot be asked: the daemon serves without, too."""
    try:
        done = await run([PROGRAM, "--version"], timeout_s=_VERSION_TIMEOUT_S)
    except (Error, OSError) as e:
        log.warning("vmm_version_unknown", problem=str(e))
        return ""
    return parse_vmm_version(done.text)


def parse_vmm_version(text: str) -> str:
    """The number in what `qemu-system-x86_64 --version` prints; empty when there is none."""
    return next(iter(text.partition("version ")[2].split()), "")

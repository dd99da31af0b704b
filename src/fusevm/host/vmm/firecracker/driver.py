"""Starts and finds Firecracker processes, each in a jail of its own below the machine's directory."""

import asyncio
import os
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from fusevm.host.process import ProcessHandle, root_of
from fusevm.host.run import run
from fusevm.host.vmm.driver import JAIL, BootPlan, Confinement
from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.calls import MAX_BOOT_ARGS, plan_boot, render_boot_args
from fusevm.host.vmm.firecracker.jail import Inside, Jail, JailOrder, find_jail, render_jailer
from fusevm.host.vmm.firecracker.overwatch import PATIENCE, Patience
from fusevm.host.vmm.firecracker.versions import judge_versions, parse_version
from fusevm.host.vmm.firecracker.vmm import Count, FirecrackerVmm, pipe_of
from fusevm.host.vmm.launch import Launch, find_program, open_output, start_in_thread
from fusevm.model.errors import BootFailed, VmmUnsuitable
from fusevm.model.machine import VmmProcess

FIRECRACKER, JAILER = "firecracker", "jailer"
REMEDY: Final = "install the pinned release with `fuse host install`"
_VERSION_S: Final = 10
_INSIDE: Final = Inside()


class Programs(NamedTuple):
    """The two programs, links resolved: the jail is named after them, and they are what is running."""

    firecracker: Path
    jailer: Path


class FirecrackerDriver:
    """Starts and finds Firecracker processes."""

    name = "firecracker"

    def __init__(
        self,
        *,
        firecracker: str = FIRECRACKER,
        jailer: str = JAILER,
        count: Count = lambda _added: None,
        patience: Patience = PATIENCE,
    ) -> None:
        self._names = (firecracker, jailer)
        self._count = count
        self._patience = patience
        #: The programs that were found good, by what tells one file from another.
        self._judged: tuple[tuple[int, int, int], ...] = ()

    async def find_programs(self) -> Programs:
        """Return the programs that this driver is for. Raises VmmMissing, VmmUnsuitable."""
        programs, key = await asyncio.to_thread(_look_up, self._names)
        if key != self._judged:
            said = [(await run([program, "--version"], timeout_s=_VERSION_S)).text for program in programs]
            problem = judge_versions(*map(parse_version, said))
            if problem:
                raise VmmUnsuitable(program=str(programs.firecracker), problem=problem)
            self._judged = key
        return programs

    async def boot(self, plan: BootPlan) -> FirecrackerVmm:
        """Start the jailer and configure the machine; returns when the guest runs, before it is up.

        Raises VmmMissing, VmmUnsuitable, BootFailed, BadSetting; nothing but the console log is left then.
        """
        programs = await self.find_programs()
        check_plan(plan)
        jail = Jail(base=_base_of(plan), machine_id=plan.machine_id, program=programs.firecracker.name)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(asyncio.to_thread, staging.remove, jail.base)
            await asyncio.to_thread(staging.stage, plan, jail, _INSIDE)
            with ExitStack() as passed:  # what is Firecracker's alone once it runs
                output = open_output(pipe_of(plan))
                passed.callback(os.close, output)
                undo.callback(pipe_of(plan).unlink, missing_ok=True)
                # The jailer gives up root and enters a namespace by itself; cgroups, and a namespace that has no name,
                # it joins as whoever it was started by.
                launch = Launch(
                    argv=render_jailer(_order(plan, programs), jail, _INSIDE),
                    pass_fds=(),
                    output_fd=output,
                    is_cut_off=plan.is_cut_off,
                    confinement=Confinement(cgroups=plan.confinement.cgroups),
                )
                vmm = self._hold(plan, jail, ProcessHandle.of_child(await start_in_thread(launch)))
                undo.push_async_callback(_discard, vmm)
                try:
                    vmm.listen()
                except OSError as e:
                    raise BootFailed(id=plan.machine_id, problem=f"its pipes cannot be read: {e}") from e
            await vmm.carry_out(plan_boot(plan, _INSIDE))
            vmm.oversee()
            undo.pop_all()
            return vmm

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> FirecrackerVmm | None:
        """Take over a Firecracker of an earlier daemon; None when exactly that process no longer runs this machine.

        OSError when it may not be looked at: it may well run.
        """
        handle = ProcessHandle.find(process)
        if handle is None:
            return None
        with ExitStack() as undo:
            undo.callback(handle.close)
            jail = await asyncio.to_thread(find_jail, _base_of(plan), plan.machine_id)
            if jail is None or not await asyncio.to_thread(_is_inside, process.pid, jail):
                return None
            undo.pop_all()
        vmm = self._hold(plan, jail, handle)
        vmm.reattach()
        return vmm

    def _hold(self, plan: BootPlan, jail: Jail, handle: ProcessHandle) -> FirecrackerVmm:
        return FirecrackerVmm(plan, jail, _INSIDE, handle, count=self._count, patience=self._patience)


def _look_up(names: tuple[str, str]) -> tuple[Programs, tuple[tuple[int, int, int], ...]]:
    """Find the programs, and what tells these files from later ones of the same names. Raises VmmMissing."""
    programs = Programs(*(Path(find_program(name, REMEDY)).resolve() for name in names))
    return programs, tuple((found.st_dev, found.st_ino, found.st_mtime_ns) for found in map(os.stat, programs))


def check_plan(plan: BootPlan) -> None:
    """Raise BootFailed for a machine that Firecracker cannot have."""
    problem = ""
    if len(os.fsencode(render_boot_args(plan))) > MAX_BOOT_ARGS:
        problem = f"its kernel command line is longer than {MAX_BOOT_ARGS} bytes"
    elif plan.overlay is not None and plan.overlay_format != "raw":
        problem = f"its disk is {plan.overlay_format}, and Firecracker reads only raw; it was made for another driver"
    elif plan.nic is not None and not plan.nic.tap:
        problem = "its network is no tap, and Firecracker has no other"
    if problem:
        raise BootFailed(id=plan.machine_id, problem=problem)


def _is_inside(pid: int, jail: Jail) -> bool:
    """Is the jail this process's root directory? Its own command line might say anything."""
    try:
        root = jail.root.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    return root_of(pid) == (root.st_dev, root.st_ino)


def _base_of(plan: BootPlan) -> Path:
    return plan.console_log.parent / JAIL


def _order(plan: BootPlan, programs: Programs) -> JailOrder:
    fence = plan.confinement
    return JailOrder(
        jailer=programs.jailer,
        firecracker=programs.firecracker,
        uid=fence.uid if fence.uid is not None else os.getuid(),
        gid=fence.gid if fence.gid is not None else os.getgid(),
        netns=plan.nic.netns if plan.nic is not None else None,
        max_file_bytes=plan.overlay.stat().st_size if plan.overlay is not None else 1 << 30,
    )


async def _discard(vmm: FirecrackerVmm) -> None:
    await vmm.kill()
    await vmm.close()

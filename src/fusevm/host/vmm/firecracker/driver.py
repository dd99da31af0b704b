"""Starts and finds Firecracker processes, each in a jail of its own below the machine's directory."""

import asyncio
import os
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final

from fusevm.host.process import ProcessHandle, command_line_of
from fusevm.host.run import run
from fusevm.host.vmm.driver import BootPlan, Confinement
from fusevm.host.vmm.firecracker import staging
from fusevm.host.vmm.firecracker.calls import MAX_BOOT_ARGS, plan_boot, render_boot_args
from fusevm.host.vmm.firecracker.jail import Inside, Jail, JailOrder, render_jailer
from fusevm.host.vmm.firecracker.versions import judge_version, parse_version
from fusevm.host.vmm.firecracker.vmm import FirecrackerVmm, pipe_of
from fusevm.host.vmm.launch import Launch, find_program, open_output, start_in_thread
from fusevm.model.errors import BootFailed, VmmMissing
from fusevm.model.machine import VmmProcess

FIRECRACKER, JAILER = "firecracker", "jailer"
REMEDY: Final = "install the pinned release with `fuse host install`"
#: The jail of a machine, in its directory.
JAIL: Final = "jail"
_VERSION_S: Final = 10
_INSIDE: Final = Inside()


class FirecrackerDriver:
    """Starts and finds Firecracker processes."""

    name = "firecracker"

    def __init__(self, *, firecracker: str = FIRECRACKER, jailer: str = JAILER) -> None:
        self._firecracker = firecracker
        self._jailer = jailer
        self._judged: set[str] = set()

    async def boot(self, plan: BootPlan) -> FirecrackerVmm:
        """Start the jailer and configure the machine; returns when the guest runs, before it is up.

        Raises VmmMissing, BootFailed, BadSetting; nothing but the console log is left then.
        """
        firecracker, jailer = (find_program(name, REMEDY) for name in (self._firecracker, self._jailer))
        for program in (firecracker, jailer):
            await self._check_version(program)
        if len(os.fsencode(render_boot_args(plan))) > MAX_BOOT_ARGS:
            raise BootFailed(
                id=plan.machine_id, problem=f"its kernel command line is longer than {MAX_BOOT_ARGS} bytes"
            )
        jail = _jail_of(plan)
        async with AsyncExitStack() as undo:
            undo.push_async_callback(asyncio.to_thread, staging.remove, jail)
            await asyncio.to_thread(staging.stage, plan, jail, _INSIDE)
            with ExitStack() as passed:  # what is Firecracker's alone once it runs
                output = open_output(pipe_of(plan))
                passed.callback(os.close, output)
                order = _order(plan, Path(jailer), Path(firecracker))
                # The jailer gives up root by itself; it joins the cgroups as whoever it was started by.
                inherited = Confinement(cgroups=plan.confinement.cgroups)
                launch = Launch(
                    argv=render_jailer(order, jail, _INSIDE), pass_fds=(), output_fd=output, confinement=inherited
                )
                vmm = FirecrackerVmm(plan, jail, _INSIDE, ProcessHandle.of_child(await start_in_thread(launch)))
                undo.push_async_callback(_discard, vmm)
                vmm.listen()
            await vmm.carry_out(plan_boot(plan, _INSIDE))
            undo.pop_all()
            return vmm

    async def adopt(self, plan: BootPlan, process: VmmProcess) -> FirecrackerVmm | None:
        """Take over a Firecracker of an earlier daemon; None when exactly that process no longer runs this machine."""
        handle = ProcessHandle.find(process)
        if handle is None:
            return None
        if plan.machine_id not in command_line_of(process.pid):
            handle.close()
            return None
        vmm = FirecrackerVmm(plan, _jail_of(plan), _INSIDE, handle)
        vmm.reattach()
        return vmm

    async def _check_version(self, program: str) -> None:
        if program in self._judged:
            return
        found = await run([program, "--version"], timeout_s=_VERSION_S)
        problem = judge_version(parse_version(found.stdout.decode(errors="replace")))
        if problem:
            raise VmmMissing(program=program, remedy=problem)
        self._judged.add(program)


def _jail_of(plan: BootPlan) -> Jail:
    return Jail(base=plan.console_log.parent / JAIL, machine_id=plan.machine_id)


def _order(plan: BootPlan, jailer: Path, firecracker: Path) -> JailOrder:
    fence = plan.confinement
    return JailOrder(
        jailer=jailer,
        firecracker=firecracker,
        uid=fence.uid if fence.uid is not None else os.getuid(),
        gid=fence.gid if fence.gid is not None else os.getgid(),
        netns=plan.nic.netns if plan.nic is not None else None,
        max_file_bytes=plan.overlay.stat().st_size if plan.overlay is not None else 1 << 30,
    )


async def _discard(vmm: FirecrackerVmm) -> None:
    await vmm.kill()
    await vmm.close()

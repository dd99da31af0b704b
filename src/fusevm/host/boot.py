"""Bringing a machine up: quarters, VMM, agent; each step marked in the journal, each undoable.

Owns: the order of the steps and what a boot that fails tells people. Must not: decide what becomes of the record.
"""

from __future__ import annotations

import asyncio
import base64
from typing import Literal, TypeAlias

import msgspec

from fusevm.host.agent import ask_health, converse, is_compatible
from fusevm.host.surroundings import Surroundings
from fusevm.host.tasks import CleanUp, Stopped, run_unless
from fusevm.host.vmm.driver import Vmm
from fusevm.model.errors import BootFailed, Error
from fusevm.model.machine import Machine
from fusevm.wire.guest import AgentHealth, Configure, LoginKeys

#: What a boot is part of; only a create makes the disk.
BootKind: TypeAlias = Literal["create", "start", "restore", "visit"]

_ENTROPY_BYTES = 64
#: The agent's channel broke: how long to wait for the VMM's own word about why.
_LAST_WORD_S = 2.0


class Marks(msgspec.Struct, kw_only=True):
    """Moments of a boot on the monotonic clock, in milliseconds."""

    started: float
    launched: float = 0.0
    #: The VMM runs; the guest may have begun before.
    spawned: float = 0.0
    first_byte: float = 0.0
    configured: float = 0.0


async def bring_up(
    machine: Machine, kind: BootKind, deadline_ms: int, parts: Surroundings, undo: CleanUp
) -> tuple[Machine, Vmm]:
    """Make quarters, start the VMM and configure the agent. What exists at any moment is on `undo`.

    Raises BootFailed, Superseded, or what quarters and driver raise.
    """
    marks = Marks(started=parts.clock.monotonic_ms())
    try:
        async with asyncio.timeout(_seconds_left(deadline_ms, parts)) as limit:
            machine, vmm, configure = await _launch(machine, kind, parts, undo, marks)
    except TimeoutError as e:
        if not limit.expired():
            raise
        raise BootFailed(id=machine.id, problem="its VMM did not start in time") from e
    machine = await parts.journal.mark(msgspec.structs.replace(machine, vmm=vmm.process), kind, "booted")
    await meet_guest(machine, kind, vmm, configure, deadline_ms, parts, marks)
    parts.metrics.note_phases(
        {
            "prepare": (marks.launched - marks.started) / 1000,
            "boot": (marks.first_byte - marks.spawned) / 1000,
            "agent": (marks.configured - marks.first_byte) / 1000,
        }
    )
    return with_timings(machine, marks), vmm


async def _launch(
    machine: Machine, kind: BootKind, parts: Surroundings, undo: CleanUp, marks: Marks
) -> tuple[Machine, Vmm, Configure]:
    """Make quarters and start the VMM."""
    lodging = await parts.quarters.prepare(machine, is_visit=kind == "visit")
    undo.push("quarters", lambda: parts.quarters.vacate(machine, keep_disk=kind != "create"))
    try:
        prepared = msgspec.structs.replace(machine, address=lodging.address, driver=parts.driver.name)
        prepared = await parts.journal.mark(prepared, kind, "prepared")
        marks.launched = parts.clock.monotonic_ms()
        vmm = await parts.driver.boot(lodging.plan)
        marks.spawned = parts.clock.monotonic_ms()
    finally:
        lodging.release()
    undo.push("vmm", vmm.kill)
    parts.metrics.note_phases({**lodging.seconds, "spawn": (marks.spawned - marks.launched) / 1000})
    return prepared, vmm, lodging.configure


async def meet_guest(
    machine: Machine,
    kind: str,
    vmm: Vmm,
    configure: Configure,
    deadline_ms: int,
    parts: Surroundings,
    marks: Marks,
) -> None:
    """Wait for the agent of a VMM that boots, check that it is the right one, configure it. Raises BootFailed."""
    limit_s = _seconds_left(deadline_ms, parts)
    try:
        async with asyncio.timeout(limit_s):
            await run_unless(vmm.wait_exit(), _converse(machine, kind, vmm, configure, parts, marks))
    except TimeoutError:
        raise await _failed(machine, f"the guest agent did not answer within {limit_s:.0f} s", parts) from None
    except Stopped as e:
        raise await _failed(machine, e.value, parts) from e
    except ConnectionError as e:
        raise await _failed(machine, await _last_word(vmm, e), parts) from e
    except BootFailed:
        raise
    except Error as e:
        raise await _failed(machine, f"the guest agent said: {e.message}", parts) from e


def _seconds_left(deadline_ms: int, parts: Surroundings) -> float:
    """At least one: a resumed boot whose time is over gets a last chance."""
    return max(1.0, (deadline_ms - parts.clock.now_ms()) / 1000)


async def check_guest(machine: Machine, vmm: Vmm) -> str:
    """Ask a running VMM's agent who it is; return what is wrong with the answer, or "". Raises ConnectionError."""
    return judge_guest(machine, await ask_health(vmm), expects_login=True)


def judge_guest(machine: Machine, health: AgentHealth, *, expects_login: bool) -> str:
    """What is wrong with the agent that answers, or ""."""
    if health.nonce != machine.nonce:
        return "another guest answers on its channel"
    if not is_compatible(health.protocol):
        return f"its agent speaks protocol {health.protocol!r}, which this daemon does not"
    if machine.contract is None or not expects_login:
        return ""
    if health.login is None:
        return "its agent lets nobody log in: it is older than this daemon"
    # What the guest has on its disk is what clients of SSH will see.
    if health.login.host_public_key != machine.contract.login.host_public_key:
        return "another SSH host key than the one that was made for it is on its disk"
    return ""


def render_login(machine: Machine) -> LoginKeys | None:
    """What the agent must know for people to log in; None for a machine without."""
    if machine.contract is None:
        return None
    login = machine.contract.login
    return LoginKeys(
        host_key=login.host_key,
        host_public_key=login.host_public_key,
        authorized_keys=login.authorized_keys,
        trusted_user_ca_keys=login.trusted_user_ca_keys,
    )


def with_timings(machine: Machine, marks: Marks) -> Machine:
    """Note how long the phases took; a boot that an earlier daemon began has no times of its own."""
    if not marks.launched:
        return machine
    timings = msgspec.structs.replace(
        machine.timings,
        prepare_ms=round(marks.launched - marks.started, 3),
        boot_ms=round(marks.first_byte - marks.launched, 3),
        agent_ms=round(marks.configured - marks.first_byte, 3),
        host_ms=round(marks.configured - marks.started, 3),
    )
    return msgspec.structs.replace(machine, timings=timings)


async def _converse(
    machine: Machine, kind: str, vmm: Vmm, configure: Configure, parts: Surroundings, marks: Marks
) -> None:
    # The stream opens when the guest has said its first word on the channel.
    async with converse(vmm) as talk:
        marks.first_byte = parts.clock.monotonic_ms()
        entropy = base64.b64encode(parts.clock.entropy(_ENTROPY_BYTES)).decode()
        # Whoever only visits a disk lets nobody in.
        login = render_login(machine) if kind != "visit" else None
        configure = msgspec.structs.replace(configure, generation=machine.generation, entropy_b64=entropy, login=login)
        # One exchange, because a cold agent takes tens of milliseconds for each: the channel is a socket that we made
        # for this VMM alone, and the nonce in the answer is the second proof.
        health = await talk.configure(msgspec.structs.replace(configure, time_unix_ns=parts.clock.now_ns()))
        problem = judge_guest(machine, health, expects_login=login is not None)
        if problem:
            raise await _failed(machine, problem, parts)
        parts.fault.reached(f"{kind}.answered")
    marks.configured = parts.clock.monotonic_ms()


async def _last_word(vmm: Vmm, error: ConnectionError) -> str:
    try:
        async with asyncio.timeout(_LAST_WORD_S):
            return await vmm.wait_exit()
    except (TimeoutError, ConnectionError):
        return f"its channel broke ({error})"


async def _failed(machine: Machine, problem: str, parts: Surroundings) -> BootFailed:
    tail = (await parts.quarters.remains(machine.id)).console_tail
    said = f"; the console's last lines:\n{tail}" if tail else "; the console is empty"
    return BootFailed(id=machine.id, problem=problem + said)

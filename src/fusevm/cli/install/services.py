"""systemd, and whether what it runs answers."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fusevm.cli.failures import UNAVAILABLE, CliError
from fusevm.cli.install.answers import is_serving
from fusevm.cli.install.plan import CONTROL_UNIT, HOST_UNIT
from fusevm.cli.local_host import is_healthy
from fusevm.host.run import run

#: The host daemon probes its driver at the first start, and takes its machines over at others.
HOST_READY_S: Final = 180.0
CONTROL_READY_S: Final = 60.0
#: More than any unit's TimeoutStopSec.
_SYSTEMCTL_S: Final = 120.0
_POLL_S: Final = 0.2


class Services:
    """systemctl, with what a service has said when it does not start."""

    async def reload(self) -> None:
        """Read unit files again."""
        await _systemctl("daemon-reload")

    async def enable(self, unit: str) -> None:
        """Start it with the machine."""
        await _systemctl("enable", unit)

    async def restart(self, unit: str) -> None:
        """Start it anew."""
        await _systemctl("reset-failed", unit, check=False)
        await _systemctl("restart", unit)

    async def stop(self, unit: str) -> None:
        """Stop it, and do not start it with the machine. One that is not there is stopped."""
        await _systemctl("stop", unit, check=False)
        await _systemctl("disable", unit, check=False)
        if await _state(unit) == "active":
            raise CliError(f"{unit} does not stop", hint=f"journalctl -u {unit}")

    async def wait_for_host(self, socket: Path) -> None:
        """Return when the host daemon answers on its socket. Raises CliError with the end of its log."""
        await _wait(HOST_UNIT, lambda: is_healthy(socket), HOST_READY_S)

    async def wait_for_control(self, url: str) -> None:
        """Return when the control plane answers. Raises CliError with the end of its log."""
        await _wait(CONTROL_UNIT, lambda: is_serving(url), CONTROL_READY_S)


async def _wait(unit: str, is_ready: Callable[[], bool], limit_s: float) -> None:
    ends_at = time.monotonic() + limit_s
    while not await asyncio.to_thread(is_ready):
        state = await _state(unit)
        if state in ("failed", "inactive") or time.monotonic() > ends_at:
            problem = f"{unit} is {state}" if state in ("failed", "inactive") else f"{unit} does not answer"
            raise CliError(f"{problem}; it said:\n{await _last_words(unit)}", code=UNAVAILABLE)
        await asyncio.sleep(_POLL_S)


async def _state(unit: str) -> str:
    done = await _systemctl("show", "--property=ActiveState", "--value", unit)
    return done.strip()


async def _last_words(unit: str) -> str:
    command = ["journalctl", "--no-pager", "-q", "-o", "cat", "-n", "15", "-u", unit]
    done = await run(command, timeout_s=_SYSTEMCTL_S, check=False)
    return done.text.strip() or "(nothing)"


async def _systemctl(*words: str, check: bool = True) -> str:
    done = await run(["systemctl", "--no-ask-password", "--quiet", *words], timeout_s=_SYSTEMCTL_S, check=check)
    return done.text

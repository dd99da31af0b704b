"""systemd, and whether what it runs answers."""

import asyncio
import time
from collections.abc import Callable, Mapping
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
#: systemd starts a service again that ends (Restart=on-failure): one that does so as often will not come up by waiting.
_HOPELESS_RESTARTS: Final = 3


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
        await _systemctl("reset-failed", unit, check=False)
        if (await _show(unit)).get("ActiveState") == "active":
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
        problem = _find_problem(await _show(unit))
        if problem is None and time.monotonic() > ends_at:
            problem = "does not answer"
        if problem is not None:
            raise CliError(f"{unit} {problem}; it said:\n{await _last_words(unit)}", code=UNAVAILABLE)
        await asyncio.sleep(_POLL_S)


def _find_problem(shown: Mapping[str, str]) -> str | None:
    """Why it is no use to wait for a service; None: it may come."""
    state, restarts = shown.get("ActiveState", ""), int(shown.get("NRestarts") or 0)
    if state in ("failed", "inactive"):
        return f"is {state}"
    return f"has ended {restarts} times" if restarts >= _HOPELESS_RESTARTS else None


async def _show(unit: str) -> dict[str, str]:
    done = await _systemctl("show", "--property=ActiveState,NRestarts", unit)
    return dict(line.split("=", 1) for line in done.splitlines() if "=" in line)


async def _last_words(unit: str) -> str:
    command = ["journalctl", "--no-pager", "-q", "-o", "cat", "-n", "15", "-u", unit]
    done = await run(command, timeout_s=_SYSTEMCTL_S, check=False)
    return done.text.strip() or "(nothing)"


async def _systemctl(*words: str, check: bool = True) -> str:
    done = await run(["systemctl", "--no-ask-password", "--quiet", *words], timeout_s=_SYSTEMCTL_S, check=check)
    return done.text

"""The host daemon with everything that is real but its VMM: `python -m fusevm.testing.agent_daemon`, options as of
`python -m fusevm.host`.

While the file `<data root>/fault` names a kill point, the daemon dies when it reaches that one: a test arms it when it
likes, and the next run finds it gone. Points that `host.faults` does not know are written to
`<data root>/unknown-points`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fusevm.host.__main__ import make_config, make_parser
from fusevm.host.boot_files import BootFileFinder
from fusevm.host.config import HostConfig
from fusevm.host.engine import Engine
from fusevm.host.faults import is_known
from fusevm.host.main import serve
from fusevm.host.vmm.firecracker.vmm import Count
from fusevm.model.errors import Error
from fusevm.testing.agent_driver import OVERHEAD_MIB, AgentDriver
from fusevm.wire.exit_status import exit_status

FAULT, UNKNOWN = "fault", "unknown-points"


class ArmedByFile:
    """Dies where the file says."""

    def __init__(self, data_root: Path) -> None:
        self._armed = data_root / FAULT
        self._unknown = data_root / UNKNOWN

    def reached(self, point: str) -> None:
        """Called from the event loop and from the journal's thread."""
        if not is_known(point):
            with self._unknown.open("a") as file:
                file.write(f"{point}\n")
        try:
            is_armed = self._armed.read_text() == point
        except FileNotFoundError:
            return
        if is_armed:
            self._armed.unlink()
            os.kill(os.getpid(), signal.SIGKILL)


async def choose_agent(config: HostConfig, _count: Count) -> Engine:
    """Nothing to choose from."""
    boot_files = BootFileFinder(config)
    await boot_files.try_find()
    return Engine(
        driver=AgentDriver(),
        title="agent",
        why="for tests",
        version="0",
        overhead_mib=OVERHEAD_MIB,
        boot_files=boot_files,
    )


def main() -> int:
    """Serve; the exit status."""
    config = make_config(make_parser().parse_args())
    try:
        return serve(config, choose_agent, ArmedByFile(config.data_root))
    except Error as error:
        sys.stderr.write(f"agent daemon: {error.message}\n")
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())

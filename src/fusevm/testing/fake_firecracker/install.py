"""Write the two programs into a folder: scripts of this interpreter."""

import shutil
import sys
from pathlib import Path
from typing import Literal

import msgspec

_SCRIPT = """#!{python} -B
import sys
sys.path[:] = {search!r}
from pathlib import Path
from fusevm.testing.fake_firecracker.process import Setup, parse, serve
from fusevm.testing.fake_firecracker.jailer import main
setup = Setup(guests={guests!r}, agent=Path({agent!r}))
sys.exit({call})
"""


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """Where they are."""

    firecracker: Path
    jailer: Path


def install(folder: Path, agent: Path, *, guests: Literal["qemu", "process"]) -> Programs:
    """Write them; `folder` must be one that every user may enter. `agent` is copied beside them."""
    own_agent = folder / "fused"
    shutil.copyfile(agent, own_agent)
    own_agent.chmod(0o755)
    calls = {"firecracker": 'serve(parse(sys.argv[1:]), Path("/"), setup)', "jailer": "main(sys.argv[1:], setup)"}
    for name, call in calls.items():
        text = _SCRIPT.format(python=sys.executable, search=sys.path, guests=guests, agent=str(own_agent), call=call)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return Programs(firecracker=folder / "firecracker", jailer=folder / "jailer")

"""Write the two programs into a folder: scripts of this interpreter."""

import shutil
import sys
from pathlib import Path
from typing import Final, Literal

import msgspec

from fusevm.testing.fake_firecracker.rules import VERSION

_HEAD = """#!{python} -B
import sys
if sys.argv[1:] == ["--version"]:
    print({version!r})
    sys.exit()
sys.path[:] = {search!r}
from pathlib import Path
"""
_FIRECRACKER = """
from fusevm.testing.fake_firecracker.process import Setup, main
sys.exit(main(sys.argv[1:], Setup(guests={guests!r}, agent=Path({agent!r}))))
"""
_JAILER = """
from fusevm.testing.fake_firecracker.jailer import main
sys.exit(main(sys.argv[1:], tuple(map(Path, {visible!r}))))
"""
#: What interpreter and QEMU need to find in the jail, where the real program, a static one, needs nothing.
_SYSTEM: Final = ("/usr", "/bin", "/lib", "/lib64", "/etc", "/proc")


class Programs(msgspec.Struct, frozen=True, kw_only=True):
    """Where they are."""

    firecracker: Path
    jailer: Path


def install(
    folder: Path,
    agent: Path,
    *,
    guests: Literal["qemu", "process"],
    name: str = "firecracker",
    version: str = VERSION,
    jailer_version: str = VERSION,
) -> Programs:
    """Write them; `folder` must be one that every user may enter. `agent` is copied beside them."""
    own_agent = folder / "fused"
    shutil.copyfile(agent, own_agent)
    own_agent.chmod(0o755)
    search = [path for path in sys.path if path]
    facts = {"python": sys.executable, "search": search, "guests": guests, "agent": str(own_agent)}
    visible = [str(path) for path in find_visible(folder, search)]
    for file, text, said in (
        (name, _FIRECRACKER, f"Firecracker v{version}"),
        ("jailer", _JAILER, f"Jailer v{jailer_version}"),
    ):
        (folder / file).write_text((_HEAD + text).format(version=said, visible=visible, **facts))
        (folder / file).chmod(0o755)
    return Programs(firecracker=folder / name, jailer=folder / "jailer")


def find_visible(folder: Path, search: list[str]) -> list[Path]:
    """Directories that the programs read, each but once."""
    wanted = [Path(path) for path in (*_SYSTEM, sys.prefix, sys.base_prefix, *search, str(folder))]
    existing = list(dict.fromkeys(path.absolute() for path in wanted if path.is_dir()))
    return [path for path in existing if not any(path.is_relative_to(other) for other in existing if other != path)]

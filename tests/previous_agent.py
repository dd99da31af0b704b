"""The last release state, from the history of this repository, for tests of version skew: its guest agent, its daemon.

The binary lies in the user's cache (outside of the tree, by commit), so that it is compiled once. A clone without the
commit (a shallow one, an unpacked archive) cannot build it: `NotAvailable` says why, and tests skip with that.
"""

import fcntl
import importlib.util
import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
#: Protocol 1.0: without setup, daemon, health check, state and keys.
COMMIT = "8e8c42aa5124c34aafd04bf57dc58bbe783ba31f"
PROTOCOL = "1.0"


class NotAvailable(Exception):
    """The agent cannot be built here; the text says why."""


def previous_agent(architecture: str = "amd64", *, commit: str = COMMIT, cache: Path | None = None) -> Path:
    """Return the binary of the agent at a commit, built if it is not there. Raises NotAvailable."""
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuse" / "agents"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"fused-{commit[:12]}-{architecture}"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _build(commit, architecture, target)
    return target


def previous_daemon(folder: Path, *, commit: str = COMMIT) -> Path:
    """Unpack the Python source of a commit; the path for `PYTHONPATH`. Raises NotAvailable."""
    with tarfile.open(fileobj=io.BytesIO(_sources(commit, "src"))) as archive:
        archive.extractall(folder)
    return folder / "src"


def _build(commit: str, architecture: str, target: Path) -> None:
    hook = _load_build_hook()
    try:
        go = hook.find_compiler()
    except FileNotFoundError as e:
        raise NotAvailable(str(e)) from e
    sources = _sources(commit, "guest")
    with tempfile.TemporaryDirectory(prefix="fuse-previous-") as name:
        with tarfile.open(fileobj=io.BytesIO(sources)) as archive:
            archive.extractall(name)
        hook.compile_agent(go, Path(name) / "guest", "./cmd/fused", target, architecture, f"0.0.0+{commit[:12]}")


def _sources(commit: str, folder: str) -> bytes:
    """A folder of a commit, as a tar."""
    argv = ["git", "-C", str(ROOT), "archive", "--format=tar", commit, folder]
    try:
        done = subprocess.run(argv, capture_output=True, check=False)
    except FileNotFoundError as e:
        raise NotAvailable("git is not installed: the release before cannot be had") from e
    if done.returncode:
        problem = done.stderr.decode(errors="replace").strip()
        raise NotAvailable(f"commit {commit[:12]} is not in this clone, fetch the whole history ({problem})")
    return done.stdout


def _load_build_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

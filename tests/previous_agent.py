"""The last release state, from the history of this repository, for tests of version skew: its guest agent, its daemon.

The binary lies in the user's cache (outside of the tree, by commit), so that it is compiled once. A shallow clone and
an unpacked archive lack the commit: `NotAvailable` says why, and tests skip with that. A whole clone must have it.
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
    """The release cannot be had here; the text says why."""


class CommitMissing(Exception):
    """A clone with its whole history lacks the commit: a failure of the test that asks, no reason to skip it."""


def previous_agent(
    architecture: str = "amd64", *, commit: str = COMMIT, cache: Path | None = None, root: Path = ROOT
) -> Path:
    """Return the binary of the agent at a commit, built if it is not there. Raises NotAvailable, CommitMissing."""
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuse" / "agents"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"fused-{commit[:12]}-{architecture}"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_file():
            _build(root, commit, architecture, target)
    return target


def previous_daemon(folder: Path, *, commit: str = COMMIT) -> Path:
    """Unpack the Python source of a commit; the path for `PYTHONPATH`. Raises NotAvailable, CommitMissing."""
    with tarfile.open(fileobj=io.BytesIO(_sources(ROOT, commit, "src"))) as archive:
        archive.extractall(folder)
    return folder / "src"


def _build(root: Path, commit: str, architecture: str, target: Path) -> None:
    hook = _load_build_hook()
    try:
        go = hook.find_compiler()
    except FileNotFoundError as e:
        raise NotAvailable(str(e)) from e
    sources = _sources(root, commit, "guest")
    with tempfile.TemporaryDirectory(prefix="fuse-previous-") as name:
        with tarfile.open(fileobj=io.BytesIO(sources)) as archive:
            archive.extractall(name)
        hook.compile_agent(go, Path(name) / "guest", "./cmd/fused", target, architecture, f"0.0.0+{commit[:12]}")


def _sources(root: Path, commit: str, folder: str) -> bytes:
    """A folder of a commit, as a tar."""
    if not (root / ".git").exists():
        raise NotAvailable(f"{root} is no clone: the release before cannot be had")
    try:
        done = _git(root, "archive", "--format=tar", commit, folder)
    except FileNotFoundError as e:
        raise NotAvailable("git is not installed: the release before cannot be had") from e
    if done.returncode == 0:
        return done.stdout
    said = f"commit {commit[:12]} is not in this clone ({done.stderr.decode(errors='replace').strip()})"
    if _git(root, "rev-parse", "--is-shallow-repository").stdout.strip() == b"true":
        raise NotAvailable(f"{said}: it is shallow, fetch the whole history")
    raise CommitMissing(f"{said}, which has its whole history: name the last release state in {Path(__file__).name}")


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=False)


def _load_build_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

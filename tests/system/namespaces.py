"""Runs a test inside network, mount and process namespaces of its own.

    @private_network
    async def test_something(tmp_path): ...

Outside, the decorated test starts pytest again for itself under `unshare` and reports what that run says. Inside, it
is the plain test: it is root of an empty network (only `lo`, up), `/run/netns` is empty and private, and whatever it
leaves behind (processes, interfaces, rules, mounts) ends with it. Needs root. No parameters by `parametrize`.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from own_world import INSIDE

_NAMESPACES = ["--net", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc"]
_PREPARE = 'mkdir -p /run/netns && mount -t tmpfs fuse-test /run/netns && ip link set lo up && exec "$@"'
_DEADLINE_S = 280
_TAIL_CHARACTERS = 20_000


def is_inside() -> bool:
    """Tell whether this process is one that `private_network` started."""
    return os.environ.get(INSIDE) == "1"


def private_network(test: Callable[..., Any]) -> Callable[..., Any]:
    """Make a test run inside namespaces of its own."""
    if is_inside():
        return pytest.mark.root(test)

    # Not functools.wraps: pytest must not see the fixtures of the test, which are for the inside.
    def outside(request: pytest.FixtureRequest, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root for namespaces of its own")
        _run_again(request, tmp_path / "inside")

    functools.update_wrapper(outside, test, assigned=("__module__", "__name__", "__qualname__", "__doc__"), updated=())
    del outside.__wrapped__  # type: ignore[attr-defined]
    outside.runs_in_another_pytest = True  # type: ignore[attr-defined]
    return pytest.mark.root(outside)


def run_in_private_network(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program inside fresh namespaces, made as for a test."""
    command = ["unshare", *_NAMESPACES, "sh", "-c", _PREPARE, "private_network", *argv]
    return subprocess.run(command, text=True, capture_output=True, check=False, **options)


def _run_again(request: pytest.FixtureRequest, base_temp: Path) -> None:
    root = request.config.rootpath
    path = Path(request.node.path).relative_to(root)
    node = f"{path}::{request.node.nodeid.partition('::')[2]}"
    options = ["-q", "-p", "no:cacheprovider", "--no-header", f"--basetemp={base_temp}"]
    pytest_argv = [sys.executable, "-m", "pytest", *options, node]
    done = run_in_private_network(pytest_argv, cwd=root, env={**os.environ, INSIDE: "1"}, timeout=_DEADLINE_S)
    if "1 skipped" in done.stdout:
        pytest.skip(done.stdout[-_TAIL_CHARACTERS:])
    if done.returncode != 0:
        said = f"{done.stdout[-_TAIL_CHARACTERS:]}\n{done.stderr[-_TAIL_CHARACTERS:]}"
        pytest.fail(f"inside the private network:\n{said}", pytrace=False)

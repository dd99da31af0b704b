"""A real OCI registry (docker-registry, CNCF Distribution) on loopback, in the network of the tests."""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

#: Where `tools/setup.sh dev` unpacks it.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fuse/docker-registry"
PROGRAM = shutil.which("docker-registry", path=f"{_CACHE}{os.pathsep}{os.environ.get('PATH', os.defpath)}")
#: Why its tests cannot be run, or nothing.
MISSING = "" if PROGRAM and shutil.which("skopeo") else "docker-registry or skopeo is not installed"
_CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""


class Registry:
    """A registry that runs."""

    def __init__(self, port: int, root: Path) -> None:
        self.address = f"127.0.0.1:{port}"
        self._root = root

    def push(self, layout: Path, name: str, *, tag: str = "latest") -> str:
        """Push an image of a layout directory, as it is; the digest of its manifest."""
        digest_file = layout / "pushed"
        words = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "--preserve-digests"]
        words += [f"--digestfile={digest_file}", f"oci:{layout}:{tag}", f"docker://{self.address}/{name}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        return digest_file.read_text().strip()

    def put(self, path: str, data: bytes, media_type: str) -> None:
        """Put a manifest as it is, whatever it says."""
        request = urllib.request.Request(
            f"http://{self.address}/v2/{path}", data=data, method="PUT", headers={"content-type": media_type}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 201

    def upload(self, name: str, data: bytes) -> str:
        """Upload a blob; its digest."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        begin = urllib.request.Request(f"http://{self.address}/v2/{name}/blobs/uploads/", data=b"", method="POST")
        with urllib.request.urlopen(begin, timeout=60) as answer:
            place = answer.headers["location"]
        request = urllib.request.Request(
            f"{place}&digest={digest}", data=data, method="PUT", headers={"content-type": "application/octet-stream"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.status == 201
        return digest

    def damage(self, digest: str) -> None:
        """Change a stored blob behind the registry's back."""
        hexadecimal = digest.removeprefix("sha256:")
        path = self._root / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(bytes(data))


@contextlib.contextmanager
def registry(folder: Path, *, auth: str = "") -> Iterator[Registry]:
    """Run a registry that keeps its files in `folder`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = folder / "registry"
    root.mkdir(parents=True)
    config = folder / "config.yml"
    config.write_text(_CONFIG.format(root=root, port=port, auth=auth))
    assert PROGRAM is not None
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", config], stdout=log, stderr=log)
    try:
        _wait(port, process, folder / "log")
        yield Registry(port, root)
    finally:
        process.kill()
        process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(urllib.error.HTTPError, OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
            return
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError(log.read_text())

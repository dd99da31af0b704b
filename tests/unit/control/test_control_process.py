"""The server as a process: start, stop, kill and start again, privileges."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from control_process import serving


def _run(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fusevm.control", *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_with_open_streams(tmp_path: Path, number: int) -> None:
    with serving(tmp_path) as server, httpx.Client(base_url=server.url) as http:
        http.post("/v1/environments", json={"task_id": "t"}).raise_for_status()
        with http.stream("GET", "/v1/environments/fuse-t/events") as response:
            chunks = response.iter_bytes()
            assert b"running" in next(chunks)
            assert server.end(number) == 0
            assert b"".join(chunks) == b""
    assert "fuse control plane 0.1.0 at http://127.0.0.1:" in (tmp_path / "out").read_text()
    assert "Traceback" not in (tmp_path / "out").read_text()


def test_what_was_made_survives_kill_9(tmp_path: Path) -> None:
    database = str(tmp_path / "fuse.db")
    with serving(tmp_path, "--database", database) as server, httpx.Client(base_url=server.url) as http:
        made = http.post("/v1/environments", json={"task_id": "t"}).json()
        http.post("/v1/environments", json={"task_id": "gone"})
        http.delete("/v1/environments/fuse-gone")
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    with serving(tmp_path, "--database", database) as server, httpx.Client(base_url=server.url) as http:
        shown = http.get("/v1/environments/fuse-t", params={"uid": made["uid"]}).json()
        assert (shown["uid"], shown["created_at"]) == (made["uid"], made["created_at"])
        ended = http.get("/v1/environments", params={"ended": "true", "task_id": "gone"}).json()
        assert [env["state"] for env in ended["environments"]] == ["destroyed"]
        server.end()
    assert stat.S_IMODE((tmp_path / "fuse.db.key").stat().st_mode) == 0o600


def test_a_second_process_on_one_database_is_refused(tmp_path: Path) -> None:
    database = str(tmp_path / "fuse.db")
    with serving(tmp_path, "--database", database) as server:
        second = _run("--listen", "127.0.0.1:0", "--database", database)
        assert second.returncode == 4
        assert f"pid {server.process.pid}" in second.stderr
        assert "Traceback" not in second.stderr


def test_a_taken_port_and_an_open_door_are_said_in_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = _run("--listen", f"127.0.0.1:{port}")
        assert (refused.returncode, f"127.0.0.1:{port} is in use" in refused.stderr) == (4, True)
    open_door = _run("--listen", "0.0.0.0:0")
    assert (open_door.returncode, "auth token" in open_door.stderr) == (2, True)
    with_token = _run("--listen", "127.0.0.1:0", "--host-url", "http://10.0.0.1:1")
    assert (with_token.returncode, "https" in with_token.stderr) == (2, True)


def test_it_stays_small(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        resident_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
        assert resident_kb < 120 * 1024


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="starts as root")
def test_root_is_given_up_after_binding(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == 0 and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    database = tmp_path / "data" / "fuse.db"
    code = f"""
import sys
from fusevm.control.config import ControlConfig
from fusevm.control.main import serve
sys.exit(serve(ControlConfig(listen="127.0.0.1:0", database={str(database)!r}, drop_to_uid=65534,
                             ready_file={str(tmp_path / "ready")!r}, log_level="error")))
"""
    with serving(tmp_path, code=code) as server:
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        fields = {line.split(":")[0]: line.split()[1:] for line in lines}
        assert fields["Uid"] == ["65534"] * 4
        assert set(fields["Gid"]) == {"65534"}
        assert set(fields["Groups"]) <= {"65534"}
        assert int(fields["CapEff"][0], 16) == 0
        made = httpx.post(server.url + "/v1/environments", json={"task_id": "t"})
        assert made.status_code == 201
        assert database.stat().st_uid == 65534
        assert server.end() == 0

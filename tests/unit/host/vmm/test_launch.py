"""Starting VMM processes: what they keep of the daemon, and what they do not."""

import asyncio
import os
import socket
from pathlib import Path

import pytest

from fusevm.host.process import ProcessHandle
from fusevm.host.vmm.driver import Confinement
from fusevm.host.vmm.launch import (
    Launch,
    check_socket_path,
    find_program,
    open_output,
    open_socket,
    render_launch,
    start_process,
)
from fusevm.model.errors import PathTooLong, VmmMissing


def test_the_chain_of_a_confined_process():
    words = render_launch(
        Launch(
            argv=["/usr/bin/qemu", "-name", "m-1"],
            pass_fds=(),
            output_fd=2,
            netns=Path("/run/netns/fuse-1"),
            confinement=Confinement(uid=70001, gid=70002, cgroups=(Path("/cg/memory/m-1"), Path("/cg/cpu/m-1"))),
        )
    )
    assert words[:2] == ["/bin/sh", "-c"]
    assert " ".join(words[3:]) == (
        "fuse-vmm /cg/memory/m-1 /cg/cpu/m-1 -- nsenter --net=/run/netns/fuse-1 -- setpriv --no-new-privs "
        "--reuid 70001 --regid 70002 --clear-groups --inh-caps=-all --ambient-caps=-all --bounding-set=-all -- "
        "/usr/bin/qemu -name m-1"
    )


def test_the_chain_without_root_and_with_a_group_for_kvm():
    plain = Launch(argv=["qemu"], pass_fds=(), output_fd=2)
    assert " ".join(render_launch(plain)[3:]) == "fuse-vmm -- setpriv --no-new-privs -- qemu"
    grouped = Launch(argv=["qemu"], pass_fds=(), output_fd=2, confinement=Confinement(uid=5), groups=(36,))
    assert "--groups 36 " in " ".join(render_launch(grouped))


def test_the_chain_of_a_process_that_gets_no_network():
    chain = " ".join(render_launch(Launch(argv=["qemu"], pass_fds=(), output_fd=2, is_cut_off=True))[3:])
    assert chain == "fuse-vmm -- unshare --net -- setpriv --no-new-privs -- qemu"


async def run_shell(tmp_path: Path, script: str, **fields) -> tuple[str, int | None]:
    output = open_output(tmp_path / "vmm.out")
    handle = ProcessHandle.of_child(start_process(Launch(argv=["sh", "-c", script], output_fd=output, **fields)))
    async with asyncio.timeout(60):
        status = await handle.wait()
    text = os.read(output, 65536).decode()
    os.close(output)
    return text, status


async def test_a_process_keeps_nothing_of_the_daemon_but_what_is_passed(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    leaky = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leaky, True)
    ours, theirs = socket.socketpair()
    script = 'for f in /proc/$$/fd/*; do echo "fd ${f##*/} $(readlink $f)"; done; '
    script += "env; cat /proc/self/stat; ulimit -c; umask; pwd"
    text, status = await run_shell(tmp_path, script, pass_fds=(theirs.fileno(),))
    os.close(leaky)
    assert status == 0
    assert "SECRET_TOKEN" not in text
    lines = text.splitlines()
    open_files = dict(line.split(" ")[1:] for line in lines if line.startswith("fd "))
    assert open_files["0"] == "/dev/null"
    assert open_files["1"].endswith("vmm.out")
    del open_files["3"]  # the shell, while it listed the folder
    assert set(open_files) == {"0", "1", "2", str(theirs.fileno())}
    stat = next(line for line in lines if "(cat)" in line).rpartition(")")[2].split()
    session, terminal = int(stat[3]), int(stat[4])
    assert session != os.getsid(0)
    assert terminal == 0
    assert lines[-3:] == ["0", "0077", "/"]
    ours.close()
    theirs.close()


async def test_a_process_without_root_gains_nothing(tmp_path):
    text, _ = await run_shell(tmp_path, "grep NoNewPrivs /proc/self/status", pass_fds=())
    assert text.split() == ["NoNewPrivs:", "1"]


async def test_a_cgroup_that_cannot_be_joined_stops_the_start(tmp_path):
    confinement = Confinement(cgroups=(tmp_path / "nowhere",))
    text, status = await run_shell(tmp_path, "echo ran", pass_fds=(), confinement=confinement)
    assert status == 125
    assert "cannot join the cgroup" in text
    assert "ran" not in text


async def test_the_output_never_blocks_the_process(tmp_path):
    text, status = await run_shell(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' x; exit 3", pass_fds=())
    assert status == 3
    assert text.startswith("x")


def test_socket_paths_have_at_most_107_bytes(tmp_path):
    check_socket_path(Path("/" + "a" * 106))
    with pytest.raises(PathTooLong, match="107"):
        check_socket_path(Path("/" + "ä" * 53 + "bb"))


def test_a_socket_takes_the_place_of_whatever_is_there_and_is_connected(tmp_path):
    path = tmp_path / "agent.sock"
    path.write_text("stale")
    ends = open_socket(path)
    assert path.stat().st_mode & 0o777 == 0o600
    ends.client.send(b"x")
    accepted, _ = ends.listener.accept()
    assert accepted.recv(1) == b"x"
    for end in (accepted, ends.client, ends.listener):
        end.close()


def test_a_socket_that_cannot_be_made_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        open_socket(tmp_path / "nowhere" / "agent.sock")


def test_a_missing_program_names_its_remedy():
    assert find_program("sh", "") in ("/bin/sh", "/usr/bin/sh")
    with pytest.raises(VmmMissing, match="apt-get install it"):
        find_program("no-such-program", "apt-get install it")

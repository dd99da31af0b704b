"""Choosing an accelerator: what is tried, what is remembered."""

import json
import os
import sys
from pathlib import Path

import pytest

from fusevm.host.vmm.probe import choose_accelerator
from fusevm.model.errors import VmmMissing
from fusevm.testing.processes import find_processes


@pytest.fixture
def host(tmp_path):
    """A host whose KVM opens, with a QEMU that notes its starts and fails."""
    for name in ("kernel", "initramfs", "kvm"):
        (tmp_path / name).write_text(name)
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\necho run >> {tmp_path}/runs\necho 'no MSR 0x10a' >&2\nexit 3\n")
    qemu.chmod(0o755)
    return tmp_path


#: A QEMU that greets, and whose guest does what the word says.
FAKE_QEMU = """#!{python}
import json, re, socket, sys, time
sys.path.insert(0, {source!r})
from fusevm.wire.mux import Decoder, FrameType, encode_frame
fds = dict(re.findall(r"socket,id=([a-z]+),fd=([0-9]+)", " ".join(sys.argv)))
ends = {{name: socket.socket(fileno=int(fd)).accept()[0] for name, fd in fds.items()}}
lines = ends["qmp"].makefile("rw")
def say(**message):
    lines.write(json.dumps(message) + chr(10)); lines.flush()
say(QMP={{}})
lines.readline(); say(**{{"return": {{}}}})
if {deed!r} == "answer":
    decoder = Decoder()
    while True:
        for frame in decoder.feed(ends["agent"].recv(65536)):
            if frame.type == FrameType.HELLO:
                ends["agent"].sendall(encode_frame(frame))
print("KVM internal error. Suberror: 1", file=sys.stderr, flush=True)
say(event="STOP")
lines.readline(); say(**{{"return": {{"status": "internal-error"}}}})
time.sleep(60)
"""


def play(host: Path, deed: str) -> None:
    source = str(Path(__file__).parents[4] / "src")
    (host / "qemu").write_text(FAKE_QEMU.format(python=sys.executable, source=source, deed=deed))


async def test_a_guest_that_answers_gives_kvm_and_is_killed(host):
    play(host, "answer")
    choice = await choose(host)
    assert choice.accelerator == "kvm"
    assert find_processes(str(host / "qemu")) == []


async def test_a_guest_that_kvm_cannot_go_on_with_is_not_waited_for(host):
    play(host, "stop")
    choice = await choose(host, timeout_s=1e6)
    assert choice.accelerator == "tcg"
    assert "KVM internal error" in choice.why


def runs(host: Path) -> int:
    return len((host / "runs").read_text().split()) if (host / "runs").exists() else 0


async def choose(host: Path, **changes):
    arguments = {"program": str(host / "qemu"), "kvm": host / "kvm"} | changes
    return await choose_accelerator(host / "kernel", host / "initramfs", host, **arguments)


async def test_without_kvm_nothing_is_tried(host):
    choice = await choose(host, kvm=host / "nothing")
    assert choice.accelerator == "tcg"
    assert "No such file" in choice.why
    assert runs(host) == 0


async def test_a_kvm_that_fails_gives_emulation_and_its_words_and_is_not_tried_again(host):
    first = await choose(host)
    assert first.accelerator == "tcg"
    assert "status 3: no MSR 0x10a" in first.why
    assert await choose(host) == first
    assert runs(host) == 1
    assert "no MSR 0x10a" in json.loads((host / "accelerator.json").read_text())["problem"]


@pytest.mark.parametrize("name", ["kernel", "initramfs", "qemu"])
async def test_another_kernel_initramfs_or_qemu_is_tried_anew(host, name):
    await choose(host)
    with (host / name).open("a") as file:
        file.write("# changed\n")
    await choose(host)
    assert runs(host) == 2


async def test_a_damaged_cache_only_costs_a_probe(host):
    await choose(host)
    (host / "accelerator.json").write_text("{")
    await choose(host)
    assert runs(host) == 2


async def test_a_machine_that_does_not_answer_is_given_up_and_killed(host):
    (host / "qemu").write_text(f"#!/bin/sh\necho $$ > {host}/pid\nexec sleep 60\n")
    for timeout_s in (0.5, 5, 50):  # until it is long enough for this machine to start the program
        (host / "accelerator.json").unlink(missing_ok=True)
        choice = await choose(host, timeout_s=timeout_s)
        assert f"no answer from the agent within {timeout_s} s" in choice.why
        if (host / "pid").exists():
            break
    assert not Path(f"/proc/{(host / 'pid').read_text().strip()}").exists()


async def test_a_missing_qemu_is_an_error(host):
    with pytest.raises(VmmMissing):
        await choose(host, program="no-such-qemu")


async def test_nothing_is_left_in_the_temporary_folder(host, monkeypatch):
    folder = host / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    await choose(host)
    assert os.listdir(folder) == []  # noqa: PTH208

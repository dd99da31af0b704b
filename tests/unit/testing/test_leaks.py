"""The look for leaks sees each kind of them: tests that leak on purpose are run, and reported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from own_world import INSIDE

TESTS = Path(__file__).resolve().parents[2]

ANYBODY = """
import asyncio, os, subprocess, sys, tempfile, threading
import leaks

leaks.GRACE_S = 0.3
SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
kept = []

def test_nothing(tmp_path):
    (tmp_path / "mine").write_text("stays")
    subprocess.run(["true"], check=True)

async def test_task():
    kept.append(asyncio.create_task(asyncio.sleep(600)))

async def test_a_task_that_was_waited_for():
    await asyncio.create_task(asyncio.sleep(0))

def test_thread():
    kept.append(threading.Thread(target=threading.Event().wait, args=[2]))
    kept[-1].start()

def test_descriptor():
    kept.append(os.pipe())

def test_process():
    kept.append(subprocess.Popen(SLEEP))

def test_process_zombie():
    kept.append(subprocess.Popen(["true"]))

def test_process_orphan():
    "Nobody waits for it and its parent is gone: known by the environment."
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *SLEEP], check=True)

def test_temporary_file():
    kept.append(tempfile.mkdtemp())
"""
ROOT = """
import subprocess, sys, tempfile
import leaks

leaks.GRACE_S = 0.3

def sh(text):
    subprocess.run(["sh", "-c", text], check=True)

def test_process():
    "Nothing in its environment tells whose it is: known by the namespace."
    code = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True, env={})"
    sleep = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *sleep], check=True)

def test_namespace_and_mount():
    sh("ip netns add left")

def test_interface():
    sh("ip link add left0 type veth peer name left1")

def test_tap():
    sh("ip tuntap add left2 mode tap")

def test_temporary_file():
    tempfile.mkdtemp(dir="/var/tmp")

def test_run_directory():
    sh("mkdir /run/left")
"""


def reports(folder: Path, source: str) -> dict[str, str]:
    """Run tests with the fixtures of this folder; what is said of each that leaves something."""
    (folder / "test_sample.py").write_text(source)
    environ = {name: value for name, value in os.environ.items() if name != INSIDE}
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "-o", "asyncio_mode=auto", "--tb=line"]
    done = subprocess.run(
        [
            sys.executable,
            *words,
            f"--rootdir={folder}",
            f"--basetemp={folder / 'base'}",
            str(folder / "test_sample.py"),
        ],
        env=environ | {"PYTHONPATH": str(TESTS)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    said = re.findall(r"^ERROR \S+::(\w+) - (.*)", done.stdout, re.MULTILINE)
    assert said, done.stdout + done.stderr
    return dict(said)


def test_every_kind_of_leak_is_an_error_of_its_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    found = reports(tmp_path, ANYBODY)
    assert set(found) == {
        "test_task",
        "test_thread",
        "test_descriptor",
        "test_process",
        "test_process_zombie",
        "test_process_orphan",
        "test_temporary_file",
    }
    for test, said in found.items():
        kind = test.split("_")[1]
        assert f"{'temporary file' if kind == 'temporary' else kind}" in said, said


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for namespaces of its own")
@pytest.mark.root
def test_every_kind_of_leak_into_the_machine_is_an_error_of_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    found = reports(tmp_path, ROOT)
    assert "mount" in found["test_namespace_and_mount"]
    kind = re.compile(r"(process|namespace|interface|temporary file|run directory) ")
    kinds = {test: kind.findall(said) for test, said in found.items()}
    assert kinds == {
        "test_process": ["process"],
        "test_namespace_and_mount": ["namespace"],
        "test_interface": ["interface", "interface"],
        "test_tap": ["interface"],
        "test_temporary_file": ["temporary file"],
        "test_run_directory": ["run directory"],
    }

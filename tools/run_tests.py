"""Run all tests, in two halves side by side that take about as long.

    python tools/run_tests.py [ARGUMENT OF PYTEST ...]

Each half has network, mounts and processes of its own (`tests/own_world.py`). With arguments there is one pytest, for
exactly these. What was skipped is said once, at the end.
"""

import subprocess
import sys
import threading
from typing import IO

#: They wait for machines and servers more than they compute.
SYSTEM = ("tests/real", "tests/system")


def main() -> int:
    """Exit status of the half that failed, 0: all passed."""
    if len(sys.argv) > 1:
        halves = [_start(*sys.argv[1:])]
    else:
        halves = [_start(*SYSTEM), _start("tests", *(f"--ignore={folder}" for folder in SYSTEM))]
    skipped: list[str] = []
    followers = [threading.Thread(target=_follow, args=(half.stdout, skipped)) for half in halves]
    for follower in followers:
        follower.start()
    try:
        for follower in followers:
            follower.join()
    except KeyboardInterrupt:
        pass  # pytest was interrupted, too, and ends by itself
    codes = [half.wait() for half in halves]
    print("Skipped:" if skipped else "Nothing was skipped.", *skipped, sep="\n", flush=True)
    return next((code for code in codes if code), 0)


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "pytest", "-rs", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def _follow(output: IO[str] | None, skipped: list[str]) -> None:
    """Pass whole lines on; keep those about skipped tests."""
    for line in output or ():
        if line.startswith("SKIPPED"):
            skipped.append(line.rstrip())
        else:
            sys.stdout.write(line)
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m fusevm.cli.quickstart`: from nothing to a first machine and back to nothing, in front of your eyes.

Starts an ephemeral Fuse of its own beside whatever runs here (kernel and image are those of the ordinary data folder,
made when missing), uses it through the SDK as any program would, measures, removes everything, and checks that.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fusevm.cli.ephemeral_stack import ephemeral_stack
from fusevm.cli.failures import CliError, report
from fusevm.cli.installation import local_client
from fusevm.cli.leftovers import find_leftovers
from fusevm.cli.output import print_table
from fusevm.cli.up import Ready
from fusevm.model.errors import Error
from fusevm.sdk import Fuse
from fusevm.wire.frames import FrameType
from fusevm.wire.rest import EnvironmentBody

T = TypeVar("T")
IMAGE = "debian-12"
PROGRAM = """
import os, platform, time
print("Hello from", platform.node(), "- Linux", platform.release(), flush=True)
for number in range(5):
    print("line", number + 1, "of 5, as it is printed", flush=True)
    time.sleep(0.2)
print("user", os.getuid(), "on", os.cpu_count(), "CPU", flush=True)
"""
COPY_BYTES = 8 << 20
ROUND_TRIPS = 20
#: The kernel takes namespaces and groups down in its own time.
_GONE_TIMEOUT_S = 10.0


def main() -> int:
    """Run it all; 0 when everything worked and nothing was left."""
    try:
        with tempfile.TemporaryDirectory(prefix="fuse-quickstart-") as folder:
            ready_file = Path(folder) / "ready.json"
            with stack(ready_file) as ready:
                times = tour(ready)
        print_times(times)
        check_clean(ready)
    except KeyboardInterrupt:
        report("interrupted")
        return 130
    except Error as error:
        report(error.message)
        return 1
    except CliError as error:
        report(str(error), error.hint)
        return 1
    print("\nNothing was left behind: no process, no namespace, no interface, no mount, no file.")
    print(f"Now yours: `{our_name()} up`, and in another terminal `{our_name()} run {IMAGE}`")
    return 0


def our_name() -> str:
    """How to call the command from here."""
    script = Path(sys.executable).with_name("fuse")
    return os.path.relpath(script) if script.exists() else f"{os.path.relpath(sys.executable)} -m fusevm"


@contextlib.contextmanager
def stack(ready_file: Path) -> Iterator[Ready]:
    """An ephemeral Fuse, with words about it."""
    heading("Starting Fuse (the first time this fetches a kernel and builds an image)")
    with ephemeral_stack(ready_file, IMAGE) as ready:
        yield ready
        heading("Stopping")


def tour(ready: Ready) -> list[tuple[str, float]]:
    """Use it, and return what took how many milliseconds."""
    with local_client(ready.context) as fuse:
        host = next(fuse.hosts.list())
        print(f"Up at {ready.context.url}, machines run by {host.driver}")
        heading(f"Creating an environment from {IMAGE}")
        created, times = timed("create, as the client sees it", lambda: fuse.environments.create(image=IMAGE))
        try:
            times += phases(created)
            heading("Running a Python program in it")
            times += run_program(fuse, created.id)
            heading("Copying a file in and out")
            times += copy(fuse, created.id)
        finally:
            heading("Destroying it")
            _, ended = timed("destroy", lambda: fuse.environments.delete(created.id))
        return times + ended


def timed(name: str, work: Callable[[], T]) -> tuple[T, list[tuple[str, float]]]:
    """Do it and measure it."""
    began = time.perf_counter()
    result = work()
    return result, [(name, (time.perf_counter() - began) * 1000)]


def phases(created: EnvironmentBody) -> list[tuple[str, float]]:
    """Where the time of the create went."""
    measured = created.timings
    names = ("schedule", "prepare", "boot", "agent")
    return [(f"  {name}", getattr(measured, f"{name}_ms")) for name in names] if measured is not None else []


def run_program(fuse: Fuse, env_id: str) -> list[tuple[str, float]]:
    """Stream a program's output, then measure how long a command takes to come back."""
    began, first = time.perf_counter(), None
    with fuse.environments.exec_stream(env_id, ["python3", "-c", PROGRAM]) as session:
        for frame in session.frames():
            first = first or time.perf_counter()
            stream = sys.stderr if frame.type is FrameType.STDERR else sys.stdout
            stream.write("".join(f"  | {line}\n" for line in frame.payload.decode("utf-8", "replace").splitlines()))
            stream.flush()
    if session.exit is None or session.exit.exit_code:
        raise CliError(f"the program ended with {session.exit}")
    trips = [timed("", lambda: fuse.environments.exec(env_id, ["true"]))[1][0][1] for _ in range(ROUND_TRIPS)]
    return [
        ("first output of Python", ((first or began) - began) * 1000),
        (f"exec of `true`, median of {ROUND_TRIPS}", statistics.median(trips)),
    ]


def copy(fuse: Fuse, env_id: str) -> list[tuple[str, float]]:
    """Copy random bytes in and out again and compare."""
    files, data = fuse.environments.files(env_id), os.urandom(COPY_BYTES)
    size = f"{COPY_BYTES >> 20} MiB"
    _, written = timed(f"copy {size} in", lambda: files.write("/root/quickstart.bin", data))
    back, read = timed(f"copy {size} out", lambda: files.read("/root/quickstart.bin"))
    if back != data:
        raise CliError("the file that came back is not the one that was sent")
    print(f"  {size} went in and came out unchanged")
    return written + read


def print_times(times: list[tuple[str, float]]) -> None:
    """The table of what was measured."""
    heading("Times")
    print_table(("what", "milliseconds"), [(name, f"{value:.1f}") for name, value in times])


def check_clean(ready: Ready) -> None:
    """Raises CliError with the names of whatever is left."""
    ends_at = time.monotonic() + _GONE_TIMEOUT_S
    while left := find_leftovers(Path(ready.context.data_root), ready.instance):
        if time.monotonic() > ends_at:
            raise CliError(f"something was left behind: {'; '.join(left)}")
        time.sleep(0.2)


def heading(text: str) -> None:
    """Say what happens now."""
    print(f"\n{text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

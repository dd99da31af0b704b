"""Records as the pages show them: pure functions to plain text and table rows. Nothing here is HTML."""

import re
from typing import Any
from urllib.parse import quote

from fusevm.model.errors import Error, Unauthorized
from fusevm.sdk.words import format_age
from fusevm.wire.rest import EnvironmentBody, EventBody, ExecAnswer, HostBody

Row = dict[str, Any]
#: Of one stream of one command, and of a log. What is left out is said.
TAIL_BYTES = 64 << 10
#: Terminal control sequences (ECMA-48: CSI, OSC, two-character ones), and control characters but tab and line feed.
_CONTROLS = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]?|[\x00-\x08\x0b-\x1f\x7f]"
)


def environment_path(one: EnvironmentBody) -> str:
    """Address of its page; with the uid, so that it goes on meaning this one."""
    return f"/environments/{quote(one.id, safe='')}?uid={quote(one.uid, safe='')}"


def render_memory(mib: int) -> str:
    """Memory as people write it: 512 MiB, 2 GiB, 1.5 GiB, 1,024 TiB."""
    if mib < 1 << 10:
        return f"{mib} MiB"
    size, unit = (mib / (1 << 10), "GiB") if mib < 1 << 20 else (mib / (1 << 20), "TiB")
    return f"{size:,.1f}".removesuffix(".0") + f" {unit}"


def render_environment(one: EnvironmentBody, now_s: float) -> Row:
    """The row of an environment. Columns sort by plain values; `*_text` is what is shown."""
    return {
        "uid": one.uid,
        "id": one.id,
        "href": environment_path(one),
        "state": one.state,
        "reason": one.reason,
        "host": one.host_id,
        "image": one.spec.image,
        "cpus": one.spec.cpus,
        "ram": one.spec.ram_mb,
        "ram_text": render_memory(one.spec.ram_mb),
        "created": one.created_at,
        "age_text": format_age(one.created_at, now_s),
        "is_ended": bool(one.ended_at),
    }


def render_host(host: HostBody, now_s: float) -> Row:
    """The row of a host."""
    used, there = host.allocated, host.capacity
    return {
        "id": host.id,
        "health": host.health,
        "state": host.state,
        "driver": host.driver,
        "cpus": _share(used.cpus, there.cpus),
        "cpus_text": f"{used.cpus:,} of {there.cpus:,}",
        "ram": _share(used.ram_mb, there.ram_mb),
        "ram_text": f"{render_memory(used.ram_mb)} of {render_memory(there.ram_mb)}",
        "disk": _share(used.storage_gb, there.storage_gb),
        "disk_text": f"{used.storage_gb:,} of {there.storage_gb:,} GiB",
        "machines": used.vm_count,
        "machines_text": f"{used.vm_count:,}" + (f" of {there.vm_count:,}" if there.vm_count else ""),
        "last_seen": host.last_seen,
        "seen_text": f"{format_age(host.last_seen, now_s)} ago" if host.last_seen else "never",
        "version": host.version,
    }


def _share(used: int, there: int) -> float:
    return min(used / there, 1.0) if there else 0.0


def render_event(event: EventBody) -> str:
    """One event with everything it says, on one line."""
    fields = [("state", event.state), ("reason", event.reason), ("message", event.message), ("error", event.error)]
    fields += [("cause", event.cause), *event.data.items()]
    said = " ".join(f"{name}={value}" for name, value in fields if value)
    return f"{event.updated_at}  #{event.id.rpartition('.')[2] or '-'}  {event.event}  {said}"


def render_verdict(answer: ExecAnswer) -> str:
    """How a command ended."""
    if answer.timed_out:
        how = "stopped at its time limit"
    elif isinstance(answer.signal, str) and answer.signal:
        how = f"ended by {answer.signal}"
    else:
        how = f"exit status {answer.exit_code}"
    return f"{how}, {answer.duration_ms} ms"


class Tail:
    """The end of a stream that goes on."""

    def __init__(self) -> None:
        self._kept = b""
        self._total = 0

    def add(self, chunk: bytes) -> None:
        """What came next."""
        self._total += len(chunk)
        self._kept = (self._kept + chunk)[-TAIL_BYTES:]

    @property
    def text(self) -> str:
        """For people; see `render_output`."""
        return render_output(self._kept, self._total)


def render_output(output: bytes, total: int) -> str:
    """The end of what was written, and a first line that says so when there was more."""
    shown = output[-TAIL_BYTES:]
    left_out = f"[the last {len(shown)} of {total} bytes]\n" if total > len(shown) else ""
    return left_out + render_terminal_text(shown)


def render_terminal_text(output: bytes) -> str:
    """Bytes meant for a terminal as plain text: no colours, no cursor movements."""
    return _CONTROLS.sub("", output.decode("utf-8", "replace").replace("\r\n", "\n"))


def render_problem(error: Error) -> str:
    """The error's sentence, and what to do here where the sentence is about other clients."""
    if isinstance(error, Unauthorized):
        return "The control plane does not take this console's token. Start `fuse console` again with the right one."
    return error.message

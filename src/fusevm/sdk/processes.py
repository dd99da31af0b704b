"""Background processes of a machine, synchronously."""

from collections.abc import Iterator

from fusevm.sdk import core
from fusevm.sdk.channel import Channel
from fusevm.sdk.core import Argv
from fusevm.wire.guest import ExecRequest, Process

_Processes = list[Process]


class Processes:
    """`/v1/environments/{id}/processes`: commands that outlive the connection that started them."""

    def __init__(self, channel: Channel, env_id: str) -> None:
        self._channel = channel
        self._id = env_id

    def start(
        self,
        cmd: Argv | None = None,
        *,
        shell: str = "",
        env: dict[str, str] | None = None,
        cwd: str = "",
        user: str = "",
        stdin: bool = False,
    ) -> Process:
        """Start a command; with `stdin` a pipe stays open for `write_stdin`."""
        request = ExecRequest(cmd=cmd or [], shell=shell, env=env or {}, cwd=cwd, user=user, stdin=stdin)
        return self._channel.get(core.start_process(self._id, request))

    def list(self) -> _Processes:
        """All that were started by the API, ended ones included."""
        return self._channel.get(core.list_processes(self._id)).processes

    def get(self, pid: int) -> Process:
        """One process. Raises ProcessNotFound."""
        return self._channel.get(core.get_process(self._id, pid))

    def output(
        self, pid: int, *, stream: str = "stdout", offset: int | None = None, follow: bool = False
    ) -> Iterator[bytes]:
        """Retained output from an absolute offset (default: the oldest) on; with `follow` until the process ends."""
        request = core.read_output(self._id, pid, stream=stream, offset=offset, follow=follow)
        with self._channel.stream(request, None if follow else core.QUICK_TIMEOUT_S) as response:
            yield from response.chunks()

    def signal(self, pid: int, signal: str = "TERM") -> None:
        """Send a signal to a process and its children."""
        self._channel.call(core.signal_process(self._id, pid, signal))

    def write_stdin(self, pid: int, data: bytes, *, eof: bool = False) -> None:
        """Append to its input; `eof` closes it afterwards. Raises StdinClosed."""
        self._channel.call(core.write_stdin(self._id, pid, data, eof=eof))

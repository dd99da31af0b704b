"""A machine without host daemon and control plane: driver and channel, and requests spoken straight to the agent."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from fusevm.cli.failures import CliError
from fusevm.host.vmm.driver import BootPlan
from fusevm.host.vmm.qemu import QemuDriver, QemuVmm
from fusevm.wire.frames import Frame, FrameDecoder, FrameType, encode_frame
from fusevm.wire.guest import UPGRADE, ExecRequest
from fusevm.wire.http1 import CHUNK, Connection

_PATH = "/files?path=/root/bench"


class RawMachine:
    """One machine straight on the driver. Use as an async context manager."""

    def __init__(
        self, kernel: Path, initramfs: Path, image: Path, *, overlay: Path, folder: Path, memory_mib: int
    ) -> None:
        self._plan = BootPlan(
            machine_id="m-bench",
            cpus=1,
            memory_mib=memory_mib,
            kernel=kernel,
            initramfs=initramfs,
            command_line="fuse.nonce=" + "0" * 32,
            image=image,
            overlay=overlay,
            run_dir=folder,
            console_log=folder / "console.log",
        )
        self._vmm: QemuVmm | None = None

    async def __aenter__(self) -> Self:
        self._vmm = await QemuDriver().boot(self._plan)
        await self._vmm.wait_ready()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._vmm is not None:
            await self._vmm.kill()
            await self._vmm.close()

    async def transfer(self, way: str, size: int) -> float:
        """Seconds for `size` bytes: `upload` a file, `download` it, or `output` of a command."""
        if self._vmm is None:
            raise RuntimeError("not started")
        stream = await self._vmm.open_stream()
        connection = Connection(stream)
        started = time.perf_counter()
        try:
            if way == "upload":
                await (await connection.request("PUT", _PATH, body=_zeros(size))).read()
            elif way == "download":
                response = await connection.request("GET", _PATH)
                received = sum([len(chunk) async for chunk in response.chunks()])
                _check(received, size)
            else:
                _check(await _output(connection, size), size)
            return time.perf_counter() - started
        finally:
            await stream.close()


async def _zeros(size: int) -> AsyncIterator[bytes]:
    chunk = bytes(CHUNK)
    for _ in range(size // CHUNK):
        yield chunk


async def _output(connection: Connection, size: int) -> int:
    await connection.request("GET", "/exec", headers={"connection": "upgrade", "upgrade": UPGRADE})
    stream, data = connection.upgraded()
    request = ExecRequest(cmd=["head", "-c", str(size), "/dev/zero"])
    await stream.write(encode_frame(Frame(FrameType.START, msgspec.json.encode(request))))
    decoder, received = FrameDecoder(), 0
    while True:
        for frame in decoder.feed(data):
            if frame.type is FrameType.STDOUT:
                received += len(frame.payload)
            elif frame.type in (FrameType.EXIT, FrameType.ERROR):
                return received
        data = await stream.read(CHUNK * 4)


def _check(received: int, size: int) -> None:
    if received != size:
        raise CliError(f"{received} bytes came of {size}")

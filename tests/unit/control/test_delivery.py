"""Output of a startup script: every byte is told once, whoever else tells it too."""

import asyncio
from collections.abc import AsyncIterator, Mapping

import pytest

from fusevm.control import delivery
from fusevm.core.redaction import RedactedStream, Redactor
from fusevm.model.environment import Desired, Environment, Spec, State
from fusevm.model.errors import StartupFailed
from fusevm.model.setup import Setup
from fusevm.wire.guest import Exit, Process

SPEC = Spec(cpus=1, ram_mb=512, storage_gb=4, image="i")
SECRET = "hush-hush-hush"
OUTPUT = b"".join(f"line {number} {SECRET}\n".encode() for number in range(2000))


class Answer:
    """Implements `host_api.Upstream`."""

    status = 200

    def __init__(self, content: bytes, sizes: int, offset: int) -> None:
        self.headers: Mapping[str, str] = {"x-fuse-offset": str(offset)}
        self._pieces = [content[start : start + sizes] for start in range(0, len(content), sizes)]

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece

    async def close(self) -> None:
        return


class Guest:
    """What `delivery` asks of `GuestCalls`."""

    def __init__(self, stdout: bytes, *, exit_code: int = 0, sizes: int = 1000, offset: int = 0) -> None:
        self.stdout = stdout
        self.exit_code = exit_code
        self.sizes = sizes
        self.offset = offset

    async def ask(self, method: str, target: str, answer: object, body: object = None) -> object:
        return Process(pid=1, exit=Exit(exit_code=self.exit_code)) if target.startswith("processes") else None

    async def open(self, method: str, target: str) -> Answer:
        return Answer(self.stdout[self.offset :] if "stdout" in target else b"", self.sizes, self.offset)


class Ledger:
    """The record and its facts: told is what begins where nothing was told."""

    def __init__(self) -> None:
        self.upto: dict[str, int] = {}
        self.told: list[tuple[int, str]] = []
        self.others: list[int] = []

    async def tell(self, stream: str, offset: int, end: int, text: str) -> int:
        if self.others:  # another replica is faster
            await self._note(stream, self.upto.get(stream, 0), self.others.pop(0))
        return await self._note(stream, offset, end, text)

    async def _note(self, stream: str, offset: int, end: int, text: str | None = None) -> int:
        if offset >= self.upto.get(stream, 0):
            self.upto[stream] = end
            self.told.append((offset, text if text is not None else masked(OUTPUT[offset:end])))
        return self.upto[stream]

    @property
    def text(self) -> str:
        return "".join(text for _, text in self.told)


def masked(content: bytes) -> str:
    return content.decode().replace(SECRET, "***")


async def deliver(guest: Guest, ledger: Ledger) -> None:
    env = Environment(
        uid="u", task_id="t", spec=SPEC, state=State.PROVISIONING, desired=Desired.RUNNING, host_id="h1",
        machine_id="m", incarnation=1, action_seq=2, created_at_ms=0, updated_at_ms=0, last_activity_ms=0,
        startup_told=dict(ledger.upto),
    )  # fmt: skip
    setup = Setup(startup_script="x", startup_timeout_s=30)
    await delivery.deliver(guest, env, setup, Redactor([SECRET]), ledger.tell)  # type: ignore[arg-type] # a part of it


@pytest.mark.parametrize("sizes", [1, 7, 1000, 100_000])
async def test_the_beginning_of_the_output_is_told_in_order_and_once(sizes: int) -> None:
    ledger = Ledger()
    await deliver(Guest(OUTPUT[:20_000], sizes=sizes), ledger)
    assert ledger.text == masked(OUTPUT[:20_000])
    again = len(ledger.told)
    await deliver(Guest(OUTPUT[:20_000], sizes=sizes + 1), ledger)
    assert len(ledger.told) == again


@pytest.mark.parametrize("died_at", [0, 5, 11, 20, 21, 22, 4096, 9_999])
async def test_another_replica_goes_on_where_the_first_one_died(died_at: int) -> None:
    ledger = Ledger()
    first = Redactor([SECRET]).stream()
    content = first.feed(OUTPUT[:died_at])
    ledger.upto = {"stdout": first.passed}
    ledger.told = [(0, content.decode())]
    await deliver(Guest(OUTPUT[:20_000]), ledger)
    assert ledger.text == masked(OUTPUT[:20_000])


async def test_two_who_tell_at_once_tell_every_byte_once() -> None:
    ledger = Ledger()
    ledger.others = [OUTPUT.index(f"line {number} ".encode()) for number in (5, 60, 300)]
    await deliver(Guest(OUTPUT[:20_000]), ledger)
    assert ledger.others == []
    assert ledger.text == masked(OUTPUT[:20_000])


async def test_about_the_first_64_kib_are_told() -> None:
    ledger = Ledger()
    await deliver(Guest(OUTPUT * 3), ledger)
    assert delivery.TOLD_BYTES <= ledger.upto["stdout"] < delivery.TOLD_BYTES + delivery.CHUNK_BYTES


async def test_last_words_are_found_by_who_has_nothing_left_to_tell() -> None:
    ledger = Ledger()
    await deliver(Guest(OUTPUT[:2000] + b"the end"), ledger)
    with pytest.raises(StartupFailed) as failure:
        await deliver(Guest(OUTPUT[:2000] + b"the end", exit_code=3), ledger)
    assert "exit status 3" in failure.value.message
    assert failure.value.message.endswith("the end")
    assert SECRET not in failure.value.message


async def test_what_is_told_no_more_is_not_looked_through_either(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    feed = RedactedStream.feed

    def counted(stream: RedactedStream, piece: bytes) -> bytes:
        fed.append(len(piece))
        return feed(stream, piece)

    monkeypatch.setattr(RedactedStream, "feed", counted)
    with pytest.raises(StartupFailed) as failure:
        await deliver(Guest(OUTPUT * 100, exit_code=1, sizes=100_000), Ledger())
    assert failure.value.message.endswith("line 1999 ***")
    assert max(fed) <= 16 << 10
    assert sum(fed) < 3 * delivery.TOLD_BYTES


async def test_others_go_on_while_output_is_looked_through() -> None:
    ledger, turns, ended = Ledger(), 0, False

    async def others() -> None:
        nonlocal turns
        while not ended:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await deliver(Guest(OUTPUT[:60_000], sizes=60_000), ledger)
    ended = True
    await task
    assert turns >= 60_000 // delivery.CHUNK_BYTES


async def test_last_words_begin_with_a_whole_line() -> None:
    """What comes before may have been the beginning of a secret."""
    output = b"x" * 20_000 + f"{SECRET}\nthat was {SECRET}\n".encode()
    with pytest.raises(StartupFailed) as failure:
        await deliver(Guest(output, exit_code=1), Ledger())
    assert failure.value.message.endswith("exit status 1: that was ***")


async def test_a_script_whose_environment_has_ended_is_heard_to_its_end() -> None:
    class Ended(Ledger):
        async def tell(self, stream: str, offset: int, end: int, text: str) -> int:
            return self.upto.get(stream, 0)

    await deliver(Guest(OUTPUT), Ended())


async def test_output_whose_beginning_is_lost_is_told_from_the_next_line_on() -> None:
    ledger = Ledger()
    await deliver(Guest(OUTPUT[:20_000], offset=15), ledger)
    assert ledger.text == masked(OUTPUT[22:20_000])

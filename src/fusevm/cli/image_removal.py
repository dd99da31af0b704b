"""`fuse image rm` and `fuse image gc`: through the host daemon of this machine, or without one by its journal."""

from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from fusevm.cli.local_host import ask
from fusevm.cli.options import State, output_options
from fusevm.cli.output import format_bytes, print_json, say
from fusevm.cli.places import Places, data_option, find_places

if TYPE_CHECKING:
    from fusevm.host.images.collect import Collector

#: One image that was removed: digest, names, freed bytes.
_Removed = dict[str, Any]


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="All its names, and the image.")
@data_option
@output_options
def rm(*, state: State, names: tuple[str, ...], force: bool, data: str | None) -> None:
    """Remove images by name or digest. One with other names loses only this one. What a machine needs stays."""
    places = find_places(data, state.environ)
    removed = [_remove(places, name, force=force) for name in names]
    _report(state, removed)


@click.command()
@click.option("--all", "is_all", is_flag=True, help="Also images that have a name.")
@data_option
@output_options
def gc(*, state: State, is_all: bool, data: str | None) -> None:
    """Remove images that no machine needs, nobody names, and nobody has used within ten minutes."""
    places = find_places(data, state.environ)

    async def collect(collector: "Collector") -> list[_Removed]:
        return [_plain(one) for one in await collector.collect(is_all=is_all)]

    with suppress(OSError):
        _report(state, ask(_socket(places), "POST", "/images/collect", {"all": is_all})["removed"])
        return
    _report(state, _by_journal(places, collect))


def _remove(places: Places, name: str, *, force: bool) -> _Removed:
    async def remove(collector: "Collector") -> list[_Removed]:
        return [_plain(await collector.remove(name, is_forced=force))]

    with suppress(OSError):
        removed: _Removed = ask(_socket(places), "DELETE", f"/images/{quote(name)}?force={str(force).lower()}")
        return removed
    return _by_journal(places, remove)[0]


def _socket(places: Places) -> Path:
    from fusevm.host.config import HostConfig  # noqa: PLC0415 - only some commands need it

    return HostConfig(data_root=places.host).api_socket


def _by_journal(places: Places, work: Callable[["Collector"], Coroutine[Any, Any, list[_Removed]]]) -> list[_Removed]:
    """Do it ourselves while no daemon runs: what machines need is in its journal, which is ours meanwhile."""
    from fusevm.cli.building import carry_out  # noqa: PLC0415 - only without a daemon
    from fusevm.host.clock import SystemClock  # noqa: PLC0415 - as above
    from fusevm.host.faults import make_fault  # noqa: PLC0415 - as above
    from fusevm.host.images.collect import Collector, Watermarks, users_in_journal  # noqa: PLC0415 - as above
    from fusevm.host.images.store import ImageStore  # noqa: PLC0415 - as above
    from fusevm.host.journal import Journal  # noqa: PLC0415 - as above

    store, marks = ImageStore(places.data), Watermarks(high=100, low=100)

    async def nobody() -> dict[str, list[str]]:
        return {}

    async def carry() -> list[_Removed]:
        if not (places.host / "journal.db").exists():
            return await work(Collector(store, nobody, marks))
        journal = await Journal.open(places.host, make_fault(""), SystemClock().now_ms)
        try:
            return await work(Collector(store, lambda: users_in_journal(journal), marks))
        finally:
            await journal.close()

    return carry_out(carry())


def _plain(removed: Any) -> _Removed:
    return {"digest": removed.digest, "names": list(removed.names), "freed_bytes": removed.bytes}


def _report(state: State, removed: list[_Removed]) -> None:
    if state.is_json:
        print_json(removed)
        return
    for one in removed:
        print(", ".join(one["names"]) or one["digest"])
    freed = sum(one["freed_bytes"] for one in removed)
    say(f"{format_bytes(freed)} freed" if removed else "nothing to remove")

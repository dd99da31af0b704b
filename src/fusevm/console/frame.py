"""What every page has: the bar at the top, the banner about the control plane, how errors are shown, how a page lives.

Text from the API goes into labels and table cells only, which show it as text. Nothing here or in the pages makes HTML
out of it.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Self, TypeVar

import msgspec
from fastapi import Request
from nicegui import Client, ui

from fusevm.console import theme
from fusevm.console.feed import Board, Feed
from fusevm.console.render import render_problem
from fusevm.model.errors import Error
from fusevm.sdk import AsyncFuse

T = TypeVar("T")
NAVIGATION = (("Environments", "/"), ("Hosts", "/hosts"))
#: A browser that opened a page and never comes back for its events.
CONNECT_S = 60.0


class Console(msgspec.Struct, frozen=True, kw_only=True):
    """What the pages work with."""

    fuse: AsyncFuse
    feed: Feed
    #: Of the control plane, for people.
    url: str


class Frame:
    """Bar and banner of one page in one tab. The page's own content is made within it (`with frame.content`)."""

    def __init__(self, console: Console, request: Request, title: str, active: str) -> None:
        self._console = console
        ui.page_title(f"{title} · Fuse")
        with ui.element("header").classes("fuse-bar"), ui.element("div").classes("fuse-width"):
            ui.link("Fuse", "/").classes("fuse-name")
            with ui.element("nav"):
                for name, path in NAVIGATION:
                    link = ui.link(name, path).classes("fuse-nav")
                    if path == active:
                        link.classes("active")
            ui.element("div").classes("fuse-space")
            self._light = ui.element("span").classes("fuse-light unknown")
            ui.label(console.url).classes("fuse-url")
            _theme_button(theme.parse_theme(request.cookies.get(theme.COOKIE, "")))
        self._banner = ui.element("div").classes("fuse-banner").props("role=alert")
        with self._banner, ui.element("div").classes("fuse-width"):
            ui.icon("cloud_off")
            self._problem = ui.label()
        self._banner.set_visibility(False)
        self.content = ui.element("main").classes("fuse-width fuse-main")
        ui.on_exception(_tell_of_bug)

    def show(self, board: Board) -> None:
        """Say how the control plane is doing."""
        state = "bad" if board.problem else "good" if board.is_known else "unknown"
        self._light.classes(state, remove="good bad unknown")
        if board.problem is not None:
            self._problem.text = f"{render_problem(board.problem)} Trying again."
        self._banner.set_visibility(board.problem is not None)

    async def follow(self, show: Callable[[Board], Awaitable[None]]) -> None:
        """Show the board and each newer one, until the tab is closed."""
        seen: Board | None = None
        with self._console.feed.watched():
            while True:
                seen = await self._console.feed.after(seen)
                self.show(seen)
                await show(seen)


@contextlib.contextmanager
def framed(console: Console, request: Request, title: str, active: str) -> Iterator[Frame]:
    """A frame; what is made within the block is its content."""
    frame = Frame(console, request, title, active)
    with frame.content:
        yield frame


class Living:
    """Ends a page's task with its tab. Use as an async context manager around what the page does after it is shown."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - page functions run in tasks
        self._client.on_delete(lambda: _cancel(task))
        await self._client.connected(timeout=CONNECT_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        return


def _cancel(task: "asyncio.Task[object]") -> None:
    task.cancel()


async def attempt(work: Awaitable[T], tell: Callable[[str], None] | None = None) -> T | None:
    """Do something against the API. An error is shown as its sentence, and None returned."""
    try:
        return await work
    except Error as error:
        (tell or notify_problem)(render_problem(error))
        return None


def notify_problem(sentence: str) -> None:
    """Show an error's sentence until it is closed."""
    ui.notify(sentence, type="negative", position="bottom", timeout=0, close_button="Close", multi_line=True)


def _tell_of_bug() -> None:
    notify_problem("Something in the console itself failed; its terminal shows the details.")


def _theme_button(chosen: theme.Theme) -> None:
    dark = ui.dark_mode(theme.IS_DARK[chosen])
    now = chosen

    def turn() -> None:
        nonlocal now
        now = theme.NEXT[now]
        dark.set_value(theme.IS_DARK[now])
        button.props(f"icon={theme.ICONS[now]}")
        hint.text = f"Theme: {now}"
        ui.run_javascript(theme.keep_script(now))

    with ui.button(icon=theme.ICONS[now], on_click=turn, color=None).props(
        "flat round dense aria-label=Theme"
    ) as button:
        hint = ui.tooltip(f"Theme: {now}")

"""`/environments/{id}`: one environment, live or ended: its record, its story, its console, and commands in it."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator

from fastapi import Request
from nicegui import Client, ui

from fusevm.console.commands import CommandBox
from fusevm.console.dialogs import DestroyDialog
from fusevm.console.feed import RETRY_S, Board
from fusevm.console.frame import Console, Frame, Living, framed
from fusevm.console.render import Tail, render_event, render_problem
from fusevm.model.environment import TERMINAL, State
from fusevm.model.errors import EnvironmentEnded, Error, NotFound, NotSupported
from fusevm.sdk.core import first_event_id
from fusevm.sdk.words import happening, record
from fusevm.wire.rest import EnvironmentBody, EventBody

EVENTS_SHOWN = 500
#: Between two updates of the log in the browser, however much a machine writes.
LOG_PAUSE_S = 0.5
_WITH_COMMANDS = (State.RUNNING, State.DRAINING)


def add_environment_page(console: Console) -> None:
    """Register the page."""

    @ui.page("/environments/{env_id}")
    async def environment(client: Client, request: Request, env_id: str, uid: str = "") -> None:
        with framed(console, request, "Environment", "/") as frame:
            view = View(console, frame, env_id)
        async with Living(client), asyncio.TaskGroup() as group:
            group.create_task(frame.follow(_nothing_more))
            group.create_task(view.live(uid))


async def _nothing_more(_: Board) -> None:
    """The banner is all that this page takes from the board."""


class View:
    """The page of one environment in one tab."""

    def __init__(self, console: Console, frame: Frame, env_id: str) -> None:
        self._console = console
        self._env_id = env_id
        self._content = frame.content
        self._one: EnvironmentBody | None = None
        self._destroy = DestroyDialog(console)
        with ui.element("div").classes("fuse-head"):
            ui.label(env_id).classes("fuse-title").props("role=heading aria-level=1")
            self._state = ui.label().classes("fuse-state")
            ui.element("div").classes("fuse-space")
            self._destroy_button = ui.button("Destroy", on_click=lambda: self._destroy.ask(env_id), color=None)
            self._destroy_button.props("outline no-caps").classes("fuse-danger")
        self._problem = ui.label().classes("fuse-problem").props("role=alert")
        self._body = ui.element("div").classes("fuse-columns")
        with self._body:
            with ui.element("div").classes("fuse-column"):
                with _card("Record"):
                    self._record = ui.element("dl").classes("fuse-record")
                with _card("What happened"):
                    self._story = ui.element("ol").classes("fuse-story")
            with ui.element("div").classes("fuse-column"):
                self._commands = CommandBox(console, env_id)
                with _card("Console"), ui.element("div").classes("fuse-log"):
                    self._log = ui.label("Nothing was written yet.").classes("fuse-text")
                with _card("Events"), ui.element("div").classes("fuse-log"):
                    self._events = ui.label().classes("fuse-text")
        self._lines: deque[str] = deque(maxlen=EVENTS_SHOWN)
        self._tail = Tail()
        self._written = asyncio.Event()
        self._tell(None)
        self._body.set_visibility(False)
        self._destroy_button.set_visibility(False)

    # -- what goes on ----------------------------------------------------------------------------------------------

    async def live(self, uid: str) -> None:
        """Find the environment, then follow its events and its console until it has ended."""
        one = await self._find(uid)
        if one is None:
            return
        self._show(one)
        self._body.set_visibility(True)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_events(one))
            group.create_task(self._follow_log())
            group.create_task(self._paint_log())

    async def _find(self, uid: str) -> EnvironmentBody | None:
        """The environment of the address; of an id that is over, its last one. None when there is none."""
        get = self._console.fuse.environments.get
        while True:
            try:
                return await get(self._env_id, uid=uid)
            except EnvironmentEnded as error:
                uid = error.uid
            except NotFound as error:
                self._tell(error)
                return None
            except Error as error:
                self._tell(error)
                await asyncio.sleep(RETRY_S)

    async def _follow_events(self, one: EnvironmentBody) -> None:
        """The whole story, then what comes. The stream ends after the last event, or when it breaks."""
        last = first_event_id(one.uid)
        environments = self._console.fuse.environments
        while True:
            try:
                async for event in environments.events(one.id, uid=one.uid, last_event_id=last):
                    if event.id:
                        last = event.id
                        self._add(event)
                    self._show(await environments.get(one.id, uid=one.uid))
                    self._tell(None)
                if self._is_over:
                    return
            except NotFound as error:
                self._tell(error)
                return
            except Error as error:
                self._tell(error)
            await asyncio.sleep(RETRY_S)

    async def _follow_log(self) -> None:
        """The end of the console, from its oldest byte again whenever the stream broke."""
        while True:
            try:
                self._tail = Tail()
                async for chunk in self._console.fuse.environments.logs(self._env_id, follow=True):
                    self._tail.add(chunk)
                    self._written.set()
            except Error as error:
                self._log.text = render_problem(error)
                if isinstance(error, NotFound | NotSupported):
                    return
            if self._is_over:
                return
            await asyncio.sleep(RETRY_S)

    async def _paint_log(self) -> None:
        while True:
            await self._written.wait()
            self._written.clear()
            self._log.text = self._tail.text
            await asyncio.sleep(LOG_PAUSE_S)

    # -- what is shown ---------------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return self._one is not None and self._one.state in TERMINAL

    def _show(self, one: EnvironmentBody) -> None:
        if one == self._one:
            return
        self._one = one
        self._state.text = one.state
        self._state.props["data-state"] = one.state
        self._state.update()
        self._destroy_button.set_visibility(one.state not in TERMINAL and one.state != State.DESTROYING)
        self._commands.set_usable(one.state in _WITH_COMMANDS)
        self._record.clear()
        with self._record:
            for name, value in record(one):
                if value:
                    _text("dt", name)
                    _text("dd", value)

    def _add(self, event: EventBody) -> None:
        self._lines.append(render_event(event))
        self._events.text = "\n".join(self._lines)
        with self._story, ui.element("li"):
            _text("time", event.updated_at)
            _text("span", happening(event))
        for old in list(self._story)[:-EVENTS_SHOWN]:
            old.delete()

    def _tell(self, error: Error | None) -> None:
        self._problem.text = render_problem(error) if error is not None else ""
        self._problem.set_visibility(error is not None)


@contextlib.contextmanager
def _card(title: str) -> Iterator[None]:
    with ui.element("section").classes("fuse-card"):
        ui.label(title).classes("fuse-subtitle")
        yield


def _text(tag: str, text: str) -> None:
    """An element with plain text."""
    with ui.element(tag):
        ui.label(text)

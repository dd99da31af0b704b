"""`/`: the environments, live; making one, destroying one."""

import time
from typing import Any

from fastapi import Request
from nicegui import Client, events, ui

from fusevm.console.dialogs import CreateDialog, DestroyDialog
from fusevm.console.feed import LIMIT, Board
from fusevm.console.frame import Console, Living, attempt, framed
from fusevm.console.render import Row, render_environment
from fusevm.wire.rest import EnvironmentBody

#: Ended environments that are shown, the newest first.
ENDED_LIMIT = 200
ROWS_PER_PAGE = 50
_PAGES = {"rowsPerPage": ROWS_PER_PAGE, "sortBy": "created", "descending": True}
_COLUMNS: list[dict[str, Any]] = [
    {"name": name, "label": label, "field": name, "sortable": name != "actions", "align": align}
    for name, label, align in (
        ("id", "Environment", "left"),
        ("state", "State", "left"),
        ("host", "Host", "left"),
        ("image", "Image", "left"),
        ("cpus", "CPUs", "right"),
        ("ram", "Memory", "right"),
        ("created", "Age", "right"),
        ("actions", "", "right"),
    )
]
# Vue templates; `{{ }}` inserts text as text.
_CELLS = {
    "id": '<a class="fuse-link" :href="props.row.href">{{ props.row.id }}</a>',
    "state": '<span class="fuse-state" :data-state="props.row.state">{{ props.row.state }}</span> '
    '<span class="fuse-quiet fuse-reason">{{ props.row.reason }}</span>',
    "ram": "{{ props.row.ram_text }}",
    "created": '<span :title="props.row.created">{{ props.row.age_text }}</span>',
    "actions": '<q-btn v-if="!props.row.is_ended" flat dense no-caps size="sm" class="fuse-row-action" label="Destroy" '
    "@click=\"() => $parent.$emit('destroy', props.row.id)\" />",
}


def add_environments_page(console: Console) -> None:
    """Register the page."""

    @ui.page("/")
    async def environments(client: Client, request: Request) -> None:
        with framed(console, request, "Environments", "/") as frame:
            listing = Listing(console)
        async with Living(client):
            await frame.follow(listing.show)


class Listing:
    """The table of one tab."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._board = Board()
        create = CreateDialog(console)
        self._destroy = DestroyDialog(console)
        with ui.element("div").classes("fuse-head"):
            ui.label("Environments").classes("fuse-title").props("role=heading aria-level=1")
            self._count = ui.label().classes("fuse-quiet")
            ui.element("div").classes("fuse-space")
            self._with_ended = ui.switch("Show ended", on_change=self._switched).props("dense")
            ui.button("New environment", on_click=create.open).props("unelevated no-caps")
        self._note = ui.label().classes("fuse-note")
        self._note.set_visibility(False)
        self._table = ui.table(columns=_COLUMNS, rows=[], row_key="uid", pagination=_PAGES)
        self._table.classes("fuse-table").props(
            'flat no-data-label="Nothing was read yet" :rows-per-page-options="[50]"'
        )
        for name, template in _CELLS.items():
            self._table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{template}</q-td>')
        self._table.on("destroy", self._asked_to_destroy)

    async def show(self, board: Board) -> None:
        """Show the newest look at the control plane."""
        self._board = board
        if not board.is_known:
            return
        ended = await self._ended() if self._with_ended.value and not board.problem else []
        now_s = time.time()
        rows: list[Row] = [render_environment(one, now_s) for one in (*board.environments, *ended)]
        if rows != self._table.rows:
            self._table.rows = rows
        self._table.props('no-data-label="There is no environment yet. Make one here, or with `fuse env create`."')
        live = len(board.environments)
        self._count.text = f"{live}{'+' if board.is_cut else ''} live" + (f", {len(ended)} ended" if ended else "")
        self._note.text = f"Only the first {LIMIT} are shown; `fuse env list` knows all."
        self._note.set_visibility(board.is_cut)

    async def _ended(self) -> list[EnvironmentBody]:
        page = await attempt(self._console.fuse.environments.page(ended=True, limit=ENDED_LIMIT))
        return page.environments if page is not None else []

    async def _switched(self) -> None:
        await self.show(self._board)

    def _asked_to_destroy(self, event: events.GenericEventArguments) -> None:
        self._destroy.ask(str(event.args))

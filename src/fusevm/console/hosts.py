"""`/hosts`: the hosts, what is reserved on them, and how they are."""

import time
from typing import Any

from fastapi import Request
from nicegui import Client, ui

from fusevm.console.feed import Board
from fusevm.console.frame import Console, Living, framed
from fusevm.console.render import render_host

_COLUMNS: list[dict[str, Any]] = [
    {"name": name, "label": label, "field": name, "sortable": True, "align": align}
    for name, label, align in (
        ("id", "Host", "left"),
        ("health", "Health", "left"),
        ("state", "State", "left"),
        ("driver", "Driver", "left"),
        ("cpus", "CPUs", "left"),
        ("ram", "Memory", "left"),
        ("disk", "Disk", "left"),
        ("machines", "Machines", "right"),
        ("last_seen", "Last seen", "right"),
    )
]
_BADGE = '<span class="fuse-state" :data-state="props.value">{{ props.value }}</span>'
_METER = (
    '<div class="fuse-meter"><q-linear-progress :value="props.value" size="4px" rounded />'
    "<span>{{ props.row[props.col.name + '_text'] }}</span></div>"
)
_CELLS = {
    "health": _BADGE,
    "state": _BADGE,
    "cpus": _METER,
    "ram": _METER,
    "disk": _METER,
    "machines": "{{ props.row.machines_text }}",
    "last_seen": '<span :title="props.row.last_seen">{{ props.row.seen_text }}</span>',
}


def add_hosts_page(console: Console) -> None:
    """Register the page."""

    @ui.page("/hosts")
    async def hosts(client: Client, request: Request) -> None:
        with framed(console, request, "Hosts", "/hosts") as frame:
            with ui.element("div").classes("fuse-head"):
                ui.label("Hosts").classes("fuse-title").props("role=heading aria-level=1")
            table = ui.table(columns=_COLUMNS, rows=[], row_key="id", pagination=50)
            table.classes("fuse-table").props('flat no-data-label="No host was read yet" :rows-per-page-options="[50]"')
            for name, template in _CELLS.items():
                table.add_slot(f"body-cell-{name}", f'<q-td :props="props">{template}</q-td>')

        async def show(board: Board) -> None:
            now_s = time.time()
            rows = [render_host(host, now_s) for host in board.hosts]
            if rows != table.rows:
                table.rows = rows

        async with Living(client):
            await frame.follow(show)

"""The two things that change something, each in a dialog: making an environment, and destroying one."""

from nicegui import ui

from fusevm.console.frame import Console, attempt
from fusevm.console.render import environment_path
from fusevm.sdk.core import CreateFields


class CreateDialog:
    """Asks what to make. What is left empty gets the control plane's default; what it refuses, it says why."""

    def __init__(self, console: Console) -> None:
        self._console = console
        with ui.dialog() as self._dialog, ui.card().classes("fuse-card fuse-dialog"):
            ui.label("New environment").classes("fuse-subtitle")
            self._task_id = ui.input("Task id", placeholder="a random one").props(
                "outlined dense stack-label autofocus"
            )
            self._image = ui.input("Image", placeholder="debian-12").props("outlined dense stack-label")
            with ui.element("div").classes("fuse-pair"):
                self._cpus = ui.number("CPUs", placeholder="1", min=1, precision=0).props("outlined dense stack-label")
                self._ram = ui.number("Memory (MiB)", placeholder="512", min=1, precision=0).props(
                    "outlined dense stack-label"
                )
            self._problem = ui.label().classes("fuse-problem").props("role=alert")
            with ui.element("div").classes("fuse-actions"):
                ui.button("Cancel", on_click=self._dialog.close, color=None).props("flat no-caps")
                self._create = ui.button("Create", on_click=self._submit).props("unelevated no-caps")
            self._task_id.on("keydown.enter", self._submit)
            self._image.on("keydown.enter", self._submit)

    def open(self) -> None:
        """Ask, with an image that some host has as the proposal."""
        images = sorted({image for host in self._console.feed.board.hosts for image in host.images})
        self._image.set_autocomplete(images)
        self._tell("")
        self._dialog.open()

    def _tell(self, problem: str) -> None:
        self._problem.text = problem
        self._problem.set_visibility(bool(problem))

    async def _submit(self) -> None:
        if not self._create.enabled:
            return
        fields: CreateFields = {
            "image": self._image.value.strip(),
            "cpus": int(self._cpus.value or 0),
            "ram_mb": int(self._ram.value or 0),
        }
        self._tell("")
        self._create.disable()
        try:
            made = await attempt(
                self._console.fuse.environments.begin(self._task_id.value.strip(), **fields), self._tell
            )
        finally:
            self._create.enable()
        if made is not None:
            self._console.feed.refresh()
            self._dialog.close()
            ui.navigate.to(environment_path(made))


class DestroyDialog:
    """Asks once more, then destroys."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._env_id = ""
        with ui.dialog() as self._dialog, ui.card().classes("fuse-card fuse-dialog"):
            self._title = ui.label().classes("fuse-subtitle")
            ui.label("The machine stops at once, and everything on its disk is lost.")
            with ui.element("div").classes("fuse-actions"):
                ui.button("Cancel", on_click=self._dialog.close, color=None).props("flat no-caps autofocus")
                ui.button("Destroy", color="negative", on_click=self._submit).props("unelevated no-caps")

    def ask(self, env_id: str) -> None:
        """Ask about one environment."""
        self._env_id = env_id
        self._title.text = f"Destroy {env_id}?"
        self._dialog.open()

    async def _submit(self) -> None:
        self._dialog.close()
        await attempt(self._console.fuse.environments.delete(self._env_id, wait=False))
        self._console.feed.refresh()

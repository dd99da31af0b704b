"""The command box: one command at a time in the machine, by its shell; what it wrote and how it ended."""

from nicegui import ui

from fusevm.console.frame import Console, attempt
from fusevm.console.render import render_output, render_verdict
from fusevm.sdk.core import output_of
from fusevm.wire.rest import ExecAnswer

#: Results that stay on the page, the newest first.
RESULTS = 20


class CommandBox:
    """The card of one tab."""

    def __init__(self, console: Console, env_id: str) -> None:
        self._console = console
        self._env_id = env_id
        self._is_usable = False
        with ui.element("section").classes("fuse-card"):
            ui.label("Command").classes("fuse-subtitle")
            with ui.element("div").classes("fuse-command"):
                self._input = ui.input(placeholder="uname -a").props("outlined dense aria-label=Command")
                self._run = ui.button("Run", on_click=self._submit).props("unelevated no-caps")
            self._problem = ui.label().classes("fuse-problem").props("role=alert")
            self._problem.set_visibility(False)
            self._results = ui.element("div").classes("fuse-results")
        self._input.on("keydown.enter", self._submit)

    def set_usable(self, is_usable: bool) -> None:
        """May commands be run now?"""
        self._is_usable = is_usable
        self._input.set_enabled(is_usable)
        self._run.set_enabled(is_usable)

    def _tell(self, problem: str) -> None:
        self._problem.text = problem
        self._problem.set_visibility(bool(problem))

    async def _submit(self) -> None:
        command = self._input.value.strip()
        if not command or not self._run.enabled:
            return
        self._tell("")
        self._run.disable()
        self._run.props("loading")
        try:
            answer = await attempt(self._console.fuse.environments.exec(self._env_id, shell=command), self._tell)
        finally:
            self._run.props(remove="loading")
            self._run.set_enabled(self._is_usable)
        if answer is not None:
            self._input.value = ""
            self._add(command, answer)

    def _add(self, command: str, answer: ExecAnswer) -> None:
        stdout, stderr = output_of(answer)
        with self._results, ui.element("article").classes("fuse-result") as result:
            with ui.element("div").classes("fuse-head"):
                ui.label(f"$ {command}").classes("fuse-text fuse-typed")
                verdict = ui.label(render_verdict(answer)).classes("fuse-verdict")
                verdict.classes("good" if answer.exit_code == 0 and not answer.timed_out else "bad")
            if stdout:
                ui.label(render_output(stdout, answer.total.stdout)).classes("fuse-text fuse-stdout")
            if stderr:
                ui.label(render_output(stderr, answer.total.stderr)).classes("fuse-text fuse-stderr")
        result.move(target_index=0)
        for old in list(self._results)[RESULTS:]:
            old.delete()

"""docs/states.md is what the transition tables say."""

from pathlib import Path

from fusevm.core.diagram import render_states
from fusevm.model import environment, machine

PAGE = Path(__file__).resolve().parents[2] / "docs/states.md"


def test_the_page_equals_the_tables():
    assert PAGE.read_text() == render_states(), "run `python tests/docs/test_states_diagram.py`"


def test_every_transition_is_drawn():
    page = render_states()
    for table in (environment.ALLOWED, machine.ALLOWED):
        for state, following in table.items():
            assert f"| `{state}` | " in page
            for target in following:
                assert f"    {state} --> {target}\n" in page


if __name__ == "__main__":
    PAGE.write_text(render_states())

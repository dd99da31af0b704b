"""docs/states.md is what the transition tables say."""

from pathlib import Path

from fusevm.core.diagram import render_states

PAGE = Path(__file__).resolve().parents[2] / "docs/states.md"


def test_the_page_equals_the_tables():
    assert PAGE.read_text() == render_states(), "run `python tests/docs/test_states_diagram.py`"


if __name__ == "__main__":
    PAGE.write_text(render_states())

"""The page of states draws what the tables say."""

from fusevm.core.diagram import render_states
from fusevm.model import environment, machine, snapshot


def test_every_state_is_explained_and_every_transition_is_drawn_once():
    page = render_states()
    drawn = [line for line in page.splitlines() if "-->" in line]
    expected = ["    [*] --> provisioning", "    [*] --> creating", "    [*] --> creating"]
    for table in (environment.ALLOWED, machine.ALLOWED, snapshot.ALLOWED):
        for state, following in table.items():
            assert f"| `{state}` | " in page
            expected += [f"    {state} --> {target}" for target in following or ["[*]"]]
    assert sorted(drawn) == sorted(expected)


def test_the_page_has_three_diagrams():
    assert render_states().count("```mermaid\nstateDiagram-v2\n") == 3

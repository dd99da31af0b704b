"""Secrets are compared in constant time, by construction: where credentials are handled, `==` never sees one."""

import ast
import inspect
from types import ModuleType

import pytest

from fusevm.control import gate, keys, session

SECRET = {"token", "text", "digest", "secret", "auth_token", "_master", "bound_to", "_bound_to", "value"}


def _names(node: ast.expr) -> set[str]:
    """Variables and attributes in an expression, those that are only handed to a function left out."""
    match node:
        case ast.Name():
            return {node.id}
        case ast.Attribute():
            return {node.attr}
        case ast.Call():
            return set()
        case _:
            return {
                name for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) for name in _names(child)
            }


def _naive_comparisons(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(isinstance(op, ast.Eq | ast.NotEq | ast.In) for op in node.ops):
            names = {name for side in (node.left, *node.comparators) for name in _names(side)}
            found += [ast.unparse(node)] if names & SECRET else []
    return found


@pytest.mark.parametrize("module", [gate, keys, session], ids=lambda module: module.__name__)
def test_no_credential_is_compared_by_its_first_difference(module: ModuleType) -> None:
    source = inspect.getsource(module)
    assert _naive_comparisons(source) == []
    assert "hmac.compare_digest(" in source


def test_the_check_sees_a_naive_comparison() -> None:
    assert _naive_comparisons("if token == self._master: pass") == ["token == self._master"]
    assert _naive_comparisons("if key.digest != x: pass") == ["key.digest != x"]
    assert _naive_comparisons("if len(token) == 3 or key.id == id: pass") == []

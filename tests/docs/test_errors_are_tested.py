"""Every class of the error tree has a test that `tests/errors.toml` names, and is in docs/errors.md. That the test
really makes the product raise it is looked at whenever it runs (`tests/raised.py`).
"""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from fusevm.model.errors import Error, error_classes

ROOT = Path(__file__).resolve().parents[2]
NAMED: dict[str, str] = tomllib.loads((ROOT / "tests/errors.toml").read_text())
#: The SDK has a few of its own that never cross a wire.
CLASSES = [cls for cls in error_classes() if cls.__module__.startswith("fusevm.model.errors")]


def test_every_reason_is_there_and_no_other() -> None:
    assert set(NAMED) == {cls.reason for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.reason)
def test_the_named_test_exists_and_is_about_this_error(cls: type[Error]) -> None:
    path, _, function = NAMED.get(cls.reason, "").partition("::")
    text = _tests_of(path).get(function)
    assert text is not None, f"tests/errors.toml: {cls.reason}: there is no {path}::{function}"
    assert _speaks_of(text, cls), f"tests/errors.toml: {cls.reason}: {function} names neither the class nor the reason"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.reason)
def test_every_reason_is_documented(cls: type[Error]) -> None:
    assert f"`{cls.reason}`" in (ROOT / "docs/errors.md").read_text()


def test_a_test_that_only_mentions_a_longer_name_is_not_about_it() -> None:
    (cls,) = (cls for cls in CLASSES if cls.reason == "timeout")
    assert _speaks_of('assert reason == "timeout"', cls)
    assert _speaks_of("with pytest.raises(Timeout):", cls)
    assert not _speaks_of("with pytest.raises(TimeoutError):", cls)
    assert not _speaks_of('assert reason == "boot_timeout"', cls)


def _speaks_of(text: str, cls: type[Error]) -> bool:
    return re.search(rf'\b{cls.__name__}\b|"{cls.reason}"', text) is not None


@cache
def _tests_of(path: str) -> dict[str, str]:
    """Name to source of the tests of a file, decorators included."""
    file = ROOT / path
    if not path or not file.is_file():
        return {}
    lines = file.read_text().splitlines()
    found = {}
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found

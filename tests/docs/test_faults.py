"""Every known fault of the systems that Fuse replaces, and every trap of Firecracker, has a test or a reason."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = tomllib.loads((ROOT / "tests/faults.toml").read_text())
#: How many there are. The lists: the contract's faults, those of its access, its scale and its security, those of
#: computer-host, the traps of Firecracker (in order).
COUNTS = {"fuse": 36, "fuse-access": 8, "fuse-scale": 10, "fuse-security": 11, "computer-host": 40, "firecracker": 17}


def test_every_list_is_counted():
    assert set(FAULTS) == set(COUNTS)


@pytest.mark.parametrize("source", COUNTS)
def test_every_number_is_there(source: str):
    assert set(FAULTS[source]) == {str(number) for number in range(1, COUNTS[source] + 1)}


@pytest.mark.parametrize("source", COUNTS)
def test_every_fault_names_a_test_or_a_reason(source: str):
    for number, entry in FAULTS[source].items():
        assert entry["fault"], f"{source} {number}"
        assert ("test" in entry) != ("not_applicable" in entry), f"{source} {number}: one of test, not_applicable"
        assert entry.get("not_applicable", "because") != "", f"{source} {number}"


def test_every_named_test_exists():
    missing = []
    for source in COUNTS:
        for number, entry in FAULTS[source].items():
            names = entry.get("test", [])
            for name in [names] if isinstance(names, str) else names:
                path, _, function = name.partition("::")
                if not _defines(ROOT / path, function):
                    missing.append(f"{source} {number}: {name}")
    assert not missing


def _defines(path: Path, function: str) -> bool:
    if not path.exists():
        return False
    if path.suffix == ".go":
        return f"func {function}(" in path.read_text()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return function in {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)}

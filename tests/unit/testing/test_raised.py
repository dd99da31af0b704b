"""The check of tests/errors.toml against what tests make happen can fail, and is silent about parts of a test."""

import sys
from types import FrameType, ModuleType
from typing import NamedTuple

import pytest

from fusevm.core.policy import Policy
from fusevm.core.spec import complete
from fusevm.model.errors import BadField, BadPath, Error
from fusevm.wire.errors import parse_error, render_envelope
from raised import Record


class Case(NamedTuple):
    nodeid: str


ONE, TWO = Case("a.py::test[1]"), Case("a.py::test[2]")


def frame_in(name: str) -> FrameType:
    """Of a function of a module that is called so."""
    module = ModuleType(name)
    exec("import sys\ndef here(): return sys._getframe()", module.__dict__)
    return module.here()


@pytest.fixture
def record() -> Record:
    found = Record({"bad_path": "a.py::test"})
    found.expect([ONE, TWO])
    found.begin(ONE)
    return found


@pytest.mark.parametrize(
    ("module", "missing"),
    [("fusevm.host.api", set()), ("fusevm.testing.fake_host", {"bad_path"}), ("test_x", {"bad_path"})],
)
def test_only_what_the_product_makes_counts(record: Record, module: str, missing: set[str]) -> None:
    record.note(BadPath(path="x"), frame_in(module))
    assert record.missing(ONE, has_passed=True) == set(), "the other case may still do it"
    assert record.missing(TWO, has_passed=True) == missing


def test_another_error_does_not_count_nor_does_another_test(record: Record) -> None:
    record.note(BadField(field="x", problem="y"), frame_in("fusevm.host.api"))
    record.begin(Case("a.py::other"))
    record.note(BadPath(path="x"), frame_in("fusevm.host.api"))
    record.missing(ONE, has_passed=True)
    assert record.missing(TWO, has_passed=True) == {"bad_path"}


def test_a_part_of_a_test_is_not_judged(record: Record) -> None:
    record.deselected([TWO])
    assert record.missing(ONE, has_passed=True) == set()


def test_a_test_that_failed_is_not_judged(record: Record) -> None:
    assert record.missing(ONE, has_passed=False) == set()
    assert record.missing(TWO, has_passed=True) == set()


def test_every_error_of_this_process_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[str, str]] = []

    def note(_: Record, error: Error, by: FrameType | None) -> None:
        assert by is not None
        noted.append((error.reason, str(by.f_globals["__name__"])))

    monkeypatch.setattr(sys.modules["raised"].Record, "note", note)
    with pytest.raises(BadField):
        complete(Policy(), cpus=-1)
    made = BadPath(path="x")
    parse_error(400, render_envelope(made))
    assert ("bad_field", "fusevm.core.spec") in noted
    assert ("bad_path", "fusevm.wire.errors") in noted, "it is rendered"
    assert ("bad_path", "fusevm.model.errors.base") in noted, "it is read from an answer"

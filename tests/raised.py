"""Holds tests/errors.toml to what really happens: while a test runs that the file names for an error, the product must
make that error, or render it into an answer. What a test, a fake or a probe of ours makes by itself does not count.

A test is judged when its last case is over and all its cases have passed; one of which only some cases were asked for
is not judged, so that any selection of tests can be run.
"""

import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from fusevm.model.errors import Error, error_classes

ROOT = Path(__file__).resolve().parents[1]
#: Where an error is built and read, whoever asks for it.
_BUILT_IN = "fusevm.model.errors"


class Record:
    """Which reasons were seen during which test. A test is `path::function`, all its cases together."""

    def __init__(self, named: dict[str, str]) -> None:
        self._wanted: defaultdict[str, set[str]] = defaultdict(set)
        for reason, test in named.items():
            self._wanted[test].add(reason)
        self._seen: defaultdict[str, set[str]] = defaultdict(set)
        self._left: Counter[str] = Counter()
        self._current = ""

    def expect(self, items: list[pytest.Item]) -> None:
        """These cases will be run, and they are all that their tests have."""
        self._left.update(_test_of(item) for item in items if not _runs_elsewhere(item))

    def deselected(self, items: list[pytest.Item]) -> None:
        """These will not, after all."""
        for item in items:
            self._left.pop(_test_of(item), None)

    def begin(self, item: pytest.Item) -> None:
        self._current = _test_of(item)

    def note(self, error: Error, by: FrameType | None) -> None:
        """An error was made or rendered; `by` is who did so."""
        while by is not None and str(by.f_globals.get("__name__", "")).startswith(_BUILT_IN):
            by = by.f_back
        name = str(by.f_globals.get("__name__", "")) if by is not None else ""
        if name.startswith("fusevm.") and not name.startswith("fusevm.testing."):
            self._seen[self._current].add(error.reason)

    def missing(self, item: pytest.Item, *, has_passed: bool) -> set[str]:
        """A case is over. After the last one: the reasons that its test was to produce and did not."""
        test = _test_of(item)
        if test not in self._wanted or test not in self._left:
            return set()
        if not has_passed:
            del self._left[test]
            return set()
        self._left[test] -= 1
        return self._wanted[test] - self._seen[test] if self._left[test] == 0 else set()


def _runs_elsewhere(item: pytest.Item) -> bool:
    """In a pytest of its own (`namespaces.private_network`), which judges it."""
    return getattr(getattr(item, "obj", None), "runs_in_another_pytest", False)


def _test_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def watch(record: Record) -> None:
    """Tell the record of every error of this process, from now on."""
    details = Error.details

    def noted_new(cls: type[Error], *_: Any, **__: Any) -> Error:
        error: Error = Exception.__new__(cls)
        record.note(error, sys._getframe(1))
        return error

    def noted_details(error: Error) -> dict[str, str]:
        record.note(error, sys._getframe(1))
        return details.__get__(error)

    Error.__new__ = noted_new  # type: ignore[assignment,method-assign]
    Error.details = property(noted_details)  # type: ignore[assignment,method-assign]


def named_tests() -> dict[str, str]:
    """Reason to `path::function`."""
    return tomllib.loads((ROOT / "tests/errors.toml").read_text())


# -- hooks of pytest, taken over by conftest -------------------------------------------------------------------------

_record = Record(named_tests())


def pytest_configure(config: pytest.Config) -> None:
    del config
    watch(_record)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A single case by its name: there may be others.
    if not any("[" in argument for argument in config.args):
        _record.expect(items)


def pytest_deselected(items: list[pytest.Item]) -> None:
    _record.deselected(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _record.begin(item)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call" or report.outcome != "passed":
        missing = _record.missing(item, has_passed=report.outcome == "passed")
        if missing:
            report.outcome = "failed"
            names = sorted(cls.__name__ for cls in error_classes() if cls.reason in missing)
            report.longrepr = (
                f"tests/errors.toml names {_test_of(item)} for {', '.join(sorted(missing))}, but while it ran, nothing "
                f"of the product made or rendered {' or '.join(names)}"
            )
    return report

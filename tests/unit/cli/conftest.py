"""The commands run in this process against the fake API of the client's tests."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "sdk")]

import fake_api  # noqa: E402 - found by the line above
from cli_outcome import Fuse, Outcome  # noqa: E402 - found by the line above

from fusevm.cli import main  # noqa: E402 - found by the line above


@pytest.fixture(scope="session")
def cli_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake_api.FakeApi]:
    with fake_api.running(tmp_path_factory.mktemp("disk")) as server:
        yield server


@pytest.fixture
def api(cli_api: fake_api.FakeApi, tmp_path_factory: pytest.TempPathFactory) -> fake_api.FakeApi:
    cli_api.reset(tmp_path_factory.mktemp("machine"))
    return cli_api


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No settings and no context of whoever runs the tests."""
    for name in ("FUSE_BASE_URL", "FUSE_TOKEN", "FUSE_CA_FILE", "FUSE_CONFIG", "FUSE_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return monkeypatch


@pytest.fixture
def fuse(api: fake_api.FakeApi, environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Fuse:
    """Run one command line against the fake."""
    environ.setenv("FUSE_BASE_URL", api.url)
    environ.setenv("FUSE_TOKEN", api.token)

    def run(*arguments: str) -> Outcome:
        capfd.readouterr()
        code = main.run(arguments)
        return Outcome(code, *capfd.readouterr())

    return run

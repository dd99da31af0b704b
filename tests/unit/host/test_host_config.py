"""Settings are checked before anything is touched."""

from pathlib import Path

import msgspec
import pytest

from fusevm.host.__main__ import make_config, make_parser
from fusevm.host.config import HostConfig, parse_listen
from fusevm.host.faults import POINTS, KillAt, NoFault, make_fault
from fusevm.host.main import serve
from fusevm.model.errors import BadSetting, Error, PathTooLong

GOOD = HostConfig(data_root=Path("/var/lib/fuse"), run_dir=Path("/run/fuse"))


def test_the_defaults_are_good():
    GOOD.check()
    assert GOOD.api_socket == Path("/var/lib/fuse/firecracker-host.sock")
    assert GOOD.artefacts == GOOD.data_root


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"data_root": Path("here")}, "data_root"),
        ({"data_root": Path()}, "data_root"),
        ({"listen": "nowhere"}, "listen"),
        ({"listen": "127.0.0.1:99999"}, "listen"),
        ({"listen": "127.0.0.1:x"}, "listen"),
        ({"listen": "0.0.0.0:8090", "plain_http": True}, "plain_http"),
        ({"listen": ":8090", "plain_http": True}, "plain_http"),
        ({"console_bytes": 1}, "console_bytes"),
        ({"max_machines": 0}, "max_machines"),
        ({"uid_base": 0}, "uid_base"),
        ({"cpu_ratio": 0.0}, "cpu_ratio"),
        ({"sweep_interval_s": 0.0}, "sweep_interval_s"),
    ],
)
def test_what_cannot_work_is_named(change: dict, setting: str):
    with pytest.raises(BadSetting, match=setting):
        msgspec.structs.replace(GOOD, **change).check()


@pytest.mark.parametrize("change", [{"socket_path": Path("/" + "x" * 120)}, {"run_dir": Path("/" + "x" * 40)}])
def test_paths_that_no_socket_can_have_are_refused(change: dict):
    with pytest.raises(PathTooLong):
        msgspec.structs.replace(GOOD, **change).check()


def test_addresses():
    assert parse_listen("") is None
    for text, host, is_loopback in (
        ("127.0.0.1:1", "127.0.0.1", True),
        ("[::1]:1", "::1", True),
        ("localhost:1", "localhost", True),
        ("10.0.0.1:1", "10.0.0.1", False),
        (":1", "0.0.0.0", False),
        ("example.org:1", "example.org", False),
    ):
        listen = parse_listen(text)
        assert listen is not None
        assert (listen.host, listen.is_loopback) == (host, is_loopback)


def test_the_command_line_makes_a_configuration(monkeypatch):
    monkeypatch.setenv("FUSE_FAULT", "create.intent")
    config = make_config(
        make_parser().parse_args(["--data-root", "/d", "--listen", "", "--plain-http", "--warm-slots", "0"])
    )
    assert (config.data_root, config.listen, config.plain_http, config.warm_slots) == (Path("/d"), "", True, 0)
    assert config.fault == "create.intent"
    assert config.driver == "auto"


def test_crash_points_are_known_by_name():
    assert isinstance(make_fault(""), NoFault)
    assert isinstance(make_fault("create.intent"), KillAt)
    with pytest.raises(BadSetting, match="FUSE_FAULT"):
        make_fault("nowhere")
    # A commit that is being written is followed by one that is written.
    assert {point.removesuffix(".writing") for point in POINTS} <= POINTS


def test_a_daemon_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr("fusevm.host.main.configure_logging", lambda: None)
    with pytest.raises(BadSetting, match="'bad' is not host:port"):
        serve(msgspec.structs.replace(GOOD, listen="bad"))


def test_every_error_of_the_daemon_is_an_error_of_the_tree():
    assert issubclass(BadSetting, Error)

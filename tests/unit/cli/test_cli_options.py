"""Small parts of the command line: durations, sizes, places, connections, plain output."""

import json
from pathlib import Path

import click
import pytest

from fusevm.cli.connection import Context, context_path, load_context, remove_context, resolve, save_private
from fusevm.cli.cp import parse_place
from fusevm.cli.ephemeral import free_range
from fusevm.cli.failures import CliError
from fusevm.cli.options import Duration, Size, environment_id, variables
from fusevm.cli.output import format_bytes
from fusevm.cli.places import find_places
from fusevm.cli.transfer import Remote
from fusevm.sdk.words import format_age


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800), ("0", 0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1w", "h", "unlimited"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(click.BadParameter, match="30m"):
        Duration().convert(text, None, None)


def test_limits_of_durations() -> None:
    assert Duration(unlimited=True).convert("unlimited", None, None) == "unlimited"
    with pytest.raises(click.BadParameter, match="at least 60s"):
        Duration(minimum_s=60).convert("59", None, None)


@pytest.mark.parametrize(
    ("unit", "text", "value"),
    [
        (1, "512", 512),
        (1, "512M", 512),
        (1, "2g", 2048),
        (1, "1GiB", 1024),
        (1024, "4", 4),
        (1024, "4G", 4),
        (1024, "1T", 1024),
    ],
)
def test_sizes(unit: int, text: str, value: int) -> None:
    assert Size(unit).convert(text, None, None) == value


@pytest.mark.parametrize(("unit", "text"), [(1, "big"), (1, "-5"), (1024, "100M")])
def test_bad_sizes(unit: int, text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size(unit).convert(text, None, None)


def test_ids_and_variables() -> None:
    assert environment_id("a") == environment_id("fuse-a") == "fuse-a"
    assert variables(("A=1", "B=x=y", "C=")) == {"A": "1", "B": "x=y", "C": ""}
    with pytest.raises(click.UsageError):
        variables(("A",))


def test_places_to_copy() -> None:
    assert parse_place("a:/x") == Remote(env_id="fuse-a", path="/x")
    for here in ("-", "x", "./a:b", "/a:b", "dir/a:b"):
        assert parse_place(here) == here
    with pytest.raises(CliError, match="absolute"):
        parse_place("a:x")


def test_sizes_and_ages_for_people() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1536, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
        "5.0 TiB",
    ]
    at = 1_700_000_000.0
    assert [format_age("2023-11-14T22:13:20Z", at + ago) for ago in (-5, 59, 61, 7200, 200_000)] == [
        "0s",
        "59s",
        "1m",
        "2h",
        "2d",
    ]
    assert format_age("", at) == ""
    assert format_age("soon", at) == "soon"


def test_the_context_is_private_and_is_used(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    path = context_path(environ)
    assert load_context(path) is None
    save_private(path, Context(url="http://127.0.0.1:1", token="t", data_root="/d"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert (resolve(environ).url, resolve(environ).token) == ("http://127.0.0.1:1", "t")
    assert [file.name for file in path.parent.iterdir()] == ["context.json"]


def test_the_contexts_token_goes_to_no_other_server(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    save_private(context_path(environ), Context(url="http://127.0.0.1:1", token="secret"))
    for elsewhere in (
        resolve(environ, url="http://evil.example"),
        resolve(environ | {"FUSE_BASE_URL": "http://evil.example"}),
        resolve(environ, url="http://127.0.0.1:2"),
    ):
        assert elsewhere.token == ""
    assert resolve(environ, url="http://127.0.0.1:1/").token == "secret"
    assert resolve(environ, token="mine").token == "mine"
    assert resolve(environ | {"FUSE_TOKEN": "env"}, token="flag").token == "flag"


def test_a_damaged_context_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    path.write_text("{")
    with pytest.raises(CliError) as caught:
        load_context(path)
    assert "delete it" in caught.value.hint


def test_only_ones_own_context_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    save_private(path, Context(url="http://a"))
    remove_context(path, "http://b")
    assert json.loads(path.read_text())["url"] == "http://a"
    remove_context(path, "http://a")
    assert not path.exists()
    remove_context(path, "http://a")


def test_where_everything_is(tmp_path: Path) -> None:
    assert find_places("/x", {"FUSE_DATA_DIR": "/y"}).data == Path("/x")
    assert find_places(None, {"FUSE_DATA_DIR": "/y"}).control == Path("/y/control")


ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"


def test_an_ephemeral_stack_takes_a_range_that_nobody_uses() -> None:
    assert free_range("") == "10.211.0.0/16"
    taken = "e\t0100D30A\t0\t1\t0\t0\t0\tFFFFFFFF\t0\t0\t0\n"  # 10.211.0.1/32
    assert free_range(ROUTES + taken) == "10.212.0.0/16"
    default = "e\t00000000\t0\t1\t0\t0\t0\t00000000\t0\t0\t0\n"
    assert free_range(ROUTES + default) == "10.211.0.0/16"

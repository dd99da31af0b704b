"""The settings loader: one test over every setting, then precedence and bad files."""

from pathlib import Path
from typing import Any

import click
import pytest

from fusevm.cli import settings
from fusevm.cli.host_settings import host_config
from fusevm.cli.main import COMMANDS, cli
from fusevm.cli.serve import control_config
from fusevm.cli.settings import CONTROL, HOST, SECTIONS, Setting, load
from fusevm.control.config import ControlConfig, check
from fusevm.model.errors import BadSetting

KEY = "ab" * 32
#: setting -> (a good value, what it means, a bad value or None where any text is good)
EXAMPLES: dict[str, tuple[str, Any, str | None]] = {
    "listen": ("127.0.0.1:1234", "127.0.0.1:1234", "1234"),
    "firecracker_url": ("https://h:8090", "https://h:8090", "h:8090"),
    "firecracker_token": ("a.b", "a.b", "a b"),
    "database_url": ("sqlite:///x.db", "sqlite:///x.db", "mysql://x"),
    "token_encryption_key": (KEY.upper(), KEY, "abc"),
    "agent_download_url": ("https://x/agent", "https://x/agent", "x"),
    "tls_cert": ("/c.pem", "/c.pem", None),
    "tls_key": ("/k.pem", "/k.pem", None),
    "require_auth": ("true", True, "maybe"),
    "auth_token": ("secret", "secret", "sec ret"),
    "allowed_cidrs": ("10.0.0.0/8, 192.0.2.7", ("10.0.0.0/8", "192.0.2.7/32"), "10.0.0.0/99"),
    "allowed_hosts": ("a.example, b", ("a.example", "b"), None),
    "shutdown_timeout_seconds": ("2.5", 2.5, "-1"),
    "log_level": ("debug", "debug", "loud"),
    "log_json": ("yes", True, "2"),
    "data_root": ("/data", Path("/data"), None),
    "firecracker_binary": ("/usr/bin/firecracker", Path("/usr/bin/firecracker"), None),
    "jailer_binary": ("/usr/bin/jailer", Path("/usr/bin/jailer"), None),
    "egress_interface": ("eth1", "eth1", None),
    "host_listen": ("[::1]:9", "[::1]:9", "::1:9"),
    "driver": ("qemu", "qemu", "xen"),
    "kernel": ("/vmlinux", Path("/vmlinux"), None),
    "network_range": ("10.9.0.0/16", "10.9.0.0/16", None),
    "artefact_root": ("/images", Path("/images"), None),
    "run_dir": ("/run/x", Path("/run/x"), None),
    "instance": ("two", "two", None),
    "user_network": ("on", True, "perhaps"),
    "plain_http": ("1", True, "plain"),
    "max_machines": ("12", 12, "many"),
}
ROWS = [(section, setting) for section, table in SECTIONS.items() for setting in table]
BY_ROW = pytest.mark.parametrize(("section", "setting"), ROWS, ids=[setting.name for _, setting in ROWS])


@BY_ROW
def test_every_setting_has_variable_flag_file_and_default(section: str, setting: Setting, tmp_path: Path) -> None:
    text, value, bad = EXAMPLES[setting.name]
    file = tmp_path / "fuse.toml"
    file.write_text(f'[{section}]\n{setting.name} = "{text}"\n')

    default = load(section, {}, {})
    assert default[setting.name] == setting.default
    assert not default.is_given(setting.name)
    for loaded, source in (
        (load(section, {setting.name: text}, {}), setting.flag),
        (load(section, {}, {setting.env: text}), setting.env),
        (load(section, {}, {}, file), f"{setting.name} in {file}"),
    ):
        assert loaded[setting.name] == value
        assert loaded.source(setting.name) == source
    if bad is not None:
        with pytest.raises(BadSetting) as caught:
            load(section, {}, {setting.env: bad})
        assert caught.value.setting == setting.env
        assert not (setting.is_secret and bad in caught.value.problem)


@BY_ROW
def test_flag_beats_variable_beats_file(section: str, setting: Setting, tmp_path: Path) -> None:
    text, value, bad = EXAMPLES[setting.name]
    wrong = bad or "something else"
    file = tmp_path / "fuse.toml"
    file.write_text(f'[{section}]\n{setting.name} = "{wrong}"\n')
    assert load(section, {}, {setting.env: text}, file)[setting.name] == value
    assert load(section, {setting.name: text}, {setting.env: wrong}, file)[setting.name] == value
    assert load(section, {}, {setting.env: ""})[setting.name] == setting.default, "an empty variable is unset"


def test_names_are_unique() -> None:
    for table in SECTIONS.values():
        for names in zip(*((s.name, s.env, s.flag) for s in table), strict=True):
            assert len(set(names)) == len(names)
    assert not {s.env for s in CONTROL} & {s.env for s in HOST}


@pytest.mark.parametrize(("path", "table"), [(("serve",), CONTROL), (("host", "serve"), HOST)])
def test_every_setting_is_an_option_whose_help_names_the_variable(path: tuple[str, ...], table: Any) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name)  # type: ignore[assignment]
    options = {option: parameter for parameter in command.params for option in parameter.opts}
    for setting in table:
        assert f"[env: {setting.env}]" in options[setting.flag].help  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[control]\nlisten_on = ':80'", "did you mean listen?"),
        ("[contrl]\n", "did you mean control?"),
        ("listen = ':80'", "no section"),
        ("[control", "no TOML"),
    ],
)
def test_a_file_with_what_nobody_reads_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "fuse.toml"
    file.write_text(text)
    with pytest.raises(BadSetting, match=r"fuse\.toml") as caught:
        load("control", {}, {}, file)
    assert problem in caught.value.problem


def test_values_of_a_file_may_have_their_own_types(tmp_path: Path) -> None:
    file = tmp_path / "fuse.toml"
    file.write_text("[control]\nrequire_auth = true\nallowed_hosts = ['a', 'b']\nshutdown_timeout_seconds = 3\n")
    loaded = load("control", {}, {}, file)
    assert (loaded["require_auth"], loaded["allowed_hosts"]) == (True, ("a", "b"))
    assert loaded["shutdown_timeout_seconds"] == 3


def configure(environ: dict[str, str]) -> ControlConfig:
    loaded = load("control", {}, environ)
    with loaded.naming_sources():
        config = control_config(loaded)
        check(config)
    return config


def test_half_a_tls_pair_is_refused_by_name() -> None:
    with pytest.raises(BadSetting, match="belong together") as caught:
        configure({"ORCH_TLS_CERT": "/c.pem"})
    assert caught.value.setting == "ORCH_TLS_KEY (or --tls-key)"


def test_require_auth_names_everything_that_is_missing() -> None:
    with pytest.raises(BadSetting) as caught:
        configure({"ORCH_REQUIRE_AUTH": "true"})
    assert caught.value.setting == "ORCH_REQUIRE_AUTH"
    for name in ("ORCH_AUTH_TOKEN", "TOKEN_ENCRYPTION_KEY", "DATABASE_URL"):
        assert name in caught.value.problem
    everything = {"ORCH_AUTH_TOKEN": "t", "TOKEN_ENCRYPTION_KEY": KEY, "DATABASE_URL": "/x.db"}
    assert configure({"ORCH_REQUIRE_AUTH": "true"} | everything).require_auth


def test_a_public_address_needs_a_token() -> None:
    with pytest.raises(BadSetting) as caught:
        configure({"ORCH_LISTEN": ":8080"})
    assert caught.value.setting == "ORCH_LISTEN"
    assert configure({"ORCH_LISTEN": ":8080", "ORCH_AUTH_TOKEN": "t"}).listen == ":8080"


def test_settings_that_act_later_are_kept() -> None:
    loaded = load("control", {}, {"AGENT_DOWNLOAD_URL": "https://x/a"})
    assert loaded["agent_download_url"] == "https://x/a"
    assert {s.name for table in SECTIONS.values() for s in table if s.is_later} == {
        "agent_download_url",
        "firecracker_binary",
        "jailer_binary",
    }


def test_the_host_daemon_lives_within_the_installation_unless_it_has_a_root_of_its_own() -> None:
    within = host_config(load("host", {}, {}), {"FUSE_DATA_DIR": "/srv/fuse"})
    assert (within.data_root, within.artefacts) == (Path("/srv/fuse/host"), Path("/srv/fuse"))
    own = host_config(load("host", {}, {"FIRECRACKER_HOST_ROOT_DIR": "/data"}), {})
    assert (own.data_root, own.artefacts) == (Path("/data"), Path("/data"))


def test_the_settings_file_is_found(tmp_path: Path) -> None:
    assert settings.default_file({"FUSE_CONFIG": "/x.toml"}) == Path("/x.toml")
    file = tmp_path / "fuse" / "fuse.toml"
    file.parent.mkdir()
    file.write_text("")
    assert settings.default_file({"XDG_CONFIG_HOME": str(tmp_path)}) == file


def test_every_setting_and_command_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
    for table in SECTIONS.values():
        for setting in table:
            assert f"| `{setting.name}` | `{setting.env}` | `{setting.flag}` |" in text
    for name in COMMANDS:
        assert f"`fuse {name}" in text
    documented = {
        line.split("`")[3] for line in text.splitlines() if line.startswith("| `") and line.count("` | `") == 2
    }
    assert documented == {setting.env for table in SECTIONS.values() for setting in table}

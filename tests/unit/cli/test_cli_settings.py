"""The settings loader: one test over every setting, then precedence and bad files."""

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from fusevm.cli import main, settings
from fusevm.cli.control_table import UNHONOURED
from fusevm.cli.failures import USAGE
from fusevm.cli.host_settings import host_config
from fusevm.cli.main import COMMANDS, cli
from fusevm.cli.serve import control_config, unhonoured
from fusevm.cli.setting import parse_duration
from fusevm.cli.settings import CONTROL, HOST, SECTIONS, Setting, load
from fusevm.control.config import KEPT_LEASES, MAX_LEASE_S, ControlConfig, check
from fusevm.host.rows import FENCE_LIFETIME_MS
from fusevm.model.errors import BadSetting
from fusevm.model.setup import Restart

LOGIN_CA = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHvLLtVN+AQN43Yh4dYkwmNAYXvuYW5AGRR5cfRtTbPW ca"
KEY = "ab" * 32
#: setting -> (a good value, what it means, a bad value or None where any text is good)
EXAMPLES: dict[str, tuple[str, Any, str | None]] = {
    "listen": ("127.0.0.1:1234", "127.0.0.1:1234", "1234"),
    "firecracker_url": ("https://h:8090", "https://h:8090", "h:8090"),
    "firecracker_token": ("a.b", "a.b", "a b"),
    "allow_local_hosts": ("true", True, "maybe"),
    "database_url": ("sqlite:///x.db", "sqlite:///x.db", "mysql://x"),
    "token_encryption_key": (KEY.upper(), KEY, "abc"),
    "agent_download_url": ("https://x/agent", "https://x/agent", "unix:///x"),
    "tls_cert": ("/c.pem", "/c.pem", None),
    "tls_key": ("/k.pem", "/k.pem", None),
    "require_auth": ("true", True, "maybe"),
    "auth_token": ("secret", "secret", "sec ret"),
    "allowed_cidrs": ("10.0.0.0/8, 192.0.2.7", ("10.0.0.0/8", "192.0.2.7/32"), "10.0.0.0/99"),
    "allowed_hosts": ("a.example, b", ("a.example", "b"), None),
    "shutdown_timeout_seconds": ("2.5", 2.5, "-1"),
    "database_pool": ("4", 4, "0"),
    "token_encryption_key_previous": (f"{KEY.upper()}, {KEY}", (KEY, KEY), f"{KEY},abc"),
    "agent_download_sha256": (KEY.upper(), KEY, "abc"),
    "trusted_proxies": ("10.0.0.0/8,::1", ("10.0.0.0/8", "::1/128"), "proxy.example"),
    "cors_origins": ("https://a.example, *", ("https://a.example", "*"), None),
    "secure_cookies": ("yes", True, "maybe"),
    "metrics_auth": ("true", True, "maybe"),
    "placement": ("binpack", "binpack", "random"),
    "cpu_overcommit": ("2.5", 2.5, "0"),
    "ram_overcommit": ("1.1", 1.1, "-1"),
    "storage_overcommit": ("8", 8.0, "much"),
    "default_runtime_seconds": ("unlimited", -1, "0"),
    "max_runtime_seconds": ("60", 60, "-2"),
    "default_idle_timeout_seconds": ("60", 60, "59"),
    "linger_seconds": ("60", 60, "0"),
    "max_queue_seconds": ("0", 0, "-1"),
    "startup_script_timeout_seconds": ("55", 55, "0"),
    "max_startup_script_timeout_seconds": ("55", 55, "soon"),
    "retention_seconds": ("86400", 86_400, "0"),
    "lease_seconds": ("600", 600, "601"),
    "log_level": ("debug", "debug", "loud"),
    "log_json": ("yes", True, "2"),
    "data_root": ("/data", Path("/data"), None),
    "firecracker_binary": ("/usr/bin/firecracker", Path("/usr/bin/firecracker"), None),
    "jailer_binary": ("/usr/bin/jailer", Path("/usr/bin/jailer"), None),
    "egress_interface": ("eth1", "eth1", None),
    "host_listen": ("[::1]:9", "[::1]:9", "::1:9"),
    "driver": ("qemu", "qemu", "xen"),
    "kernel": ("/vmlinux", Path("/vmlinux"), None),
    "published_ports": ("30000-30999", "30000-30999", None),
    "network_range": ("10.9.0.0/16", "10.9.0.0/16", None),
    "artefact_root": ("/images", Path("/images"), None),
    "login_ca": (LOGIN_CA, LOGIN_CA, None),
    "sweep_interval_s": ("1m30s", 90.0, "0s"),
    "run_dir": ("/run/x", Path("/run/x"), None),
    "instance": ("two", "two", None),
    "user_network": ("on", True, "perhaps"),
    "plain_http": ("1", True, "plain"),
    "disk_bytes_per_s": ("1000000", 1_000_000, "-1"),
    "disk_ops_per_s": ("500", 500, "some"),
    "max_machines": ("12", 12, "many"),
    "cpu_ratio": ("1.5", 1.5, "0"),
    "disk_ratio": ("1", 1.0, "none"),
    "ram_reserve_mib": ("1024", 1024, "-1"),
    "cpu_reserve": ("1", 1, "half"),
    "disk_reserve_bytes": ("1048576", 1048576, "1 GiB"),
    "max_image_bytes": ("1048576", 1048576, "big"),
    "image_high_percent": ("90", 90, "101"),
    "image_low_percent": ("80", 80, "0"),
    "artifact_networks": ("10.0.0.0/8,fd00::/8", ("10.0.0.0/8", "fd00::/8"), "10.0.0.0/40"),
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


def test_nothing_is_forgotten_within_ten_leases() -> None:
    """Whoever lost its lease may speak late: ended records, kept answers and the hosts' tombstones are still there."""
    longest = {"FUSE_LEASE_SECONDS": f"{MAX_LEASE_S:.0f}"}
    with pytest.raises(BadSetting) as caught:
        configure(longest | {"FUSE_RETENTION_SECONDS": "5999"})
    assert caught.value.setting == "FUSE_RETENTION_SECONDS"
    assert "10 times FUSE_LEASE_SECONDS" in caught.value.problem
    assert configure(longest | {"FUSE_RETENTION_SECONDS": "6000"}).retention_s == KEPT_LEASES * MAX_LEASE_S
    assert FENCE_LIFETIME_MS >= KEPT_LEASES * MAX_LEASE_S * 1000


def test_the_programs_of_firecracker_may_be_named() -> None:
    named = {"FIRECRACKER_BINARY_PATH": "/opt/firecracker", "JAILER_BINARY_PATH": "/opt/jailer"}
    config = host_config(load("host", {}, named), {})
    assert (config.firecracker_binary, config.jailer_binary) == (Path("/opt/firecracker"), Path("/opt/jailer"))
    assert host_config(load("host", {}, {"FUSE_DRIVER": "firecracker"}), {}).driver == "firecracker"


#: Setting to how the configuration shows it; `hosts` and `policy` are made of several.
SHOWN: dict[str, Callable[[ControlConfig], Any]] = {
    "firecracker_url": lambda config: config.hosts[0].url,
    "firecracker_token": lambda config: config.hosts[0].token,
    "placement": lambda config: config.policy.placement,
    "cpu_overcommit": lambda config: config.policy.cpu_overcommit_percent / 100,
    "ram_overcommit": lambda config: config.policy.ram_overcommit_percent / 100,
    "storage_overcommit": lambda config: config.policy.storage_overcommit_percent / 100,
    "default_runtime_seconds": lambda config: config.policy.default_max_runtime_seconds,
    "max_runtime_seconds": lambda config: config.policy.longest_runtime_seconds,
    "default_idle_timeout_seconds": lambda config: config.policy.default_idle_timeout_seconds,
    "linger_seconds": lambda config: config.policy.linger_ms / 1000,
    "max_queue_seconds": lambda config: config.policy.max_queue_seconds,
    "startup_script_timeout_seconds": lambda config: config.policy.default_startup_timeout_s,
    "max_startup_script_timeout_seconds": lambda config: config.policy.max_startup_timeout_s,
}


@pytest.mark.parametrize("setting", CONTROL, ids=lambda setting: setting.name)
def test_every_setting_reaches_the_control_plane(setting: Setting) -> None:
    text, value, _ = EXAMPLES[setting.name]
    given = {setting.env: text} | ({"FIRECRACKER_BASE_URL": "https://h:8090"} if "token" in setting.name else {})
    show = SHOWN.get(setting.name, lambda config: getattr(config, setting.field or setting.name))
    if not setting.name.startswith("firecracker"):
        assert show(control_config(load("control", {}, {}))) != value
    assert show(control_config(load("control", {}, given))) == value


def test_a_maximum_forbids_unlimited_runtimes() -> None:
    assert configure({}).policy.allow_unlimited_runtime
    assert not configure({"FUSE_MAX_RUNTIME_SECONDS": "7200"}).policy.allow_unlimited_runtime


@pytest.mark.parametrize(
    ("environ", "name", "problem"),
    [
        ({"FUSE_MAX_RUNTIME_SECONDS": "60"}, "FUSE_DEFAULT_RUNTIME_SECONDS", "longest allowed"),
        (
            {"FUSE_DEFAULT_RUNTIME_SECONDS": "unlimited", "FUSE_MAX_RUNTIME_SECONDS": "60"},
            "FUSE_DEFAULT_RUNTIME_SECONDS",
            "longest allowed",
        ),
        (
            {"FUSE_MAX_STARTUP_SCRIPT_TIMEOUT_SECONDS": "5"},
            "FUSE_STARTUP_SCRIPT_TIMEOUT_SECONDS",
            "longest allowed",
        ),
        ({"FUSE_CORS_ORIGINS": "https://a,*", "ORCH_AUTH_TOKEN": "t"}, "FUSE_CORS_ORIGINS", "credentials"),
        ({"FUSE_CORS_ORIGINS": "*"}, "FUSE_CORS_ORIGINS", "auth token"),
        ({"FUSE_CORS_ORIGINS": "https://a.example/"}, "FUSE_CORS_ORIGINS", "no origin"),
        ({"FUSE_CORS_ORIGINS": "https://A.example"}, "FUSE_CORS_ORIGINS", "no origin"),
        ({"TOKEN_ENCRYPTION_KEY_PREVIOUS": KEY}, "TOKEN_ENCRYPTION_KEY_PREVIOUS", "TOKEN_ENCRYPTION_KEY"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(
    environ: dict[str, str], name: str, problem: str
) -> None:
    with pytest.raises(BadSetting) as caught:
        configure(environ)
    assert caught.value.setting.startswith(name)
    assert problem in caught.value.problem


def test_every_variable_of_the_seed_acts_or_is_remarked_upon() -> None:
    seed = {
        *("ORCH_LISTEN", "ORCH_VM_PREFIX", "ORCH_ARTIFACT_PULL_TIMEOUT_SECONDS", "ORCH_ARTIFACT_IDLE_TTL_SECONDS"),
        *("ORCH_ARTIFACT_MAX_PER_TENANT", "ORCH_SHUTDOWN_TIMEOUT_SECONDS", "FIRECRACKER_BASE_URL", "FIRECRACKER_TOKEN"),
        *("DATABASE_URL", "ORCH_TLS_CERT", "ORCH_TLS_KEY", "ORCH_AUTH_TOKEN", "ORCH_ALLOWED_CIDRS"),
        *("ORCH_SECURE_COOKIES", "TOKEN_ENCRYPTION_KEY", "ORCH_REQUIRE_AUTH", "AGENT_DOWNLOAD_URL"),
    }
    acting = {setting.env for setting in CONTROL}
    assert seed == (acting & seed) | set(UNHONOURED)
    assert not acting & set(UNHONOURED)
    for name, (same, why) in UNHONOURED.items():
        assert unhonoured({name: "7"}) == [f"{name} has no effect: {why}"]
        assert unhonoured({name: same}) == unhonoured({name: ""}) == []


def test_serve_names_the_variables_that_have_no_effect(
    environ: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environ.setenv("ORCH_VM_PREFIX", "vm-")
    environ.setenv("ORCH_TLS_CERT", "/nowhere.pem")
    environ.setenv("ORCH_TLS_KEY", "/nowhere.pem")
    assert main.run(("serve", "--config", os.devnull)) == USAGE
    said = capfd.readouterr().err
    assert "ORCH_VM_PREFIX has no effect: ids of environments always begin with fuse-" in said
    assert "ORCH_TLS_CERT: cannot read /nowhere.pem" in said


PROFILES = """
[agents.worker]
download_url = "https://example.com/worker"
command = ["/fuse/agent", "-v"]
restart = "on-failure"
port = 7000
env = { COLOUR = "blue" }
files."/etc/worker.toml" = { content = "colour = 'blue'", mode = "0600" }
files."/etc/key" = { content_b64 = "AAE=" }
"""


def test_profiles_of_agents_are_read_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "fuse.toml"
    file.write_text(PROFILES)
    config = control_config(load("control", {}, {}, file))
    check(config)
    worker = config.agents["worker"]
    assert (worker.command, worker.port, worker.restart) == (("/fuse/agent", "-v"), 7000, Restart.ON_FAILURE)
    assert worker.env == {"COLOUR": "blue"}
    assert base64.b64decode(worker.files["/etc/worker.toml"].content_b64) == b"colour = 'blue'"
    assert (worker.files["/etc/worker.toml"].mode, worker.files["/etc/key"].mode) == ("0600", "0644")
    assert load("host", {}, {}, file).agents == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("agents = 1", r"\[agents.<name>\]"),
        ("[agents]\nworker = 1", "write a table"),
        ("[agents.'a b']\ncommand = ['x']", "a name is"),
        ("[agents.a]\ncomand = ['x']", "did you mean command"),
        ("[agents.a]\nnothing_like_it = 1", "known are"),
        ("[agents.a]\ncommand = 'x'", "Expected `array`"),
        ("[agents.a]\nrestart = 'sometimes'", "sometimes"),
        ("[agents.a]\nfiles = {'/x' = {text = 'y'}}", "not text"),
        ("[agents.a]\nfiles = 3", "files"),
        ("[agents.a]\nfiles = {'/x' = 'y'}", "a file has"),
        ("[agents.a]\nport = 1", "neither command nor download_url"),
        ("[agents.a]\ncommand = ['x']\nport = 70000", "port"),
        ("[agents.a]\ncommand = ['x']\nsha256 = 'x'", "sha256"),
        ("[agents.a]\ndownload_url = 'ftp://x'", "http"),
        ("[agents.a]\ncommand = ['x']\nfiles = {x = {content = ''}}", "absolute"),
    ],
)
def test_a_profile_that_nobody_could_run_is_refused_by_name(text: str, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "fuse.toml"
    file.write_text(text)
    with pytest.raises(BadSetting, match=problem) as caught:
        check(control_config(load("control", {}, {}, file)))
    assert caught.value.setting.startswith("agents")


def test_a_profile_may_leave_its_url_to_the_default(tmp_path: Path) -> None:
    file = tmp_path / "fuse.toml"
    file.write_text("[agents.a]\nport = 1")
    check(control_config(load("control", {}, {"AGENT_DOWNLOAD_URL": "https://x/a"}, file)))


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
    docs = Path(__file__).parents[3] / "docs"
    text = (docs / "settings.md").read_text()
    for table in SECTIONS.values():
        for setting in table:
            assert f"| `{setting.name}` | `{setting.env}` | `{setting.flag}` |" in text
    for name in UNHONOURED:
        assert f"- `{name}`: " in text
    commands = (docs / "cli.md").read_text()
    for name in COMMANDS:
        assert f"`fuse {name}" in commands


def test_computer_hosts_export_block_configures_the_daemon() -> None:
    """Its README's variables, as they are there."""
    block = """
        export FIRECRACKER_HOST_ROOT_DIR=/var/lib/firecracker-host
        export FIRECRACKER_BINARY_PATH=/usr/local/bin/firecracker
        export JAILER_BINARY_PATH=/usr/local/bin/jailer
        export FIRECRACKER_HOST_EGRESS_INTERFACE=eth0
        export FIRECRACKER_HOST_RECONCILE_INTERVAL=5s
    """
    environ = dict(line.split()[1].split("=", 1) for line in block.strip().splitlines())
    loaded = load("host", {}, environ | {"GUEST_LOGIN_CA_PUBLIC_KEY": LOGIN_CA})
    config = host_config(loaded, {})
    config.check()
    assert config.api_socket == Path("/var/lib/firecracker-host/firecracker-host.sock")
    assert (config.egress_interface, config.sweep_interval_s, config.login_ca) == ("eth0", 5.0, LOGIN_CA)
    assert loaded["firecracker_binary"] == Path("/usr/local/bin/firecracker")


def test_a_login_authority_that_is_no_key_is_refused_by_name() -> None:
    loaded = load("host", {}, {"GUEST_LOGIN_CA_PUBLIC_KEY": "ssh-ed25519 nonsense"})
    with pytest.raises(BadSetting) as caught, loaded.naming_sources():
        host_config(loaded, {}).check()
    assert caught.value.setting == "GUEST_LOGIN_CA_PUBLIC_KEY"


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5), ("500ms", 0.5), ("1h30m", 5400), ("7", 7), ("1.5m", 90), ("0.25", 0.25)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5x", "-5s", "1m30", "5 s", "0"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"duration|range|unit"):
        parse_duration(text)


def test_a_user_without_a_home_has_the_settings_of_the_system_or_none(monkeypatch: pytest.MonkeyPatch):
    """As a service's own user (DynamicUser=) where libnss-systemd is not installed."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    assert settings.default_file({}) in (None, Path("/etc/fuse/fuse.toml"))

"""Settings that are refused, and why."""

import socket

import pytest

from fusevm.control.config import (
    MAX_LEASE_S,
    ControlConfig,
    HostSetting,
    accepted_hosts,
    check,
    effective_listen,
    parse_listen,
)
from fusevm.control.main import bind
from fusevm.control.store.location import sqlite_path
from fusevm.core.policy import Policy
from fusevm.model.errors import BadSetting, PortInUse

KEY, PIN = "ab" * 32, "0" * 64


@pytest.mark.parametrize(
    "config",
    [
        ControlConfig(),
        ControlConfig(listen="127.0.0.1:0"),
        ControlConfig(listen="[::1]:8080"),
        ControlConfig(listen="localhost:80"),
        ControlConfig(listen=":8080", auth_token="t"),
        ControlConfig(listen="0.0.0.0:8080", auth_token="t"),
        ControlConfig(require_auth=True, auth_token="t", encryption_key=KEY, database="/tmp/x.db"),
        ControlConfig(database="sqlite:///tmp/x.db"),
        ControlConfig(database="postgresql://h/db"),
        ControlConfig(
            database="postgres://h/db",
            encryption_key=KEY,
            previous_keys=(KEY,),
            hosts=(HostSetting(id="a", url="unix:///a", token="t"),),
        ),
        ControlConfig(require_auth=True, auth_token="t", encryption_key=KEY, database="postgresql://h/db"),
        ControlConfig(allowed_cidrs=("10.0.0.0/8", "::1/128"), trusted_proxies=("127.0.0.1/32",)),
        ControlConfig(cors_origins=("https://a.example", "http://localhost:4000")),
        ControlConfig(cors_origins=("*",), auth_token="t"),
        ControlConfig(hosts=(HostSetting(id="a", url="https://10.0.0.1:8090", token=f"s.{PIN}"),)),
        ControlConfig(hosts=(HostSetting(id="a", url="http://127.0.0.1:8090"),)),
        ControlConfig(hosts=(HostSetting(id="a", url="unix:///run/x.sock"),)),
    ],
)
def test_settings_that_are_fine(config: ControlConfig) -> None:
    check(config)


@pytest.mark.parametrize(
    ("config", "setting", "problem"),
    [
        (ControlConfig(listen=":8080"), "listen", "auth token"),
        (ControlConfig(listen="0.0.0.0:8080"), "listen", "auth token"),
        (ControlConfig(listen="192.168.1.1:8080"), "listen", "auth token"),
        (ControlConfig(listen="fuse.example:8080"), "listen", "auth token"),
        (ControlConfig(listen="8080"), "listen", "host:port"),
        (ControlConfig(listen="127.0.0.1:99999"), "listen", "host:port"),
        (ControlConfig(require_auth=True), "require_auth", "auth_token, encryption_key, database"),
        (ControlConfig(require_auth=True, auth_token="t", database="/x"), "require_auth", "encryption_key"),
        (ControlConfig(tls_cert="c.pem"), "tls_key", "together"),
        (ControlConfig(tls_key="k.pem"), "tls_cert", "together"),
        (ControlConfig(encryption_key="ab"), "encryption_key", "64 hex"),
        (ControlConfig(encryption_key="zz" * 32), "encryption_key", "64 hex"),
        (ControlConfig(database="mysql://x/y"), "database", "postgresql"),
        (ControlConfig(database="redis:///x"), "database", "sqlite"),
        (
            ControlConfig(database="postgresql://x/y", hosts=(HostSetting(id="a", url="unix:///a", token="t"),)),
            "encryption_key",
            "openssl",
        ),
        (ControlConfig(encryption_key=KEY, previous_keys=("ab",)), "previous_keys", "64 hex"),
        (ControlConfig(previous_keys=(KEY,)), "previous_keys", "encryption_key"),
        (ControlConfig(allowed_cidrs=("10.0.0.0/33",)), "allowed_cidrs", "10.0.0.0/33"),
        (ControlConfig(trusted_proxies=("proxy",)), "trusted_proxies", "proxy"),
        (ControlConfig(cors_origins=("*",)), "cors_origins", "auth token"),
        (ControlConfig(cors_origins=("*", "https://a"), auth_token="t"), "cors_origins", "credentials"),
        (ControlConfig(cors_origins=("https://u@a",)), "cors_origins", "no origin"),
        (ControlConfig(cors_origins=("a.example",)), "cors_origins", "no origin"),
        (ControlConfig(policy=Policy(placement="random")), "placement", "random"),
        (ControlConfig(policy=Policy(cpu_overcommit_percent=0)), "cpu_overcommit", "greater"),
        (ControlConfig(database_pool=0), "database_pool", "greater"),
        (ControlConfig(wait_s=0), "wait_s", "greater"),
        (ControlConfig(lease_s=-1), "lease_s", "greater"),
        (ControlConfig(lease_s=MAX_LEASE_S + 1), "lease_s", "600 s"),
        (ControlConfig(lease_s=30, retention_s=299), "retention_s", "10 times lease_s"),
        (ControlConfig(lease_s=30, idempotency_s=299), "idempotency_s", "10 times lease_s"),
        (ControlConfig(log_level="loud"), "log_level", "loud"),
        (ControlConfig(hosts=(HostSetting(id="a", url="http://10.0.0.1"),)), "firecracker_url", "https"),
        (ControlConfig(hosts=(HostSetting(id="a", url="https://x", token="s"),)), "FIRECRACKER_TOKEN", "64 hex"),
        (ControlConfig(hosts=(HostSetting(id="a", url="x"),)), "firecracker_url", "https"),
        (
            ControlConfig(hosts=(HostSetting(id="a", url="unix:///a"), HostSetting(id="a", url="unix:///b"))),
            "hosts",
            "two hosts",
        ),
    ],
)
def test_settings_that_are_refused(config: ControlConfig, setting: str, problem: str) -> None:
    with pytest.raises(BadSetting) as caught:
        check(config)
    assert caught.value.setting == setting
    assert problem in caught.value.problem


def test_creates_and_deletes_wait_55_seconds_unless_told_otherwise() -> None:
    """The contract's client gives up after 60 s of silence."""
    assert ControlConfig().wait_s == 55.0


def test_the_default_address_depends_on_the_token() -> None:
    assert effective_listen(ControlConfig()) == "127.0.0.1:8080"
    assert effective_listen(ControlConfig(auth_token="t")) == ":8080"
    assert parse_listen(":8080") == ("", 8080)
    assert parse_listen("[::1]:80") == ("::1", 80)


def test_the_database_is_a_path() -> None:
    assert sqlite_path(ControlConfig().database) == ":memory:"
    assert sqlite_path("sqlite:///var/fuse.db") == "/var/fuse.db"


def test_local_names_are_always_accepted() -> None:
    assert accepted_hosts(ControlConfig(allowed_hosts=("Fuse.LAN",))) == {"localhost", "127.0.0.1", "::1", "fuse.lan"}


def test_a_taken_port_is_named() -> None:
    with bind(ControlConfig(listen="127.0.0.1:0")) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse) as caught:
            bind(ControlConfig(listen=f"127.0.0.1:{port}"))
        assert caught.value.setting == "--listen"


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    with pytest.raises(BadSetting, match=r"203\.0\.113\.1"):
        bind(ControlConfig(listen="203.0.113.1:0", auth_token="t"))


def test_answers_are_sent_without_delay() -> None:
    """An answer is written in parts; its body must not wait until the client has acknowledged the headers."""
    for listen in ("127.0.0.1:0", ":0"):
        with bind(ControlConfig(listen=listen, auth_token="t")) as listener:
            port = listener.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)), listener.accept()[0] as accepted:
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_every_address_is_one_socket_for_both_families() -> None:
    with bind(ControlConfig(listen=":0", auth_token="t")) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")

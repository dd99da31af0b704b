"""What of a manifest acts, and what is refused by name."""

import base64

import msgspec
import pytest

from fusevm.core.manifest import Manifest, parse_manifest
from fusevm.model.errors import BadField, Unimplemented

SECRETS = {"pg_password": "hunter2", "nul": "a\x00b"}


def encoded(manifest: object) -> str:
    return base64.b64encode(msgspec.json.encode(manifest)).decode()


def read(**fields: object) -> Manifest:
    return parse_manifest(encoded({"version": "1", **fields}), SECRETS)


def test_no_manifest_is_the_default_one():
    found = parse_manifest("", SECRETS)
    assert (found.workspace, found.env) == ("/workspace", {})
    assert found == parse_manifest(base64.b64encode(found.text.encode()).decode(), SECRETS)
    assert msgspec.json.decode(found.text) == {"version": "1", "workspace": "/workspace"}


@pytest.mark.parametrize("version", ["1", 1])
def test_the_text_is_kept_as_it_was_given(version: object):
    text = f'{{ "version" : {msgspec.json.encode(version).decode()} }}'
    assert parse_manifest(base64.b64encode(text.encode()).decode(), {}) == Manifest(text)


@pytest.mark.parametrize("version", [None, "2", 2, "", True])
def test_another_version_is_refused(version: object):
    with pytest.raises(BadField, match='version must be "1"'):
        parse_manifest(encoded({"version": version}), {})
    with pytest.raises(BadField, match='version must be "1"'):
        parse_manifest(encoded({}), {})


def test_the_workspace_is_found_in_both_places():
    assert read(workspace="/work/space").workspace == "/work/space"
    assert read(machine={"workspace": "/workspace"}).workspace == "/workspace"
    assert read(workspace="/a", machine={}).workspace == "/a"
    assert read(workspace=None).workspace == ""


@pytest.mark.parametrize("workspace", ["relative", "/a/../b", "/a//b", "/a/", "/", 7, "/a\x00b", "/" + "x" * 4096])
def test_a_workspace_that_is_no_clean_path_is_refused(workspace: object):
    with pytest.raises(BadField, match="is no clean absolute path of a directory"):
        read(workspace=workspace)


def test_values_come_as_text_as_value_and_from_secrets():
    env = {"A": "text", "B": {"value": "v"}, "_C1": {"secret": "pg_password"}, "D": ""}
    assert read(env=env).env == {"A": "text", "B": "v", "_C1": "hunter2", "D": ""}


def test_the_text_does_not_hold_the_secret_that_it_names():
    assert "hunter2" not in read(env={"A": {"secret": "pg_password"}}).text


def test_a_secret_that_does_not_exist_is_named():
    with pytest.raises(BadField, match=r"env\.A needs the secret 'no_such'") as refusal:
        read(env={"A": {"secret": "no_such"}})
    assert refusal.value.field == "secrets"


@pytest.mark.parametrize(
    "value", [7, None, ["x"], {"value": 7}, {"secret": 7}, {}, {"other": "x"}, {"value": "x", "secret": "y"}]
)
def test_a_value_of_another_shape_is_refused(value: object):
    with pytest.raises(BadField, match=r"env\.A is neither a text, a value nor a secret"):
        read(env={"A": value})


@pytest.mark.parametrize("name", ["", "1A", "A-B", "A B", "ä"])
def test_a_name_that_no_shell_takes_is_refused(name: str):
    with pytest.raises(BadField, match="is no name of a variable"):
        read(env={name: "x"})


@pytest.mark.parametrize("value", ["a\x00b", {"secret": "nul"}])
def test_a_value_with_a_nul_is_refused(value: object):
    with pytest.raises(BadField, match=r"env\.A: a NUL character"):
        read(env={"A": value})


@pytest.mark.parametrize(
    ("fields", "feature"),
    [
        ({"services": {"postgres": {"image": "postgres:16"}}}, "manifest_inline.services"),
        ({"hooks": ["x"]}, "manifest_inline.hooks"),
        ({"replicas": 0}, "manifest_inline.replicas"),
        ({"machine": {"workspace": "/w", "gpus": 1}}, "manifest_inline.machine.gpus"),
        ({"workspace": "/w", "machine": {"workspace": "/v"}}, "manifest_inline.machine.workspace"),
    ],
)
def test_a_field_that_does_nothing_here_is_refused_by_name(fields: dict[str, object], feature: str):
    with pytest.raises(Unimplemented) as refusal:
        read(**fields)
    assert refusal.value.feature == feature


def test_empty_fields_ask_for_nothing():
    assert read(services={}, hooks=[], note="", other=None) == read(services={}, hooks=[], note="", other=None)
    assert read(services={}, hooks=[], note="", other=None).env == {}


@pytest.mark.parametrize("field", ["machine", "env"])
def test_an_object_is_an_object(field: str):
    with pytest.raises(BadField, match=f"{field} is no object"):
        read(**{field: ["x"]})


@pytest.mark.parametrize(
    "text",
    [
        "not base64!",
        base64.b64encode(b"[]").decode(),
        base64.b64encode(b"{").decode(),
        base64.b64encode(b"\xff").decode(),
    ],
)
def test_what_is_not_base64_of_an_object_is_refused(text: str):
    with pytest.raises(BadField, match="it is not base64 of a JSON object") as refusal:
        parse_manifest(text, {})
    assert refusal.value.field == "manifest_inline"

"""The build hook: what makes a binary out of date. (Compiling is tested where the agent is.)"""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source folder with an agent module in it."""
    (tmp_path / "guest" / "cmd" / "fused").mkdir(parents=True)
    (tmp_path / "guest" / "go.mod").write_text("module fused\n")
    (tmp_path / "guest" / "cmd" / "fused" / "main.go").write_text("package main\n")
    return tmp_path


@pytest.fixture
def compiled(hook, monkeypatch):
    """The architectures that were compiled; the compiler is replaced by one that writes the architecture."""
    calls = []

    def compile_agent(_go, _module, _main, target, architecture, _version):
        calls.append(architecture)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(architecture)

    monkeypatch.setattr(hook, "compile_agent", compile_agent)
    return calls


def test_tests_and_hidden_files_do_not_make_the_agent_out_of_date(hook, source):
    before = hook.hash_sources(source / "guest")
    (source / "guest" / "main_test.go").write_text("package main\n")
    (source / "guest" / ".swp").write_text("x")
    (source / "guest" / "testdata").mkdir()
    (source / "guest" / "testdata" / "x.go").write_text("x")
    assert hook.hash_sources(source / "guest") == before


def test_an_edit_a_new_file_and_a_rename_do(hook, source):
    seen = {hook.hash_sources(source / "guest")}
    main = source / "guest" / "cmd" / "fused" / "main.go"
    main.write_text("package main // edited\n")
    seen.add(hook.hash_sources(source / "guest"))
    (source / "guest" / "more.go").write_text("package more\n")
    seen.add(hook.hash_sources(source / "guest"))
    (source / "guest" / "more.go").rename(source / "guest" / "other.go")
    seen.add(hook.hash_sources(source / "guest"))
    assert len(seen) == 4


def test_the_key_changes_with_everything_a_binary_depends_on(hook):
    keys = {
        hook.build_key("sources", "go1", "0.1", "amd64"),
        hook.build_key("other", "go1", "0.1", "amd64"),
        hook.build_key("sources", "go2", "0.1", "amd64"),
        hook.build_key("sources", "go1", "0.2", "amd64"),
        hook.build_key("sources", "go1", "0.1", "arm64"),
    }
    assert len(keys) == 5


def test_nothing_is_compiled_twice(hook, source, compiled):
    hook.build_agents(source, "0.1")
    hook.build_agents(source, "0.1")
    assert compiled == ["amd64", "arm64"]


def test_a_binary_that_was_changed_or_removed_is_compiled_again(hook, source, compiled):
    hook.build_agents(source, "0.1")
    (source / hook.PACKAGE_FOLDER / "fused-arm64").write_text("something else")
    hook.build_agents(source, "0.1")
    (source / hook.PACKAGE_FOLDER / "fused-amd64").unlink()
    hook.build_agents(source, "0.1")
    assert compiled == ["amd64", "arm64", "arm64", "amd64"]


def test_a_damaged_stamp_costs_a_build_and_nothing_else(hook, source, compiled):
    hook.build_agents(source, "0.1")
    (source / hook.STAMP).write_text("{")
    hook.build_agents(source, "0.1")
    assert len(compiled) == 4
    assert set(json.loads((source / hook.STAMP).read_text())) == {"amd64", "arm64"}


def test_the_users_go_settings_do_not_reach_the_build(hook, monkeypatch):
    monkeypatch.setenv("GOFLAGS", "-race")
    monkeypatch.setenv("GOPROXY", "direct")
    env = hook.go_environment(hook.find_compiler(), "arm64")
    assert "GOFLAGS" not in env
    assert (env["GOPROXY"], env["GOTOOLCHAIN"], env["CGO_ENABLED"], env["GOARCH"]) == ("off", "local", "0", "arm64")


def test_a_missing_module_is_named(hook, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"go\.mod is missing"):
        hook.build_agents(tmp_path, "0.1")

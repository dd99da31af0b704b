"""The one settings loader: where the value of every setting comes from.

Precedence: flag, then environment variable, then settings file (TOML), then default. An empty variable counts as unset.
Errors name the source that was wrong. What settings mean together is checked by `control.config` and `host.config`;
their complaints are given the source's name here, too.
"""

import contextlib
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fusevm.cli.control_table import CONTROL
from fusevm.cli.host_table import HOST
from fusevm.cli.profiles import parse_profiles
from fusevm.cli.setting import Setting
from fusevm.model.errors import BadSetting
from fusevm.model.setup import AgentSpec

__all__ = [
    "CONTROL",
    "HOST",
    "SECTIONS",
    "Loaded",
    "Setting",
    "default_data_root",
    "default_file",
    "load",
    "load_file",
]


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """Values of one table, and the source of each: a flag, a variable, a line of a file, or `default`."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    table: Sequence[Setting]
    #: Profiles of the settings file (section `agents`); of the control plane only.
    agents: dict[str, AgentSpec] = {}
    #: The settings file that was read.
    file: Path | None = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def is_given(self, name: str) -> bool:
        """False when it is the default."""
        return self.sources[name] != "default"

    def source(self, name: str) -> str:
        """How to name a setting to its user: by the source it came from, else by flag and variable."""
        if self.is_given(name):
            return self.sources[name]
        setting = next(setting for setting in self.table if setting.name == name)
        return f"{setting.env} (or {setting.flag})"

    @contextlib.contextmanager
    def naming_sources(self) -> Iterator[None]:
        """Give complaints about fields of a program's configuration the name that the user knows."""
        try:
            yield
        except BadSetting as error:
            fields = {setting.field or setting.name: setting.name for setting in self.table}
            names = fields | {setting.env: setting.name for setting in self.table}
            if error.setting not in names:
                raise
            problem = error.problem
            for field, name in fields.items():
                # A list of fields; elsewhere `listen` may be a verb.
                if "_" in field or problem.startswith("also set:"):
                    problem = re.sub(rf"\b{field}\b", self.source(name), problem)
            raise BadSetting(setting=self.source(names[error.setting]), problem=problem) from error


_AGENTS = "agents"
#: Section of the settings file -> its table.
SECTIONS: Mapping[str, tuple[Setting, ...]] = {"control": CONTROL, "host": HOST}


# -- loading -------------------------------------------------------------------------------------------------------


def load(
    section: str, flags: Mapping[str, str | bool | None], environ: Mapping[str, str], file: Path | None = None
) -> Loaded:
    """All values of one section. `flags` by setting name, None where not given. Raises BadSetting with the source."""
    table = SECTIONS[section]
    sections, agents = load_file(file) if file is not None else ({}, {})
    lines = sections.get(section, {})
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in table:
        raw, source = _find(setting, flags, environ, lines, file)
        values[setting.name] = setting.default if raw is None else _parse(setting, raw, source)
        sources[setting.name] = source
    profiles = agents if section == "control" else {}
    return Loaded(values=values, sources=sources, table=table, agents=profiles, file=file)


def _find(
    setting: Setting,
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    lines: Mapping[str, str],
    file: Path | None,
) -> tuple[str | None, str]:
    flag = flags.get(setting.name)
    if flag is not None:
        return str(flag), setting.flag
    if environ.get(setting.env):
        return environ[setting.env], setting.env
    if setting.name in lines:
        return lines[setting.name], f"{setting.name} in {file}"
    return None, "default"


def _parse(setting: Setting, raw: str, source: str) -> Any:
    try:
        return setting.parse(raw)
    except ValueError as error:
        problem = str(error).replace(repr(raw), "its value") if setting.is_secret else str(error)
        raise BadSetting(setting=source, problem=problem) from error


def load_file(path: Path) -> tuple[dict[str, dict[str, str]], dict[str, AgentSpec]]:
    """The sections of a settings file, values as text, and the agent profiles. Raises BadSetting for what nobody would
    read."""
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadSetting(setting=str(path), problem=error.strerror or str(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(setting=str(path), problem=f"it is no TOML: {error}") from error
    profiles = parse_profiles(content.pop(_AGENTS, {}), path)
    found: dict[str, dict[str, str]] = {}
    for section, lines in content.items():
        if section not in SECTIONS or not isinstance(lines, dict):
            raise BadSetting(
                setting=f"{section} in {path}", problem=_suggest(section, [*SECTIONS, _AGENTS], "no section")
            )
        known = [setting.name for setting in SECTIONS[section]]
        for name in lines:
            if name not in known:
                raise BadSetting(setting=f"{name} in {path}", problem=_suggest(name, known, f"unknown in [{section}]"))
        found[section] = {name: _to_text(value) for name, value in lines.items()}
    return found, profiles


def _suggest(name: str, known: Sequence[str] | Mapping[str, object], problem: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{problem}; did you mean {near[0]}?" if near else f"{problem}; known are {', '.join(known)}"


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def default_data_root(environ: Mapping[str, str], *, is_root: bool) -> Path:
    """Where everything of a local installation lives."""
    if is_root:
        return Path("/var/lib/fuse")
    base = environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "fuse"


def default_file(environ: Mapping[str, str]) -> Path | None:
    """The settings file: $FUSE_CONFIG, else the user's, else the system's; None when none is there."""
    if environ.get("FUSE_CONFIG"):
        return Path(environ["FUSE_CONFIG"])
    folders = [Path("/etc")]
    if environ.get("XDG_CONFIG_HOME"):
        folders.insert(0, Path(environ["XDG_CONFIG_HOME"]))
    else:
        with contextlib.suppress(RuntimeError):  # a user without an entry or a home, as a service may run as
            folders.insert(0, Path.home() / ".config")
    paths = [folder / "fuse" / "fuse.toml" for folder in folders]
    return next((path for path in paths if path.is_file()), None)

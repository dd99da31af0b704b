"""What an installation does is decided by what is there: nothing twice, and after a crash the rest."""

from pathlib import Path

import msgspec
import pytest

from fusevm.cli.install import steps
from fusevm.cli.install.env_file import parse_env, render_env
from fusevm.cli.install.plan import (
    CONTROL_UNIT,
    HOST_UNIT,
    ControlWanted,
    Facts,
    Places,
    UnitFacts,
    Wanted,
    control_url,
    plan_control,
    plan_host,
    plan_uninstall,
    plan_upgrade,
    render_tls,
)
from fusevm.host.vmm.firecracker.pins import KERNELS, RELEASES, release_folder

PLACES = Places()
PROGRAM = Path("/opt/fuse/new/bin/fuse")
WANTED = Wanted(
    program=PROGRAM,
    units={HOST_UNIT: "the host's", CONTROL_UNIT: "the control plane's"},
    settings={"FUSE_DRIVER": "auto"},
    image="debian-12",
)
BARE = Facts(
    architecture="x86_64",
    missing_packages=("nftables", "qemu-system-x86"),
    units={HOST_UNIT: UnitFacts(), CONTROL_UNIT: UnitFacts()},
)
SECRETS = {"ORCH_AUTH_TOKEN": "fresh-token", "TOKEN_ENCRYPTION_KEY": "f" * 64}
CONTROL = ControlWanted(settings={"ORCH_REQUIRE_AUTH": "true", "DATABASE_URL": "sqlite:///x"}, fresh=SECRETS)


def carry_out(step: steps.Step, facts: Facts) -> Facts:
    """What is there after a step that did what it says."""
    change = msgspec.structs.replace
    units = dict(facts.units)
    match step:
        case steps.InstallPackages():
            return change(facts, missing_packages=())
        case steps.GetFile():
            return change(facts, has_downloads=True)
        case steps.UnpackRelease():
            return change(facts, has_release=True)
        case steps.StoreKernel():
            return change(facts, has_firecracker_kernel=True)
        case steps.FetchKernel():
            return change(facts, has_kernel=True)
        case steps.BuildImage():
            return change(facts, has_image=True)
        case steps.SweepBuilds(root=root):
            return change(facts, littered=tuple(one for one in facts.littered if one != root))
        case steps.MakeToken():
            return change(facts, has_token=True)
        case steps.LinkProgram(link=PLACES.previous, target=target):
            return change(facts, previous=target)
        case steps.LinkProgram(target=target):
            stale = {name: change(unit, is_stale=True) for name, unit in units.items()}
            return change(facts, link_target=target, units=stale)
        case steps.WriteFile(path=path, text=text):
            return _write(facts, path, text)
        case steps.ReloadSystemd():
            return change(facts, units={name: change(unit, needs_reload=False) for name, unit in units.items()})
        case steps.Enable(unit=name):
            return change(facts, units={**units, name: change(units[name], is_enabled=True)})
        case steps.Start(unit=name):
            return change(facts, units={**units, name: change(units[name], is_active=True, is_stale=False)})
        case steps.AwaitHost():
            return change(facts, units={**units, HOST_UNIT: change(units[HOST_UNIT], is_serving=True)})
        case steps.AwaitControl():
            return change(facts, units={**units, CONTROL_UNIT: change(units[CONTROL_UNIT], is_serving=True)})
        case steps.RemovePath(path=path):
            left = tuple(one for one in facts.programs if one != path)
            previous = None if path == PLACES.previous else facts.previous
            has_downloads = facts.has_downloads and path != PLACES.downloads
            return change(facts, has_downloads=has_downloads, programs=left, previous=previous)
        case _:
            return facts


def _write(facts: Facts, path: Path, text: str) -> Facts:
    change, units = msgspec.structs.replace, dict(facts.units)
    if path == PLACES.packages:
        return change(facts, packages=text)
    for name, env in ((HOST_UNIT, PLACES.host_env), (CONTROL_UNIT, PLACES.control_env)):
        if path == PLACES.units / name:
            changed = change(units[name], text=text, needs_reload=True, is_stale=True)
            return change(facts, units={**units, name: changed})
        if path == env:
            units[name] = change(units[name], is_stale=True)
            return change(facts, units=units, **{f"{env.stem}_env": text})
    assert path == PLACES.tls_drop_in
    units[CONTROL_UNIT] = change(units[CONTROL_UNIT], drop_in=text, needs_reload=True, is_stale=True)
    return change(facts, units=units)


def kinds(plan: list[steps.Step]) -> list[str]:
    return [type(step).__name__ for step in plan]


def finish(facts: Facts) -> Facts:
    for step in plan_host(WANTED, facts, PLACES):
        facts = carry_out(step, facts)
    return facts


def test_a_bare_machine_gets_everything_in_the_order_in_which_it_is_needed():
    assert kinds(plan_host(WANTED, BARE, PLACES)) == [
        "WriteFile",
        "InstallPackages",
        "GetFile",
        "UnpackRelease",
        "GetFile",
        "StoreKernel",
        "FetchKernel",
        "BuildImage",
        "RemovePath",
        "MakeToken",
        "LinkProgram",
        "WriteFile",
        "WriteFile",
        "ReloadSystemd",
        "Enable",
        "Start",
        "AwaitHost",
    ]


def test_nothing_is_left_to_do_on_a_finished_host():
    assert plan_host(WANTED, finish(BARE), PLACES) == []


@pytest.mark.parametrize("steps_done", range(17))
def test_a_run_that_was_killed_is_finished_by_the_next(steps_done: int):
    facts = BARE
    for step in plan_host(WANTED, facts, PLACES)[:steps_done]:
        facts = carry_out(step, facts)
    finished = finish(facts)
    assert finished == finish(BARE)
    assert plan_host(WANTED, finished, PLACES) == []


def test_what_a_killed_build_has_left_goes_although_what_it_built_is_there():
    facts = msgspec.structs.replace(finish(BARE), littered=(Path("/var/lib/fuse/kernels"),))
    plan = plan_host(WANTED, facts, PLACES)
    assert plan == [steps.SweepBuilds(root=Path("/var/lib/fuse/kernels"))]
    assert plan_host(WANTED, carry_out(plan[0], facts), PLACES) == []


def test_a_program_that_has_not_served_yet_is_replaced_by_the_one_that_has():
    """Whatever was killed in between, `previous` names the last one that served until another one does."""
    done = finish(BARE)
    wanted = msgspec.structs.replace(WANTED, program=Path("/opt/fuse/newer/bin/fuse"))
    keep, relink, *_ = plan_upgrade(wanted, done, PLACES)
    assert (keep, relink) == (
        steps.LinkProgram(link=PLACES.previous, target=PROGRAM),
        steps.LinkProgram(link=PLACES.link, target=wanted.program),
    )
    killed = carry_out(relink, carry_out(keep, done))
    assert kinds(plan_upgrade(wanted, killed, PLACES)) == ["Start", "AwaitHost", "RemovePath"]
    newest = msgspec.structs.replace(WANTED, program=Path("/opt/fuse/newest/bin/fuse"))
    links = [step for step in plan_upgrade(newest, killed, PLACES) if isinstance(step, steps.LinkProgram)]
    assert links == [steps.LinkProgram(link=PLACES.link, target=newest.program)]


def test_a_service_that_runs_an_older_state_of_things_is_started_again():
    done = finish(BARE)
    stale = msgspec.structs.replace(done.units[HOST_UNIT], is_stale=True)
    facts = msgspec.structs.replace(done, units={**done.units, HOST_UNIT: stale})
    assert kinds(plan_host(WANTED, facts, PLACES)) == ["Start", "AwaitHost"]


def test_a_service_that_does_not_answer_yet_is_waited_for():
    done = finish(BARE)
    silent = msgspec.structs.replace(done.units[HOST_UNIT], is_serving=False)
    facts = msgspec.structs.replace(done, units={**done.units, HOST_UNIT: silent})
    assert kinds(plan_host(WANTED, facts, PLACES)) == ["AwaitHost"]


def test_what_was_brought_here_is_not_downloaded():
    names = frozenset(
        {RELEASES["x86_64"].name, KERNELS["x86_64"].name, "debian-12.tar.zst", "linux-image-6.deb", "x.deb"}
    )
    facts = msgspec.structs.replace(BARE, local=names)
    wanted = msgspec.structs.replace(WANTED, source=Path("/media/usb"))
    plan = plan_host(wanted, facts, PLACES)
    assert [step.source for step in plan if isinstance(step, steps.GetFile)] == [
        Path("/media/usb") / RELEASES["x86_64"].name,
        Path("/media/usb") / KERNELS["x86_64"].name,
    ]
    assert [step.packages for step in plan if isinstance(step, steps.FetchKernel)] == [
        (Path("/media/usb/linux-image-6.deb"),)
    ]
    assert [step.source for step in plan if isinstance(step, steps.BuildImage)] == [
        Path("/media/usb/debian-12.tar.zst")
    ]


def test_a_mirror_is_asked_for_the_same_bytes():
    wanted = msgspec.structs.replace(WANTED, mirror="http://mirror.example/fc/")
    release = next(step for step in plan_host(wanted, BARE, PLACES) if isinstance(step, steps.GetFile))
    assert release.pin.url == f"http://mirror.example/fc/{RELEASES['x86_64'].name}"
    assert release.pin.sha256 == RELEASES["x86_64"].sha256


def test_another_digest_is_that_of_the_named_file_only():
    wanted = msgspec.structs.replace(WANTED, digests={RELEASES["x86_64"].name: "a" * 64})
    gets = [step.pin.sha256 for step in plan_host(wanted, BARE, PLACES) if isinstance(step, steps.GetFile)]
    assert gets == ["a" * 64, KERNELS["x86_64"].sha256]


def test_without_firecracker_nothing_of_it_is_fetched_or_set():
    wanted = msgspec.structs.replace(WANTED, has_firecracker=False)
    plan = plan_host(wanted, BARE, PLACES)
    assert not {"GetFile", "UnpackRelease", "StoreKernel", "RemovePath"} & set(kinds(plan))
    assert not [step for step in plan if isinstance(step, steps.WriteFile) and "BINARY_PATH" in step.text]


def test_the_daemon_is_told_where_its_programs_are_and_keeps_what_an_administrator_wrote():
    facts = msgspec.structs.replace(BARE, host_env="# ours\nFUSE_DRIVER=qemu\nHTTPS_PROXY=http://p:1\n")
    (text,) = [s.text for s in plan_host(WANTED, facts, PLACES) if getattr(s, "path", None) == PLACES.host_env]
    assert text.startswith("# ours\nFUSE_DRIVER=auto\nHTTPS_PROXY=http://p:1\n")
    assert parse_env(text)["FIRECRACKER_BINARY_PATH"] == str(release_folder(PLACES.data) / "firecracker")
    assert parse_env(text)["JAILER_BINARY_PATH"] == str(release_folder(PLACES.data) / "jailer")


def test_only_aarch64_hosts_do_without_qemus_kernel():
    facts = msgspec.structs.replace(BARE, architecture="aarch64")
    assert "FetchKernel" not in kinds(plan_host(WANTED, facts, PLACES))


def test_an_upgrade_moves_both_services_and_removes_old_programs_last():
    facts = finish(BARE)
    for step in plan_control(WANTED, CONTROL, facts, PLACES):
        facts = carry_out(step, facts)
    programs = (Path("/opt/fuse/new"), Path("/opt/fuse/newer"))
    facts = msgspec.structs.replace(facts, programs=programs)
    wanted = msgspec.structs.replace(WANTED, program=Path("/opt/fuse/newer/bin/fuse"))
    plan = plan_upgrade(wanted, facts, PLACES)
    host, control = ["Start", "AwaitHost", "RemovePath"], ["Start", "AwaitControl"]
    assert kinds(plan) == ["LinkProgram", "LinkProgram", *host, *control, "RemovePath"]
    assert plan[-1] == steps.RemovePath(path=Path("/opt/fuse/new"))
    for step in plan:
        facts = carry_out(step, facts)
    assert plan_upgrade(wanted, facts, PLACES) == []


def test_a_control_plane_gets_keys_once_and_keeps_them():
    facts = finish(BARE)
    plan = plan_control(WANTED, CONTROL, facts, PLACES)
    assert kinds(plan) == ["WriteFile", "WriteFile", "ReloadSystemd", "Enable", "Start", "AwaitControl"]
    for step in plan:
        facts = carry_out(step, facts)
    assert parse_env(facts.control_env) == {**SECRETS, **CONTROL.settings}
    again = msgspec.structs.replace(CONTROL, fresh={"ORCH_AUTH_TOKEN": "other", "TOKEN_ENCRYPTION_KEY": "0" * 64})
    assert plan_control(WANTED, again, facts, PLACES) == []
    moved = msgspec.structs.replace(again, settings={**CONTROL.settings, "DATABASE_URL": "postgresql://db"})
    plan = plan_control(WANTED, moved, facts, PLACES)
    assert kinds(plan) == ["WriteFile", "Start", "AwaitControl"]
    for step in plan:
        facts = carry_out(step, facts)
    assert parse_env(facts.control_env) == {**SECRETS, **moved.settings}


def test_its_certificate_is_handed_over_by_systemd_and_stays_on_a_repetition():
    facts = finish(BARE)
    wanted = msgspec.structs.replace(CONTROL, tls=(Path("/etc/ssl/a.pem"), Path("/etc/ssl/private/a.key")))
    plan = plan_control(WANTED, wanted, facts, PLACES)
    assert plan[-1] == steps.AwaitControl(url="https://127.0.0.1:8080")
    for step in plan:
        facts = carry_out(step, facts)
    text = facts.units[CONTROL_UNIT].drop_in
    assert text == render_tls(Path("/etc/ssl/a.pem"), Path("/etc/ssl/private/a.key"))
    assert "LoadCredential=tls.key:/etc/ssl/private/a.key" in text
    assert plan_control(WANTED, CONTROL, facts, PLACES) == []


@pytest.mark.parametrize(
    ("listen", "has_tls", "name", "url"),
    [
        ("127.0.0.1:8080", False, "", "http://127.0.0.1:8080"),
        (":9000", False, "", "http://127.0.0.1:9000"),
        ("0.0.0.0:443", True, "fuse.example.com", "https://fuse.example.com:443"),
        ("[::]:8080", False, "", "http://[::1]:8080"),
    ],
)
def test_the_address_of_the_control_plane_is_one_that_can_be_connected_to(listen, has_tls, name, url):
    assert control_url({"ORCH_LISTEN": listen}, has_tls=has_tls, name=name) == url


def full(**changes: object) -> Facts:
    facts = finish(BARE)
    for step in plan_control(WANTED, CONTROL, facts, PLACES):
        facts = carry_out(step, facts)
    existing = {PLACES.units / HOST_UNIT, PLACES.units / CONTROL_UNIT, PLACES.run, PLACES.data, PLACES.data_root}
    existing |= {PLACES.settings, PLACES.control_data, PLACES.downloads, PLACES.link}
    return msgspec.structs.replace(facts, existing=frozenset(existing), programs=(Path("/opt/fuse/new"),), **changes)


def removed(plan: list[steps.Step]) -> set[Path]:
    return {step.path for step in plan if isinstance(step, steps.RemovePath)}


def test_an_uninstallation_stops_first_and_leaves_nothing():
    plan = plan_uninstall(full(), PLACES, keeps_data=False)
    assert kinds(plan)[:3] == ["Stop", "Stop", "EndMachines"]
    assert [step.unit for step in plan if isinstance(step, steps.Stop)] == [CONTROL_UNIT, HOST_UNIT]
    assert full().existing - {PLACES.downloads} <= removed(plan)
    facts = full()
    whole = msgspec.structs.replace(facts, existing=facts.existing | {PLACES.programs})
    assert plan_uninstall(whole, PLACES, keeps_data=False)[-1] == steps.RemovePath(path=PLACES.programs)
    assert plan[-2:] == [steps.RemovePath(path=PLACES.link), steps.RemovePath(path=Path("/opt/fuse/new"))]


def test_what_is_kept_are_data_settings_and_keys():
    gone = removed(plan_uninstall(full(), PLACES, keeps_data=True))
    assert not gone & {PLACES.data, PLACES.data_root, PLACES.settings, PLACES.control_data}
    assert {PLACES.units / HOST_UNIT, PLACES.link} <= gone


def test_a_folder_that_the_administrator_chose_is_not_removed():
    places = msgspec.structs.replace(PLACES, data=Path("/srv/images"), chosen=frozenset({Path("/srv/images")}))
    facts = full()
    facts = msgspec.structs.replace(facts, existing=facts.existing | {Path("/srv/images")})
    assert Path("/srv/images") not in removed(plan_uninstall(facts, places, keeps_data=False))


def test_there_is_nothing_to_remove_where_nothing_is():
    assert plan_uninstall(BARE, PLACES, keeps_data=False) == []


@pytest.mark.parametrize("value", ["plain", "two words", 'a "quote"', "back\\slash", "#no comment", "", "$HOME `x`"])
def test_what_is_written_is_what_is_read(value: str):
    text = render_env("A=1\n", {"B": value})
    assert parse_env(text) == {"A": "1", "B": value}
    assert render_env(text, {"B": value}) == text


def test_lines_of_others_stay_where_they_are():
    text = "# comment\n\nA=1\n; also one\nB='old'\nA=2\n"
    assert render_env(text, {"A": "3"}) == "# comment\n\nA=3\n; also one\nB='old'\n"
    assert parse_env(text) == {"A": "2", "B": "old"}

"""`fuse env`: create, list, show, drain and remove environments, and watch their events."""

import time
from typing import TYPE_CHECKING, Any

import click

from fusevm.cli.bringing import BRINGING, bringing_options, brought_fields
from fusevm.cli.failures import OTHER, USAGE, CliError, report
from fusevm.cli.networking import network_options, policy_options, read_policy, read_ports
from fusevm.cli.options import Duration, Size, State, api_options, environment_argument, environment_id, variables
from fusevm.cli.output import print_json, print_json_line, print_record, print_table, say
from fusevm.model.environment import TERMINAL
from fusevm.model.environment import State as EnvironmentState
from fusevm.sdk.choices import make_task_id
from fusevm.sdk.words import describe_network, format_age, record
from fusevm.wire.rest import EnvironmentBody, EventBody

if TYPE_CHECKING:
    from fusevm.sdk.core import CreateFields

_COLUMNS = ("id", "state", "image", "cpus", "ram", "disk", "host", "age")


@click.group()
def env() -> None:
    """Create, list, show, drain and remove environments."""


def sizing_options(function: Any) -> Any:
    """The options that say what an environment is made of; shared by `env create` and `run`."""
    options = (
        click.option("--cpus", type=click.IntRange(1), help="Virtual CPUs."),
        click.option("--ram", type=Size(1), metavar="SIZE", help="Memory, such as 512M or 2G."),
        click.option("--disk", type=Size(1024), metavar="SIZE", help="Writable disk, such as 4G."),
        click.option("--region", metavar="NAME", help="Only hosts of this region."),
        click.option("--host", "host_id", metavar="ID", help="Only this host."),
        click.option("--label", "labels", multiple=True, metavar="K=V", help="Only hosts with this label. Repeatable."),
        click.option(
            "--max-runtime",
            type=Duration(unlimited=True),
            metavar="TIME",
            help="End after this long: 30m, 2h or unlimited. Default 2h.",
        ),
        click.option("--idle-timeout", type=Duration(minimum_s=60), metavar="TIME", help="End after this idle time."),
    )
    function = network_options(function)
    for option in reversed(options):
        function = option(function)
    return function


def create_fields(
    *,
    image: str | None,
    cpus: int | None,
    ram: int | None,
    disk: int | None,
    region: str | None,
    host_id: str | None,
    labels: tuple[str, ...],
    max_runtime: float | str | None,
    idle_timeout: float | None,
    no_internet: bool,
    allow: tuple[str, ...],
    deny: tuple[str, ...],
    publish: tuple[str, ...],
) -> "CreateFields":
    """The sizing options as the client's keywords."""
    return {
        "image": image or "",
        "cpus": cpus or 0,
        "ram_mb": ram or 0,
        "storage_gb": disk or 0,
        "region": region or "",
        "host_id": host_id or "",
        "labels": variables(labels, "--label"),
        "max_runtime_seconds": max_runtime if isinstance(max_runtime, str) else round(max_runtime or 0),
        "idle_timeout_seconds": round(idle_timeout or 0),
        "network": read_policy(no_internet=no_internet, allow=allow, deny=deny),
        "expose": read_ports(publish),
    }


@env.command()
@click.argument("image", required=False)
@click.option("--task-id", metavar="ID", help="Name of the environment. Default: a random one.")
@sizing_options
@bringing_options
@click.option("--no-wait", is_flag=True, help="Return at once, state provisioning.")
@api_options
def create(
    *,
    state: State,
    image: str | None,
    task_id: str | None,
    no_wait: bool,
    **options: Any,
) -> None:
    """Create an environment from IMAGE and print its id."""
    brought = {name: options.pop(name) for name in BRINGING}
    fields = create_fields(image=image, **options) | brought_fields(**brought)
    task = task_id or make_task_id()
    with state.client() as fuse:
        made = fuse.environments.begin(task, **fields) if no_wait else fuse.environments.create(task, **fields)
    if state.is_json:
        print_json(made)
        return
    print(made.id)
    if made.timings is not None and made.state == EnvironmentState.RUNNING:
        total = made.timings.schedule_ms + made.timings.host_ms
        say(f"{made.state} on host {made.host_id} after {total:.0f} ms")


@env.command(name="list")
@click.option("--task-id", default="", metavar="ID", help="Only of this task.")
@click.option(
    "--state",
    "wanted",
    type=click.Choice([state.value for state in EnvironmentState]),
    help="Only in this state; destroyed and failed show ended ones.",
)
@click.option("--host", "host_id", default="", metavar="ID", help="Only on this host.")
@click.option("--ended", is_flag=True, help="Ended environments instead of live ones.")
@click.option("-q", "--quiet", is_flag=True, help="Ids only.")
@api_options
def list_(*, state: State, task_id: str, wanted: str | None, host_id: str, ended: bool, quiet: bool) -> None:
    """List live environments."""
    ended = ended or wanted in TERMINAL
    with state.client() as fuse:
        found = list(fuse.environments.list(task_id=task_id, state=wanted or "", host_id=host_id, ended=ended))
    if state.is_json:
        print_json(found)
    elif quiet:
        for one in found:
            print(one.uid if ended else one.id)
    else:
        columns = (*_COLUMNS, "reason", "uid") if ended else _COLUMNS
        print_table(columns, [_row(one, time.time(), ended=ended) for one in found])


def _row(one: EnvironmentBody, now_s: float, *, ended: bool) -> tuple[str, ...]:
    spec = one.spec
    row = (
        one.id,
        one.state,
        spec.image,
        str(spec.cpus),
        f"{spec.ram_mb} MiB",
        f"{spec.storage_gb} GiB",
        one.host_id,
        format_age(one.created_at, now_s),
    )
    return (*row, one.reason, one.uid) if ended else row


@env.command()
@environment_argument
@click.option("--uid", default="", help="Exactly this one, ended or not.")
@api_options
def get(*, state: State, env_id: str, uid: str) -> None:
    """Show one environment."""
    with state.client() as fuse:
        one = fuse.environments.get(environment_id(env_id), uid=uid)
    if state.is_json:
        print_json(one)
        return
    print_record(record(one))


@env.command()
@click.argument("env_ids", metavar="ENV...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All live environments.")
@click.option("--no-wait", is_flag=True, help="Do not wait until they are gone.")
@api_options
def rm(*, state: State, env_ids: tuple[str, ...], everything: bool, no_wait: bool) -> int:
    """Destroy environments. Goes on after a failure, and ends with its code."""
    if bool(env_ids) == everything:
        raise click.UsageError("name the environments, or say --all")
    from fusevm.cli.removing import remove_all  # noqa: PLC0415 - threads, for this command only

    with state.client() as fuse:
        names = [one.id for one in fuse.environments.list()] if everything else [environment_id(i) for i in env_ids]
        return remove_all(fuse, names, wait=not no_wait, is_json=state.is_json)


@env.command()
@environment_argument
@api_options
def drain(*, state: State, env_id: str) -> int:
    """Begin the end: the daemon is drained, and the machine stays for inspection until it is removed."""
    with state.client() as fuse:
        one = fuse.environments.drain(environment_id(env_id))
    if state.is_json:
        print_json(one)
    else:
        print(f"{one.id} is {one.state}")
    if one.error:
        report(f"{one.id} was not drained well: {one.error}")
    return OTHER if one.error else 0


@env.command()
@environment_argument
@click.option("--internet", is_flag=True, help="Everything but what is denied.")
@policy_options
@api_options
def network(*, state: State, env_id: str, internet: bool, **options: Any) -> None:
    """Change what a running environment may reach; without options, show it."""
    name = environment_id(env_id)
    policy = read_policy(**options) | ({"internet": True} if internet else {})
    with state.client() as fuse:
        one = fuse.environments.change_network(name, policy) if policy else fuse.environments.get(name)
    if state.is_json:
        print_json(one.network)
        return
    print_record([("environment", one.id), *describe_network(one)])


@env.command(name="rotate-token")
@environment_argument
@api_options
def rotate_token(*, state: State, env_id: str) -> None:
    """Give the daemon a new token and start it again. Without a daemon there is nothing to do."""
    name = environment_id(env_id)
    with state.client() as fuse:
        is_done = fuse.environments.rotate_token(name)
    if state.is_json:
        print_json({"id": name, "rotated": is_done})
    else:
        print(name if is_done else f"{name}: still under way")


@env.command()
@click.argument("env_id", metavar="[ENV]", required=False)
@click.option("--since", default="", metavar="EVENT", help="What came after this event id first.")
@click.option("--uid", default="", help="Exactly this one, ended or not.")
@api_options
def events(*, state: State, env_id: str | None, since: str, uid: str) -> None:
    """Follow the events of one environment until it ends, or of all. `-o json` gives a line per event."""
    if uid and not env_id:
        raise CliError("--uid needs ENV", code=USAGE)
    with state.client() as fuse:
        name = environment_id(env_id) if env_id else ""
        for event in fuse.environments.events(name, uid=uid, last_event_id=since):
            if state.is_json:
                print_json_line(event)
            else:
                print(event_line(event), flush=True)


def event_line(event: EventBody) -> str:
    """One event as a line."""
    words = [event.updated_at, f"{event.vm_id:<24}", event.event if event.event != "state" else "", event.state]
    words += [f"({event.reason})" if event.reason else "", event.message or event.error]
    words += [f"{name}={value}" for name, value in event.data.items()]
    return " ".join(word for word in words if word)

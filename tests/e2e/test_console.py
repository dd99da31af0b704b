"""The web console in a real browser: a real control plane with its stub host, the console as a real process."""

import http.client
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_window import BrowserWindow, browser
from clean_environ import clean_environ
from console_process import ConsoleProcess, children, control_plane, environ_of, free_address, running_console
from fake_api import FakeApi
from selenium.webdriver.common.keys import Keys
from terminal_window import FUSE
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from fusevm.sdk import Fuse
from fusevm.wire.rest import EventBody

pytestmark = [pytest.mark.timeout(600), pytest.mark.shared_stack]
EVIL = '<img src=x onerror="document.title=1"><b>bold</b>'


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserWindow]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def control_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with control_plane(tmp_path_factory.mktemp("control")) as server:
        yield server.url


@pytest.fixture
def fuse(control_url: str) -> Iterator[Fuse]:
    with Fuse(control_url) as client:
        yield client


@pytest.fixture(scope="module")
def console(control_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ConsoleProcess]:
    folder = tmp_path_factory.mktemp("console")
    with running_console(folder, environ_of(folder, control_url)) as running:
        yield running


@pytest.fixture
def page(window: BrowserWindow, console: ConsoleProcess) -> Iterator[BrowserWindow]:
    """The browser at the list of environments."""
    window.complaints()
    window.open(console.address)
    window.wait_for_text("live")
    yield window
    assert window.complaints() == []
    window.open("about:blank")


# -- the pages -------------------------------------------------------------------------------------------------------


def test_the_list_shows_what_is_created_elsewhere_and_follows_it(page: BrowserWindow, fuse: Fuse) -> None:
    fuse.environments.create("listed", image="debian-12", cpus=3, ram_mb=1536)
    row = page.find("tr", "fuse-listed running")
    assert re.fullmatch(r"fuse-listed running stub debian-12 3 1\.5 GiB \d+[sm]\nDestroy", row.text)
    fuse.environments.delete("fuse-listed")
    page.wait_until_gone("tr", "fuse-listed")


def test_ended_environments_are_behind_a_switch(page: BrowserWindow, fuse: Fuse) -> None:
    ended = fuse.environments.create("ended")
    fuse.environments.delete(ended.id)
    page.wait_until_gone("tr", f"{ended.id} running")
    page.click(".q-toggle", "Show ended")
    page.find("tr", f"{ended.id} destroyed deleted")
    page.click(f"a[href*='{ended.uid}']")
    page.wait_for_text("it was destroyed (deleted)")
    assert page.find(".fuse-state", "destroyed")
    assert not page.find("[aria-label=Command]").is_enabled()


def test_an_environment_is_made_by_the_form(page: BrowserWindow, fuse: Fuse) -> None:
    page.click("button", "New environment")
    page.type("[aria-label='Task id']", "by-form")
    page.type("[aria-label=Image]", "debian-12")
    page.type("[aria-label=CPUs]", "2")
    page.type("[aria-label='Memory (MiB)']", "768")
    page.click("button", "Create")
    page.find(".fuse-title", "fuse-by-form")
    page.wait_for_text("2 vCPU, 768 MiB memory, 4 GiB disk")
    page.wait_for_text("the machine came up")
    spec = fuse.environments.get("fuse-by-form").spec
    assert (spec.image, spec.cpus, spec.ram_mb) == ("debian-12", 2, 768)


def test_what_the_api_refuses_is_said_in_its_sentence(page: BrowserWindow) -> None:
    page.click("button", "New environment")
    page.type("[aria-label='Task id']", "no spaces please" + Keys.ENTER)
    page.find(".fuse-dialog .fuse-problem", "task_id 'no spaces please' is not usable")


def test_changes_appear_on_the_page_of_an_environment(page: BrowserWindow, console: ConsoleProcess, fuse: Fuse) -> None:
    fuse.environments.create("watched")
    page.open(f"{console.origin}/environments/fuse-watched")
    page.find(".fuse-state", "running")
    fuse.environments.drain("fuse-watched")
    page.find(".fuse-state", "draining")
    page.wait_for_text("draining began")
    fuse.environments.delete("fuse-watched")
    page.find(".fuse-state", "destroyed")
    page.wait_for_text("state=destroyed reason=deleted")
    page.wait_until_gone("button", "Destroy")


def test_a_command_is_run_and_its_output_is_text(page: BrowserWindow, console: ConsoleProcess, fuse: Fuse) -> None:
    fuse.environments.create("commanded", image=EVIL)
    page.find("tr", EVIL)
    page.open(f"{console.origin}/environments/fuse-commanded")
    page.type("[aria-label=Command]", f"echo {EVIL}" + Keys.ENTER)
    assert page.find(".fuse-stdout").text == f"stub host: echo {EVIL}"
    assert page.find(".fuse-result .fuse-verdict").text.startswith("exit status 0,")
    page.find(".fuse-record dd", EVIL)
    assert page.run("return document.querySelectorAll('main img, main b').length") == 0
    assert page.driver.title == "Environment · Fuse"


def test_an_environment_is_destroyed_after_a_question(page: BrowserWindow, fuse: Fuse) -> None:
    doomed = fuse.environments.create("doomed")
    kept = fuse.environments.create("kept")
    page.click(f"tr:has(a[href*='{doomed.uid}']) button")
    page.find(".fuse-dialog", "Destroy fuse-doomed?")
    page.click(".fuse-dialog button", "Cancel")
    page.wait_until_gone(".fuse-dialog")
    assert fuse.environments.get(doomed.id).state == "running"
    page.click(f"tr:has(a[href*='{doomed.uid}']) button")
    page.click(".fuse-dialog button", "Destroy")
    page.wait_until_gone("tr", doomed.id)
    page.click(f"a[href*='{kept.uid}']")
    page.find(".fuse-title", kept.id)
    page.click("button", "Destroy")
    page.click(".fuse-dialog button", "Destroy")
    page.find(".fuse-state", "destroyed")


def test_hosts_show_health_and_allocation(page: BrowserWindow, fuse: Fuse) -> None:
    fuse.environments.create("on-a-host", cpus=5)
    page.click("nav a", "Hosts")
    row = page.find("tr", "stub")
    assert "ok active" in row.text
    used = next(fuse.hosts.list()).allocated.cpus
    page.find("tr", f"{used} of 1,048,576")


def test_what_does_not_exist_is_said(page: BrowserWindow, console: ConsoleProcess) -> None:
    page.open(f"{console.origin}/environments/fuse-never%3Cb%3Ewas")
    page.find(".fuse-problem", "There is no environment 'fuse-never<b>was'")
    page.find(".fuse-title", "fuse-never<b>was")


def test_the_theme_is_kept(page: BrowserWindow, console: ConsoleProcess) -> None:
    page.click("[aria-label=Theme]")
    page.find("body.body--dark")
    page.open(f"{console.origin}/hosts")
    page.find("body.body--dark")
    page.click("[aria-label=Theme]")
    page.find("body.body--light")
    page.click("[aria-label=Theme]")
    page.wait(lambda: "fuse-theme=auto" in page.run("return document.cookie"), "the theme is not automatic again")


def test_pages_ask_nobody_but_the_console(window: BrowserWindow, console: ConsoleProcess, fuse: Fuse) -> None:
    fuse.environments.create("private")
    window.requests()
    for path in ("/", "/hosts", "/environments/fuse-private", "/nowhere"):
        window.open(f"{console.origin}{path}?key={console.key}")
        window.wait(lambda: "Fuse" in window.text or "exist" in window.text, f"{path} shows nothing")
    asked = window.requests()
    assert any(address.startswith("ws:") for address in asked)
    ours = (f"{console.origin}/", f"ws://{console.authority}/")
    assert [address for address in asked if not address.startswith(ours)] == []
    window.open("about:blank")


# -- a machine that really runs commands, on the fake of the client's tests ----------------------------------------


def test_output_errors_logs_and_events_of_a_machine_are_text(
    window: BrowserWindow, api: FakeApi, environ: dict[str, str], tmp_path: Path
) -> None:
    api.log = b"\x1b[1;32mbooted\x1b[0m\r\n" + EVIL.encode() + b"\n"
    api.events = [
        EventBody(id="u.1", event="state", vm_id="fuse-a", uid="u", state="failed", error=EVIL, updated_at="T")
    ]
    with running_console(tmp_path, environ) as console:
        window.open(f"{console.origin}/environments/fuse-a?key={console.key}")
        window.find(".fuse-log", f"booted\n{EVIL}")
        window.find(".fuse-story li", f"it failed: {EVIL}")
        window.type("[aria-label=Command]", f"echo out; echo '{EVIL}' >&2; exit 37" + Keys.ENTER)
        assert window.find(".fuse-stderr").text == EVIL
        assert window.find(".fuse-stdout").text == "out"
        assert window.find(".fuse-verdict.bad").text.startswith("exit status 37,")
        assert window.run("return document.querySelectorAll('main img, main b').length") == 0
        window.open("about:blank")
        assert "Traceback" not in console.said


def test_a_wrong_token_is_said(window: BrowserWindow, api: FakeApi, tmp_path: Path) -> None:
    with running_console(tmp_path, environ_of(tmp_path, api.url, "wrong")) as console:
        window.open(console.address)
        window.find(".fuse-banner", "does not take this console's token")
        window.open("about:blank")


# -- when something goes away ------------------------------------------------------------------------------------------


def test_a_control_plane_that_goes_away_is_said_and_found_again(window: BrowserWindow, tmp_path: Path) -> None:
    address, database = free_address(), str(tmp_path / "fuse.db")
    options = ("--listen", address, "--database", database)
    with running_console(tmp_path / "console", environ_of(tmp_path, f"http://{address}")) as console:
        window.open(console.address)
        window.find(".fuse-banner", f"Nothing answers at http://{address}")
        with control_plane(tmp_path, *options) as server, Fuse(server.url) as client:
            window.wait_until_gone(".fuse-banner")
            client.environments.create("survivor")
            window.find("tr", "fuse-survivor")
            server.end(signal.SIGKILL)
            window.find(".fuse-banner", f"http://{address}")
            assert window.find("tr", "fuse-survivor")
        with control_plane(tmp_path, *options) as server, Fuse(server.url) as client:
            window.wait_until_gone(".fuse-banner")
            client.environments.create("newcomer")
            window.find("tr", "fuse-newcomer")
        window.open("about:blank")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_console_ends_without_leftovers(
    window: BrowserWindow, control_url: str, tmp_path: Path, number: signal.Signals
) -> None:
    with running_console(tmp_path, environ_of(tmp_path, control_url)) as console:
        window.open(console.address)
        window.wait_for_text("live")
        assert children(console.process.pid) == []
        assert console.end(number) == 0
        assert list(console.folder.iterdir()) == []
        assert console.said.splitlines() == [
            f"Console  {console.address}",
            f"Shows    {control_url}",
            "Ctrl-C ends it",
        ]
        with pytest.raises(ConnectionRefusedError):
            ask(console, "/")
        window.open("about:blank")


# -- who may come in ---------------------------------------------------------------------------------------------------


def ask(console: ConsoleProcess, path: str, **headers: str) -> http.client.HTTPResponse:
    """One request as a program sends it, to the loopback address whatever Host says."""
    connection = http.client.HTTPConnection("127.0.0.1", int(console.authority.rpartition(":")[2]), timeout=60)
    try:
        connection.request("GET", path, headers={"Host": console.authority} | headers)
        answer = connection.getresponse()
        answer.body = answer.read().decode()  # type: ignore[attr-defined]
        return answer
    finally:
        connection.close()


def cookie_of(console: ConsoleProcess) -> str:
    welcome = ask(console, f"/?key={console.key}")
    assert (welcome.status, welcome.headers["Location"]) == (303, "/")
    assert "HttpOnly" in welcome.headers["Set-Cookie"]
    return welcome.headers["Set-Cookie"].partition(";")[0]


def test_only_who_has_the_key_comes_in(console: ConsoleProcess) -> None:
    for path in ("/", "/hosts", "/?key=guess", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        refused = ask(console, path)
        assert refused.status == 403
        assert "asks for its key" in refused.body  # type: ignore[attr-defined]
    assert ask(console, "/", Cookie=cookie_of(console)).status == 200


def test_foreign_host_names_and_origins_are_refused(console: ConsoleProcess) -> None:
    cookie = cookie_of(console)
    rebound = ask(console, "/", Cookie=cookie, Host="rebound.example:4000")
    assert rebound.status == 403
    assert "'rebound.example:4000'" in rebound.body  # type: ignore[attr-defined]
    for origin in ("http://evil.example", "http://localhost:1", "null", f"http://{console.authority}.evil.example"):
        assert ask(console, "/", Cookie=cookie, Origin=origin).status == 403, origin
    own = ask(console, "/", Cookie=cookie, Origin=console.origin)
    assert own.status == 200
    assert "frame-ancestors 'none'" in own.headers["Content-Security-Policy"]
    assert "Access-Control-Allow-Origin" not in own.headers


def test_sockets_of_foreign_pages_are_refused(console: ConsoleProcess) -> None:
    address = f"ws://{console.authority}/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    cookie = {"Cookie": cookie_of(console)}
    for origin in ("http://evil.example", "http://localhost:1", "null"):
        with pytest.raises(InvalidStatus) as refused, connect(address, origin=origin, additional_headers=cookie):  # type: ignore[arg-type]
            pass
        assert refused.value.response.status_code == 403
    with pytest.raises(InvalidStatus), connect(address, origin=console.origin):  # type: ignore[arg-type]
        pass
    with connect(address, origin=console.origin, additional_headers=cookie) as socket:  # type: ignore[arg-type]
        assert json.loads(str(socket.recv(60))[1:])["sid"]


def test_a_page_elsewhere_cannot_use_the_console(window: BrowserWindow, console: ConsoleProcess, api: FakeApi) -> None:
    """The browser has the cookie; the page is one of another port of this machine."""
    window.open(console.address)
    window.wait_for_text("live")
    window.open(f"{api.url}/nothing".replace("127.0.0.1", "localhost"))
    script = (
        "const done = arguments[arguments.length - 1];"
        f"const socket = new WebSocket('ws://{console.authority}/_nicegui_ws/socket.io/?EIO=4&transport=websocket');"
        "socket.onopen = () => done('open'); socket.onerror = () => done('refused');"
    )
    window.driver.set_script_timeout(90)
    assert window.driver.execute_async_script(script) == "refused"
    fetched = (
        "const done = arguments[arguments.length - 1];"
        f"fetch('{console.origin}/', {{credentials: 'include'}}).then(() => done('read'), () => done('refused'));"
    )
    assert window.driver.execute_async_script(fetched) == "refused"
    window.complaints()
    window.open("about:blank")


# -- starting it -------------------------------------------------------------------------------------------------------


def start(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*FUSE, "console", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environ, timeout=90)


def test_a_port_in_use_is_refused(console: ConsoleProcess, tmp_path: Path) -> None:
    refused = start(clean_environ(tmp_path), "--listen", console.authority)
    assert refused.returncode == 4
    assert refused.stderr == f"fuse: The address {console.authority} is in use; choose another with --listen\n"


@pytest.mark.parametrize("listen", [":4000", "0.0.0.0:4000", "192.0.2.1:4000", "[::]:4000", "example.com:4000"])
def test_addresses_that_others_reach_are_refused(tmp_path: Path, listen: str) -> None:
    refused = start(clean_environ(tmp_path), "--listen", listen)
    assert refused.returncode == 2
    assert "can be reached from other machines" in refused.stderr
    assert "ssh -L 4000:localhost:4000" in refused.stderr


def test_without_its_packages_it_says_how_to_install_them(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['nicegui'] = None; sys.argv = ['fuse', 'console'];"
        "from fusevm.cli.main import main; main()"
    )
    command = [sys.executable, "-c", code]
    refused = subprocess.run(
        command, check=False, capture_output=True, text=True, env=clean_environ(tmp_path), timeout=90
    )
    assert refused.returncode == 1
    assert "the console's packages are not installed" in refused.stderr
    assert "make console" in refused.stderr


def test_other_commands_do_without_its_packages(environ: dict[str, str]) -> None:
    code = (
        "import sys; from fusevm.cli.main import run; code = run(['env', 'list']);"
        "heavy = {'nicegui', 'fastapi', 'socketio', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environ)
    assert (done.returncode, done.stderr) == (0, "")

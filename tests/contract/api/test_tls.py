"""HTTPS with real clients: verified, with WebSockets and streams, renewed, and closed in order."""

import asyncio
import contextlib
import signal
import ssl
import subprocess
import sys
import textwrap
from pathlib import Path

import httpx
import pytest
import websockets
from certificates import DAY, make_pair
from control_harness import messages, next_message, rest_of, running, until
from control_process import serving
from cryptography import x509

SERVE = """
import sys
from fusevm.control.config import ControlConfig
from fusevm.control.main import serve
folder = {folder!r}
config = ControlConfig(
    listen="127.0.0.1:0", ready_file=folder + "/ready", tls_cert=folder + "/cert.pem", tls_key=folder + "/key.pem"
)
sys.exit(serve(config))
"""


async def test_a_client_that_verifies_speaks_https_and_websockets(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    async with running(tls_cert=str(certificate), tls_key=str(key), auth_token="t") as server:
        assert server.url.startswith("https://127.0.0.1:")
        url = server.url.replace("127.0.0.1", "localhost")
        context = ssl.create_default_context(cafile=str(certificate))
        headers = {"Authorization": "Bearer t"}
        async with httpx.AsyncClient(base_url=url, verify=context, headers=headers) as http:
            assert (await http.post("/v1/environments", json={"task_id": "t"})).status_code == 201
            login = await http.post("/login", json={"token": "t"})
            assert login.headers["set-cookie"].endswith("; Secure")
            socket_url = url.replace("https", "wss", 1) + "/v1/environments/fuse-t/shell"
            async with websockets.connect(socket_url, additional_headers=headers, ssl=context) as socket:
                await socket.recv()
        async with httpx.AsyncClient(base_url=url) as http:
            with pytest.raises(httpx.ConnectError):
                await http.get("/health")


async def test_plain_http_to_an_https_port_gets_nothing(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    async with running(tls_cert=str(certificate), tls_key=str(key)) as server, httpx.AsyncClient() as http:
        with pytest.raises(httpx.RemoteProtocolError):
            await http.get(server.url.replace("https", "http", 1) + "/health")


async def test_a_shutdown_ends_streams_and_sockets_first(tmp_path: Path) -> None:
    certificate, key = make_pair(tmp_path)
    context = ssl.create_default_context(cafile=str(certificate))
    async with contextlib.AsyncExitStack() as clients:
        async with running(tls_cert=str(certificate), tls_key=str(key)) as server:
            await server.create("t")
            url = server.url.replace("127.0.0.1", "localhost")
            http = await clients.enter_async_context(httpx.AsyncClient(base_url=url, verify=context))
            response = await clients.enter_async_context(http.stream("GET", "/v1/environments/fuse-t/events"))
            events = messages(response)
            assert (await next_message(events))[1]["state"] == "running"
            path = url.replace("https", "wss", 1) + "/v1/environments/fuse-t/shell"
            socket = await clients.enter_async_context(websockets.connect(path, ssl=context))
            await socket.recv()
            rest, closed = asyncio.ensure_future(rest_of(events)), asyncio.ensure_future(socket.wait_closed())
        assert await rest == []
        await closed
        assert socket.close_code == 1001


async def _serial(url: str) -> int:
    """The certificate that a new connection is shown."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = url.removeprefix("https://").split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    await writer.wait_closed()
    return x509.load_der_x509_certificate(shown).serial_number


async def test_a_hang_up_loads_a_renewed_certificate_and_keeps_it_when_the_next_is_bad(tmp_path: Path) -> None:
    make_pair(tmp_path, serial=11)
    with serving(tmp_path, code=textwrap.dedent(SERVE.format(folder=str(tmp_path)))) as server:
        assert await _serial(server.url) == 11
        async with httpx.AsyncClient(base_url=server.url, verify=False) as http:
            assert (await http.get("/health")).status_code == 200
            make_pair(tmp_path, serial=12)
            server.process.send_signal(signal.SIGHUP)

            async def is_new() -> bool:
                return await _serial(server.url) == 12

            await until(is_new)
            assert (await http.get("/health")).status_code == 200, "open connections stay"
            (tmp_path / "cert.pem").write_text("nothing")
            server.process.send_signal(signal.SIGHUP)
            await until(lambda: "certificate_not_reloaded" in (tmp_path / "out").read_text())
            assert await _serial(server.url) == 12
        assert server.end() == 0


def test_a_certificate_that_has_expired_refuses_the_start(tmp_path: Path) -> None:
    make_pair(tmp_path, starts_in=-2 * DAY, ends_in=-DAY)
    code = textwrap.dedent(SERVE.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "has expired" in done.stderr
    assert not (tmp_path / "ready").exists()

"""The ways to a server: TLS with a CA file, and proxies."""

import datetime as dt
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import fake_api
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fake_api import TOKEN, FakeApi

from fusevm.model.errors import BadField
from fusevm.sdk import AsyncFuse, Fuse
from fusevm.sdk.failures import ServerUnreachable

#: No such name exists (RFC 6761); only the proxy knows where it leads.
FAR_AWAY = "http://fuse.invalid:8080"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("tls"))


def make_certificate(folder: Path) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return path


@pytest.fixture(scope="module")
def tls_api(tmp_path_factory: pytest.TempPathFactory, certificate: Path) -> Iterator[FakeApi]:
    with fake_api.running(tmp_path_factory.mktemp("disk"), certificate) as server:
        server.add("a")
        yield server


def test_a_server_of_our_own_authority_is_trusted(tls_api: FakeApi, certificate: Path) -> None:
    data = bytes(range(256)) * 4096
    with Fuse(f"https://localhost:{tls_api.port}", TOKEN, ca_file=str(certificate)) as fuse:
        assert fuse.environments.get("fuse-a").state == "running"
        fuse.environments.files("fuse-a").write("/x", [data])
        assert fuse.environments.files("fuse-a").read("/x") == data
        with fuse.environments.exec_stream("fuse-a", ["cat"]) as session:
            feeder = threading.Thread(target=lambda: (session.send_stdin(data), session.close_stdin()))
            feeder.start()
            assert b"".join(frame.payload for frame in session.frames()) == data
            feeder.join()


async def test_a_server_of_our_own_authority_is_trusted_asynchronously(tls_api: FakeApi, certificate: Path) -> None:
    async with AsyncFuse(f"https://localhost:{tls_api.port}", TOKEN, ca_file=str(certificate)) as fuse:
        assert (await fuse.environments.get("fuse-a")).state == "running"
        async with fuse.environments.exec_stream("fuse-a", ["echo", "x"]) as session:
            assert [frame.payload async for frame in session.frames()] == [b"x\n"]


async def test_a_pinned_certificate_is_good_under_any_name(
    tls_api: FakeApi, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = f"https://127.0.0.1:{tls_api.port}"
    with Fuse(url, TOKEN, ca_file=str(certificate), pin_certificate=True) as fuse:
        assert fuse.version().version
        with fuse.environments.exec_stream("fuse-a", ["echo", "x"]) as session:
            assert [frame.payload for frame in session.frames()] == [b"x\n"]
    async with AsyncFuse(url, TOKEN, ca_file=str(certificate), pin_certificate=True) as other:
        assert (await other.version()).version
    stranger = make_certificate(tmp_path_factory.mktemp("stranger"))
    mistaken = Fuse(url, ca_file=str(stranger), pin_certificate=True)
    with mistaken as fuse, pytest.raises(ServerUnreachable, match="not trusted"):
        fuse.version()


async def test_any_other_server_is_not(tls_api: FakeApi, certificate: Path) -> None:
    with (
        Fuse(f"https://localhost:{tls_api.port}", TOKEN) as fuse,
        pytest.raises(ServerUnreachable, match="not trusted"),
    ):
        fuse.version()
    with (
        Fuse(f"https://127.0.0.1:{tls_api.port}", TOKEN, ca_file=str(certificate)) as fuse,
        pytest.raises(ServerUnreachable, match="not trusted"),
    ):
        fuse.version()
    async with AsyncFuse(f"https://localhost:{tls_api.port}", TOKEN) as other:
        with pytest.raises(ServerUnreachable, match="not trusted"):
            await other.version()


def test_a_ca_file_that_is_none_is_named() -> None:
    with pytest.raises(BadField, match="ca_file: /no/such"):
        Fuse("https://localhost", ca_file="/no/such")


class Proxy:
    """A proxy whose every tunnel leads to one port of this machine."""

    def __init__(self, port: int) -> None:
        self.asked: list[bytes] = []
        self.status = b"200 Connection established"
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._tunnel, args=(client,), daemon=True).start()

    def _tunnel(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(4096)
        self.asked.append(head.split(b"\r\n")[0])
        client.sendall(b"HTTP/1.1 " + self.status + b"\r\n\r\n")
        if not self.status.startswith(b"200"):
            client.close()
            return
        with socket.create_connection(("127.0.0.1", self._target)) as server, client:
            back = threading.Thread(target=pour, args=(server, client), daemon=True)
            back.start()
            pour(client, server)
            back.join()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def pour(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


@pytest.fixture
def proxy(api: FakeApi) -> Iterator[Proxy]:
    api.add("a")
    made = Proxy(api.port)
    yield made
    made.close()


async def test_a_far_server_is_reached_through_the_proxy(proxy: Proxy) -> None:
    environ = {"http_proxy": proxy.url}
    with Fuse(FAR_AWAY, TOKEN, environ=environ) as fuse:
        assert fuse.environments.get("fuse-a").state == "running"
        with fuse.environments.exec_stream("fuse-a", ["echo", "x"]) as session:
            assert [frame.payload for frame in session.frames()] == [b"x\n"]
    async with AsyncFuse(FAR_AWAY, TOKEN, environ=environ) as other:
        assert (await other.environments.get("fuse-a")).state == "running"
        async with other.environments.exec_stream("fuse-a", ["echo", "x"]) as stream:
            assert [frame.payload async for frame in stream.frames()] == [b"x\n"]
    assert set(proxy.asked) == {b"CONNECT fuse.invalid:8080 HTTP/1.1"}
    assert len(proxy.asked) == 4


async def test_a_proxy_that_refuses_is_named(proxy: Proxy) -> None:
    proxy.status = b"403 Forbidden"
    with Fuse(FAR_AWAY, environ={"http_proxy": proxy.url}) as fuse, pytest.raises(ServerUnreachable, match="403"):
        fuse.version()
    async with AsyncFuse(FAR_AWAY, environ={"http_proxy": proxy.url}) as other:
        with pytest.raises(ServerUnreachable, match="403"):
            await other.version()


def test_loopback_is_reached_without_the_proxy(api: FakeApi, proxy: Proxy) -> None:
    with Fuse(api.url, TOKEN, environ={"http_proxy": proxy.url, "all_proxy": proxy.url}) as fuse:
        fuse.version()
    assert proxy.asked == []

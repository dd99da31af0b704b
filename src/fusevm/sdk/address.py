"""Where the server is, and how to get a socket to it: base URLs, TLS, proxies.

Proxies from the environment are never used for loopback addresses: a proxy's loopback is another machine's.
"""

import base64
import contextlib
import os
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import unquote, urlsplit

import msgspec

from fusevm.model.errors import BadField
from fusevm.sdk.failures import ServerUnreachable

CONNECT_TIMEOUT_S = 10.0
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PROXY_HEAD_LIMIT = 1 << 16


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """A base URL taken apart."""

    scheme: str
    host: str
    port: int
    #: Path under which the API is mounted; no slash at the end.
    prefix: str = ""
    #: User and password, of a proxy only.
    credentials: str = ""

    @property
    def is_tls(self) -> bool:
        return self.scheme == "https"

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.endswith(".localhost") or self.host.startswith("127.")

    @property
    def authority(self) -> str:
        """Value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL again, in its plain form."""
        return f"{self.scheme}://{self.authority}{self.prefix}"

    def websocket_url(self, target: str) -> str:
        """The ws or wss URL of a target."""
        return f"{'wss' if self.is_tls else 'ws'}://{self.authority}{self.prefix}{target}"


def parse_address(text: str, field: str = "base_url") -> Address:
    """Parse `http://host:port/prefix`, `https://...` or plain `host:port`. Raises BadField."""
    problem = f"{text[:200]!r} is no address; write it like http://127.0.0.1:8080 or https://fuse.example.com"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError as error:
        raise BadField(field=field, problem=problem) from error
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname or parts.query or parts.fragment:
        raise BadField(field=field, problem=problem)
    user, _, _ = parts.netloc.rpartition("@")
    return Address(
        scheme=parts.scheme,
        host=parts.hostname,
        port=port or _DEFAULT_PORTS[parts.scheme],
        prefix=parts.path.rstrip("/"),
        credentials=unquote(user),
    )


def proxy_for(address: Address, environ: Mapping[str, str]) -> Address | None:
    """The proxy that the environment asks for (`https_proxy`, `all_proxy`, `no_proxy`, either case), or None."""

    def setting(name: str) -> str:
        return environ.get(name) or environ.get(name.upper()) or ""

    proxy = setting(f"{address.scheme}_proxy") or setting("all_proxy")
    if not proxy or address.is_loopback or _is_excepted(address.host, setting("no_proxy")):
        return None
    return parse_address(proxy, field=f"{address.scheme}_proxy")


def _is_excepted(host: str, exceptions: str) -> bool:
    for entry in exceptions.split(","):
        name = entry.strip().lstrip(".")
        if name and (name in ("*", host) or host.endswith("." + name)):
            return True
    return False


def make_tls(address: Address, ca_file: str | None, *, is_pinned: bool = False) -> ssl.SSLContext | None:
    """The TLS context of an https address, verified by the system's roots or by `ca_file`; None for http.

    `is_pinned`: `ca_file` is the server's own certificate; that one is accepted under any name, and no other.
    """
    if not address.is_tls:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise BadField(field="ca_file", problem=f"{ca_file}: {error.strerror or error}") from error
    if is_pinned and ca_file:
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class Dialer:
    """Opens sockets to one address: TCP, through the proxy if there is one, TLS on top."""

    def __init__(
        self,
        address: Address,
        *,
        ca_file: str | None = None,
        is_pinned: bool = False,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        self.proxy = proxy_for(address, os.environ if environ is None else environ)
        self.tls = make_tls(address, ca_file, is_pinned=is_pinned)

    def connect(self, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
        """A connected socket with that timeout set. Raises ServerUnreachable."""
        first = self.proxy or self.address
        try:
            sock = socket.create_connection((first.host, first.port), timeout=timeout_s)
        except OSError as error:
            raise self._unreachable(error) from error
        with contextlib.ExitStack() as undo:
            undo.callback(sock.close)
            try:
                _tune(sock)
                if self.proxy is not None:
                    self._tunnel(sock, self.proxy)
                if self.tls is not None:
                    sock = self.tls.wrap_socket(sock, server_hostname=self.address.host)
            except OSError as error:
                raise self._unreachable(error) from error
            undo.pop_all()
        return sock

    def _tunnel(self, sock: socket.socket, proxy: Address) -> None:
        sock.sendall(tunnel_request(self.address, proxy))
        head = b""
        while not head.endswith(b"\r\n\r\n") and len(head) < _PROXY_HEAD_LIMIT:
            byte = sock.recv(1)  # one by one: what follows the head belongs to the tunnel
            if not byte:
                break
            head += byte
        check_tunnel(head)

    def _unreachable(self, error: OSError) -> ServerUnreachable:
        return ServerUnreachable(url=self.address.url, problem=describe(error))


def describe(error: BaseException) -> str:
    """What went wrong, in the words of the system and without its numbers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}; name its issuer with a CA file"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower() if error.strerror[1:].islower() else error.strerror
    return str(error) or type(error).__name__


def tunnel_request(address: Address, proxy: Address) -> bytes:
    """The CONNECT request that opens a tunnel through a proxy."""
    target = f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials:
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(proxy.credentials.encode()).decode())
    return "\r\n".join([*lines, "", ""]).encode()


def check_tunnel(head: bytes) -> None:
    """Raise ConnectionError unless the proxy's answer opened the tunnel."""
    status = head.split(b"\r\n", 1)[0].decode("latin-1")
    if status[:5] != "HTTP/" or status.partition(" ")[2][:1] != "2":
        raise ConnectionError(f"the proxy answered: {status or 'nothing'}")


def _tune(sock: socket.socket) -> None:
    """Small messages go out at once; a peer that vanished is noticed within about two minutes."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

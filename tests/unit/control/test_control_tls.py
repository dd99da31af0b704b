"""Which certificates are served with, and what is said about the others."""

import contextlib
import datetime as dt
import ssl
from pathlib import Path

import pytest
from certificates import DAY, make_pair

from fusevm.control.config import ControlConfig
from fusevm.control.tls import check_pair, reload_pair
from fusevm.model.errors import BadSetting


def _check(cert: Path, key: Path) -> None:
    check_pair(str(cert), str(key), dt.datetime.now(dt.UTC))


def test_a_good_pair_is_fine(tmp_path: Path) -> None:
    _check(*make_pair(tmp_path))


def test_times_of_a_certificate_are_checked(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="has expired") as caught:
        _check(*make_pair(tmp_path, starts_in=-2 * DAY, ends_in=-DAY))
    assert caught.value.setting == "tls_cert"
    with pytest.raises(BadSetting, match=r"not valid before .* clock"):
        _check(*make_pair(tmp_path, starts_in=DAY, ends_in=2 * DAY))


def test_a_key_of_another_certificate_is_told(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    cert, _ = make_pair(tmp_path / "a")
    _, key = make_pair(tmp_path / "b")
    with pytest.raises(BadSetting, match="does not belong") as caught:
        _check(cert, key)
    assert caught.value.setting == "tls_key"


def test_what_is_no_certificate_or_key_is_named(tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path)
    nothing, missing = tmp_path / "nothing.pem", tmp_path / "missing.pem"
    nothing.write_text("nothing")
    for bad_cert, bad_key, setting, problem in (
        (nothing, key, "tls_cert", "no certificate"),
        (missing, key, "tls_cert", "cannot read"),
        (cert, nothing, "tls_key", "no private key"),
        (cert, missing, "tls_key", "cannot read"),
    ):
        with pytest.raises(BadSetting, match=problem) as caught:
            _check(bad_cert, bad_key)
        assert caught.value.setting == setting


def test_a_key_with_a_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="without a passphrase"):
        _check(*make_pair(tmp_path, passphrase=b"secret"))


def test_a_bad_pair_does_not_replace_a_good_one(tmp_path: Path) -> None:
    cert, key = make_pair(tmp_path)
    (tmp_path / "other").mkdir()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    shown = cert.read_bytes()
    for damaged in ("nothing", make_pair(tmp_path / "other")[0].read_text()):
        cert.write_text(damaged)
        reload_pair(context, ControlConfig(tls_cert=str(cert), tls_key=str(key)))
        assert _shown_by(context) == shown


def _shown_by(context: ssl.SSLContext) -> bytes:
    """The certificate that a client sees, in memory."""
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for side in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    shown = client.getpeercert(binary_form=True)
    assert shown is not None
    return ssl.DER_cert_to_PEM_cert(shown).encode()

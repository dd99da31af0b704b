"""The certificate of the API: checked before anything is touched, and loaded again on SIGHUP."""

import datetime as dt
import ssl
from pathlib import Path

import structlog
from cryptography import x509

from fusevm.control.config import ControlConfig
from fusevm.model.errors import BadSetting

log = structlog.get_logger()


def check_pair(cert: str, key: str, now: dt.datetime) -> None:
    """Can this pair be served with, now? Raises BadSetting, naming the one that is wrong."""
    certificate = _first_certificate(cert)
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= ends:
        raise BadSetting(
            setting="tls_cert", problem=f"the certificate in {cert} has expired ({ends:%Y-%m-%d %H:%M} UTC)"
        )
    if now < starts:
        problem = f"the certificate in {cert} is not valid before {starts:%Y-%m-%d %H:%M} UTC; is the clock right?"
        raise BadSetting(setting="tls_cert", problem=problem)
    _read("tls_key", key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            problem = f"the key in {key} does not belong to the certificate in {cert}"
        else:
            problem = f"{key} holds no private key in PEM without a passphrase"
        raise BadSetting(setting="tls_key", problem=problem) from error


def reload_pair(context: ssl.SSLContext, config: ControlConfig) -> None:
    """Serve new connections with what the files hold now; if that is not usable, go on as before."""
    try:
        check_pair(config.tls_cert, config.tls_key, dt.datetime.now(dt.UTC))
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (BadSetting, OSError) as error:
        log.warning("certificate_not_reloaded", problem=str(error))
    else:
        log.info("certificate_reloaded", file=config.tls_cert)


def _first_certificate(path: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(_read("tls_cert", path))[0]
    except ValueError as error:
        raise BadSetting(setting="tls_cert", problem=f"{path} holds no certificate in PEM") from error


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadSetting(setting=setting, problem=f"cannot read {path}: {error.strerror}") from error

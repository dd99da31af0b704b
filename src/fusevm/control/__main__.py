"""`python -m fusevm.control`: the server with the few settings that development needs. The CLI has all of them."""

import argparse
import sys

from fusevm.control.config import ControlConfig, HostSetting
from fusevm.control.main import serve
from fusevm.model.errors import Error
from fusevm.wire.exit_status import exit_status


def main() -> int:
    """Parse and serve; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fusevm.control", description=__doc__)
    parser.add_argument("--listen", default="", help="host:port; default 127.0.0.1:8080")
    parser.add_argument("--database", default=":memory:", help="path of a SQLite file, or :memory:")
    parser.add_argument("--auth-token", default="", help="bearer token that clients must send")
    parser.add_argument("--host-url", default="", help="URL of a host daemon, registered as 'default'")
    parser.add_argument("--host-token", default="", help="token that the host daemon printed")
    parser.add_argument("--allow-local-hosts", action="store_true", help="the API may register hosts without TLS")
    parser.add_argument("--ready-file", default="", help="written with the base URL once requests are served")
    parser.add_argument("--wait-s", type=float, default=55.0, help="seconds that create and delete wait")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    asked = parser.parse_args()
    hosts = (HostSetting(id="default", url=asked.host_url, token=asked.host_token),) if asked.host_url else ()
    config = ControlConfig(
        listen=asked.listen,
        database=asked.database,
        auth_token=asked.auth_token,
        hosts=hosts,
        allow_local_hosts=asked.allow_local_hosts,
        ready_file=asked.ready_file,
        wait_s=asked.wait_s,
        log_level=asked.log_level,
    )
    try:
        return serve(config)
    except Error as error:
        sys.stderr.write(f"error: {error.message}\n")
        return exit_status(error)


if __name__ == "__main__":
    sys.exit(main())

"""Does a control plane answer?"""

import http.client
import ssl
import urllib.parse


def is_serving(url: str) -> bool:
    """Does anything answer `/health` there? Nothing secret is sent, so that its certificate is of no interest."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, parts.port, timeout=5, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

"""The image's health check: exit code 0 while the service takes requests or finishes those that it has taken.

Asks /ready. A service whose ranks are being replaced is healthy: requests wait for the next, and whoever restarts what
is unhealthy would lose them. Address and scheme are those of the variables that the service reads itself; a port of the
command line is not seen here. Of the standard library alone, since it runs every few seconds.
"""

import http.client
import json
import os
import ssl
import sys
from collections.abc import Mapping

HEALTHY_STATES = ("READY", "RECOVERING", "DRAINING")
LOOPBACKS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
TIMEOUT_SECONDS = 4.0


def connect(environment: Mapping[str, str]) -> http.client.HTTPConnection:
    """Return a connection to the service that has these variables, not opened yet."""
    host = environment.get("RYZANSTEIN_HOST", "")
    address = LOOPBACKS.get(host, host), int(environment.get("RYZANSTEIN_PORT") or 8000)
    if not environment.get("RYZANSTEIN_SSL_CERTFILE"):
        return http.client.HTTPConnection(*address, timeout=TIMEOUT_SECONDS)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is this container, by another name
    return http.client.HTTPSConnection(*address, timeout=TIMEOUT_SECONDS, context=context)


def check(environment: Mapping[str, str]) -> str | None:
    """Return what is wrong with the service, or None."""
    try:
        connection = connect(environment)
        connection.request("GET", "/ready")
        state = json.loads(connection.getresponse().read())["state"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        return f"it does not answer: {error}"
    return None if state in HEALTHY_STATES else f"its state is {state}"


if __name__ == "__main__":
    sys.exit(check(os.environ))

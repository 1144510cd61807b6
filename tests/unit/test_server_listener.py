import socket

import pytest

from server.banner import listening_url
from server.listener import listen


def test_a_port_in_use_is_the_ports_fault() -> None:
    with listen("127.0.0.1", 0) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--port {port}: cannot listen on 127\.0\.0\.1:{port}: "):
            listen("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "x" * 300])
def test_an_address_that_is_not_this_machines_is_the_hosts_fault(host: str) -> None:
    with pytest.raises(ValueError, match=rf"^--host {host}: "):
        listen(host, 0)


def test_a_free_port_is_picked_for_0() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()[:2]):
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]")]
)
def test_the_address_is_shown_as_one_that_can_be_asked(host: str, shown: str) -> None:
    with listen(host, 0) as listener:
        port = listener.getsockname()[1]
        assert listening_url(listener, "https") == f"https://{shown}:{port}"

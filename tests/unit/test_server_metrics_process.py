"""What the metrics say of the server's process, also while it can open no file."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.metric_samples import sample_lines
from tests.unit.server_support import RunningServer

FEW = 3


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Have this process, which is the server's, open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def values(page: str) -> dict[str, float]:
    lines = (line.split() for line in sample_lines(page) if line.startswith("process_"))
    return {name: float(value) for name, value in lines}


def test_metrics_answer_when_descriptors_have_run_out(idle_server: RunningServer) -> None:
    with httpx.Client(base_url=idle_server.url, timeout=30) as client:  # one connection for both
        before = values(client.get("/metrics").text)
        with no_descriptors_left():
            answer = client.get("/metrics")
        assert answer.status_code == 200
        found = values(answer.text)
        assert found["process_resident_memory_bytes"] == before["process_resident_memory_bytes"]
        assert found["process_open_fds"] == found["process_max_fds"] == FEW
        assert found["process_cpu_seconds_total"] > before["process_cpu_seconds_total"]
        assert FEW < values(client.get("/metrics").text)["process_open_fds"] < before["process_max_fds"]

"""docker-compose.yml: the service, and Prometheus, which reads its metrics. Debian's stands in for the image's."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.container.conftest import BUILD_SECONDS
from tests.container.containers import Containers
from tests.service_process import wait_until

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SERVICE, PROMETHEUS = "http://127.0.0.1:8000", "http://127.0.0.1:9090"
# As the image of that name has it, but for the program, which is Debian's.
STAND_IN = """\
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus && mkdir --mode=0777 /data
WORKDIR /data
USER nobody
ENTRYPOINT ["/usr/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""


@pytest.fixture(scope="module")
def prometheus_image(containers: Containers, base: str) -> str:
    """An image with Debian's Prometheus under the name that the compose file has."""
    name: str = SERVICES["prometheus"]["image"]
    text = STAND_IN.format(base=base).replace("/data", "/prometheus")
    (containers.folder / "Dockerfile.prometheus").write_text(text)
    plain = ["--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker"]
    file = ["--file", str(containers.folder / "Dockerfile.prometheus")]
    containers.outside("buildah", "build", *plain, *file, "--tag", name, str(containers.folder), seconds=BUILD_SECONDS)
    return name


@pytest.fixture(scope="module")
def composed(containers: Containers, image: str, prometheus_image: str) -> Iterator[Containers]:
    """What `docker compose up` starts of the file, but for Grafana, which no package of Debian's has."""
    assert image
    assert prometheus_image
    override = containers.folder / "docker-compose.override.yml"  # two ranks, so that there are collectives
    environment = {"RYZANSTEIN_TENSOR_PARALLEL_SIZE": "2"}
    override.write_text(yaml.safe_dump({"services": {"ryzanstein": {"environment": environment}}}))
    compose = ["docker", "compose", "--file", str(ROOT / "docker-compose.yml"), "--file", str(override)]
    containers.inside(*compose, "up", "--detach", "--no-build", "ryzanstein", "prometheus", cwd=ROOT)
    containers.wait_until_healthy("ryzanstein_ryzanstein_1")
    yield containers
    containers.inside(*compose, "down", "--volumes", cwd=ROOT)


FILLED_IN = {"$__rate_interval": "1m", "$__range": "5m", "$model_name": ".*", "$instance": ".*"}
QUERY = """
import json, sys, urllib.parse, urllib.request
results = []
for expression in json.loads(sys.argv[2]):
    body = urllib.parse.urlencode({"query": expression}).encode()
    answer = json.load(urllib.request.urlopen(sys.argv[1] + "/api/v1/query", body, timeout=60))
    results.append(len(answer["data"]["result"]))
print(json.dumps(results))
"""


def num_series(containers: Containers, *expressions: str) -> list[int]:
    """Return how many series Prometheus has for each expression now; one that it does not understand is an error."""
    found: list[int] = json.loads(
        containers.inside(sys.executable, "-c", QUERY, PROMETHEUS, json.dumps(list(expressions)))
    )
    return found


def expressions_of(panels: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what panels, and those of rows among them, ask of Prometheus, with what Grafana fills in."""
    for panel in panels:
        yield from expressions_of(panel.get("panels", []))
        for target in panel.get("targets", []):
            text: str = target["expr"]
            for name, value in FILLED_IN.items():
                text = text.replace(name, value)
            assert "$" not in text
            yield text


def test_the_service_answers_and_prometheus_has_its_tokens(composed: Containers) -> None:
    answer = composed.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=8, temperature=0)
    assert answer["usage"]["completion_tokens"] == 8
    wait_until(lambda: num_series(composed, "ryzanstein_generation_tokens_total > 7") == [1], 120)
    assert num_series(composed, 'up{job="ryzanstein"} == 1') == [1]


def test_what_each_panel_of_the_dashboard_asks_for_has_data_after_load(composed: Containers) -> None:
    board = json.loads((ROOT / "deploy/grafana/dashboards/ryzanstein.json").read_text())
    expressions = list(expressions_of(board["panels"]))
    assert expressions
    empty = expressions

    def all_have_data() -> bool:
        nonlocal empty
        composed.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=8)
        empty = [text for text, count in zip(expressions, num_series(composed, *expressions), strict=True) if not count]
        return not empty

    try:
        wait_until(all_have_data, 240)
    except TimeoutError:
        assert empty == []


def test_no_port_is_open_to_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_what_the_file_mounts_is_there() -> None:
    volumes = [volume for service in SERVICES.values() for volume in service["volumes"] if volume.startswith("./")]
    assert volumes
    assert [volume for volume in volumes if not (ROOT / volume.partition(":")[0]).is_dir()] == []

"""docker-compose.yml: the service, and Prometheus, which reads its metrics. Debian's stands in for the image's."""

from collections.abc import Iterator
from pathlib import Path

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
    containers.inside("docker", "compose", "up", "--detach", "--no-build", "ryzanstein", "prometheus", cwd=ROOT)
    containers.wait_until_healthy("ryzanstein_ryzanstein_1")
    yield containers
    containers.inside("docker", "compose", "down", "--volumes", cwd=ROOT)


def query(containers: Containers, expression: str) -> list[dict[str, object]]:
    """Return the series that Prometheus has for an expression now."""
    encoded = expression.replace("{", "%7B").replace("}", "%7D").replace('"', "%22").replace("+", "%2B")
    answer = containers.ask(f"{PROMETHEUS}/api/v1/query?query={encoded.replace(' ', '%20')}")
    assert answer["status"] == "success"
    result: list[dict[str, object]] = answer["data"]["result"]
    return result


def test_the_service_answers_and_prometheus_has_its_tokens(composed: Containers) -> None:
    answer = composed.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=8, temperature=0)
    assert answer["usage"]["completion_tokens"] == 8
    wait_until(lambda: bool(query(composed, "ryzanstein_generation_tokens_total > 7")), 120)
    assert query(composed, 'up{job="ryzanstein"} == 1')


def test_no_port_is_open_to_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_what_the_file_mounts_is_there() -> None:
    volumes = [volume for service in SERVICES.values() for volume in service["volumes"] if volume.startswith("./")]
    assert volumes
    assert [volume for volume in volumes if not (ROOT / volume.partition(":")[0]).is_dir()] == []

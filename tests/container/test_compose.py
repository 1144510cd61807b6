"""docker-compose.yml: the service, Prometheus, which reads its metrics, and Alertmanager, which tells of its alerts.

Debian's Prometheus and Alertmanager stand in for those of the images.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.container.conftest import BUILD_SECONDS
from tests.container.containers import CommandFailedError, Containers
from tests.service_process import wait_until

ROOT = Path(__file__).parents[2]
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
SERVICE, PROMETHEUS, ALERTMANAGER = (f"http://127.0.0.1:{port}" for port in (8000, 9090, 9093))
WEBHOOK = "http://webhook:9099/alerts?team=a&urgent=yes"
RANKS_DIE_OFTEN = "RyzansteinRanksDieOften"
RECOVERIES = 3  # that the alert takes
# As the images of these names have it, but for the programs, which are Debian's.
PROMETHEUS_IMAGE = """\
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus && mkdir --mode=0777 /prometheus
WORKDIR /prometheus
USER nobody
ENTRYPOINT ["/usr/bin/prometheus"]
CMD ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
"""
ALERTMANAGER_IMAGE = """\
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus-alertmanager \\
    && mkdir --mode=0777 /alertmanager && ln -s /usr/bin/prometheus-alertmanager /bin/alertmanager
WORKDIR /alertmanager
USER nobody
ENTRYPOINT ["/bin/alertmanager"]
CMD ["--config.file=/etc/alertmanager/alertmanager.yml", "--storage.path=/alertmanager"]
"""
# A webhook: it writes a line of JSON for each alert that it is told.
LISTENER = """
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        for alert in json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"]:
            print(json.dumps({"path": self.path, **alert}), flush=True)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("", 9099), Handler).serve_forever()
"""


def build_stand_in(containers: Containers, service: str, text: str) -> str:
    """Build an image under the name that the compose file has for a service, and return the name."""
    name: str = SERVICES[service]["image"]
    file = containers.folder / f"Dockerfile.{service}"
    file.write_text(text)
    plain = ["--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker"]
    tagged = ["--file", str(file), "--tag", name]
    containers.outside("buildah", "build", *plain, *tagged, str(containers.folder), seconds=BUILD_SECONDS)
    return name


@pytest.fixture(scope="module")
def stand_ins(containers: Containers, base: str) -> list[str]:
    """Images with Debian's Prometheus and Alertmanager under the names that the compose file has."""
    texts = {"prometheus": PROMETHEUS_IMAGE, "alertmanager": ALERTMANAGER_IMAGE}
    return [build_stand_in(containers, service, text.format(base=base)) for service, text in texts.items()]


@pytest.fixture(scope="module")
def compose(containers: Containers, image: str, stand_ins: list[str]) -> list[str]:
    """`docker compose` with the file, two ranks, so that there are collectives, and a webhook."""
    assert stand_ins
    override = containers.folder / "docker-compose.override.yml"
    services = {
        "ryzanstein": {"environment": {"RYZANSTEIN_TENSOR_PARALLEL_SIZE": "2"}},
        "webhook": {"image": image, "entrypoint": ["python", "-c", LISTENER]},
    }
    override.write_text(yaml.safe_dump({"services": services}))
    return ["docker", "compose", "--file", str(ROOT / "docker-compose.yml"), "--file", str(override)]


@pytest.fixture(scope="module")
def composed(containers: Containers, compose: list[str]) -> Iterator[Containers]:
    """What `docker compose up` starts of the file, but for Grafana, which no package of Debian's has."""
    started = ["up", "--detach", "--no-build", "ryzanstein", "prometheus", "alertmanager", "webhook"]
    containers.inside("env", f"ALERT_WEBHOOK_URL={WEBHOOK}", *compose, *started, cwd=ROOT)
    containers.wait_until_healthy("ryzanstein_ryzanstein_1")
    yield containers
    containers.inside(*compose, "down", "--volumes", cwd=ROOT)


FILLED_IN = {"$__rate_interval": "5m", "$__range": "15m", "$model_name": ".*", "$instance": ".*"}
QUERY = """
import json, math, sys, urllib.parse, urllib.request
results = []
for expression in json.loads(sys.argv[2]):
    body = urllib.parse.urlencode({"query": expression}).encode()
    answer = json.load(urllib.request.urlopen(sys.argv[1] + "/api/v1/query", body, timeout=60))
    results.append(sum(math.isfinite(float(series["value"][1])) for series in answer["data"]["result"]))
print(json.dumps(results))
"""


def num_series(containers: Containers, *expressions: str) -> list[int]:
    """Return how many series with a number Prometheus has for each expression now; one that it refuses is an error."""
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


def ranks(containers: Containers) -> list[int]:
    """Return the process numbers of the ranks in their container while it takes requests, or else none."""
    try:
        answer = containers.ask(f"{SERVICE}/ready")
    except CommandFailedError:
        return []
    return [rank["pid"] for rank in answer["ranks"]] if answer["state"] == "READY" else []


def lose_a_rank(containers: Containers) -> None:
    """Kill a rank, and wait until others have taken the place of all."""
    lost = ranks(containers)
    containers.inside("podman", "exec", "ryzanstein_ryzanstein_1", "sh", "-c", f"kill -KILL {lost[1]}")
    wait_until(lambda: bool(found := ranks(containers)) and not {*found} & {*lost}, 120)


@pytest.fixture(scope="module")
def loaded(composed: Containers) -> Containers:
    """The same, after some work, a request that came too late, and the loss of ranks as often as the alert takes."""
    # Rates need a count from before the first event.
    wait_until(lambda: num_series(composed, "sum(ryzanstein_recoveries_total)") == [1], 120)
    for _ in range(RECOVERIES):
        composed.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=8)
        lose_a_rank(composed)
    with pytest.raises(CommandFailedError, match="504"):
        composed.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=500, timeout=0.001)
    return composed


def test_the_service_answers_and_prometheus_has_its_tokens(composed: Containers) -> None:
    answer = composed.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=8, temperature=0)
    assert answer["usage"]["completion_tokens"] == 8
    wait_until(lambda: num_series(composed, "ryzanstein_generation_tokens_total > 7") == [1], 120)
    assert num_series(composed, 'up{job="ryzanstein"} == 1') == [1]


def test_what_each_panel_of_the_dashboard_asks_for_has_data_after_load(loaded: Containers) -> None:
    board = json.loads((ROOT / "deploy/grafana/dashboards/ryzanstein.json").read_text())
    expressions = list(expressions_of(board["panels"]))
    assert expressions
    empty = expressions

    def all_have_data() -> bool:
        nonlocal empty
        loaded.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=8)
        empty = [text for text, count in zip(expressions, num_series(loaded, *expressions), strict=True) if not count]
        return not empty

    try:
        wait_until(all_have_data, 240)
    except TimeoutError:
        assert empty == []


def told(containers: Containers) -> list[dict[str, Any]]:
    """Return what the webhook was told of the alert."""
    alerts = [json.loads(line) for line in containers.logs("ryzanstein_webhook_1").splitlines()]
    return [alert for alert in alerts if alert["labels"]["alertname"] == RANKS_DIE_OFTEN]


def receivers(containers: Containers) -> list[str]:
    """Return who is told of the alert, as Alertmanager has it; none while there is no alert."""
    try:
        found = containers.ask(f"{ALERTMANAGER}/api/v2/alerts?filter=alertname={RANKS_DIE_OFTEN}")
    except CommandFailedError:  # it starts
        return []
    return [receiver["name"] for alert in found for receiver in alert["receivers"]]


def test_ranks_that_die_often_are_told_to_the_webhook(loaded: Containers) -> None:
    wait_until(lambda: bool(told(loaded)), 240)
    alert = told(loaded)[0]
    assert alert["status"] == "firing"
    assert alert["path"] == WEBHOOK.removeprefix("http://webhook:9099")
    assert alert["labels"]["instance"] == "ryzanstein:8000"
    assert alert["labels"]["severity"] == "critical"
    assert receivers(loaded) == ["webhook"]
    assert loaded.ask(f"{SERVICE}/v1/completions", prompt="import ", max_tokens=2)["choices"]


def test_without_a_webhook_alerts_are_on_the_page_of_alertmanager_and_no_error(
    loaded: Containers, compose: list[str]
) -> None:
    loaded.inside(*compose, "up", "--detach", "--no-build", "--force-recreate", "--no-deps", "alertmanager", cwd=ROOT)
    wait_until(lambda: receivers(loaded) == ["nobody"], 240)
    log = loaded.logs("ryzanstein_alertmanager_1")
    assert "level=info" in log
    assert "level=error" not in log
    assert "level=warn" not in log


def test_no_port_is_open_to_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_what_the_file_mounts_is_there() -> None:
    volumes = [volume for service in SERVICES.values() for volume in service["volumes"] if volume.startswith("./")]
    assert volumes
    assert [volume for volume in volumes if not (ROOT / volume.partition(":")[0]).is_dir()] == []

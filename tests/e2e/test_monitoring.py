"""Prometheus and Alertmanager watch a real service whose ranks die: dashboard, rules, alerts and docs/monitoring.md."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from server.metrics import dashboard
from tests.monitoring import FILES, Alertmanager, Listener, Prometheus, Webhook, program
from tests.service_process import REQUEST_SECONDS, ROOT, ServiceProcess, wait_until

RECOVERIES = 3  # that the alert takes
FIRST_TOKENS = "time_to_first_token_seconds_count"
SAMPLES = 10  # increase() adds the growth of up to 1.5 intervals
RANKS_DIE_OFTEN = "RyzansteinRanksDieOften"
BODY = {"prompt": "import ", "max_tokens": 16, "ignore_eos": True}
KEYS = [{"name": "team-a", "key": "sk-a"}, {"name": "team-b", "key": "sk-b"}]
VARIABLES = {"$__rate_interval": "5m", "$__range": "15m", "$model_name": ".+", "$instance": ".+"}
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
TARGETS = [
    (f"{panel['title']}: {target['legendFormat']}", target["expr"])
    for panel in dashboard.dashboard()["panels"]
    for target in panel.get("targets", [])
]
RULES: list[dict[str, Any]] = [
    rule
    for path in sorted((FILES / "rules").glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]


@dataclass
class Watched:
    """A service that did some work and lost its ranks, and those who watched it."""

    service: ServiceProcess
    prometheus: Prometheus
    alertmanager: Alertmanager
    webhook: Webhook


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    program("prometheus")
    program("alertmanager")
    folder = tmp_path_factory.mktemp("monitoring")
    (folder / "keys.yaml").write_text(json.dumps(KEYS))
    options = ("-tp", "2", "--api-key-file", str(folder / "keys.yaml"), "--vllm-metric-names")
    with (
        ServiceProcess(*options) as service,
        Webhook() as webhook,
        Alertmanager(folder, webhook.url) as alertmanager,
        Prometheus(folder, service.url, alertmanager.url) as prometheus,
    ):
        # Rates need the zeros before the first event, and over few samples two recoveries may look like three.
        wait_until(lambda: prometheus.value(f"count_over_time(ryzanstein_engine_ready[15m]) >= {SAMPLES}") > 0, 60)
        load(service)
        # Of each rank, a first report, before the load at the end is compared with it.
        wait_until(lambda: prometheus.value('count(ryzanstein_step_phase_seconds_sum{phase="compute"})') == 2, 60)
        for number in range(1, RECOVERIES + 1):
            lose_a_rank(service)
            wait_until(lambda: prometheus.value("ryzanstein_recoveries_total") == number, 60)  # noqa: B023  # at once
            if number < RECOVERIES:
                assert prometheus.query(f'ALERTS{{alertname="{RANKS_DIE_OFTEN}"}}') == []
        load(service)
        # Two times after all of it, so that each counter has grown between them.
        tokens = service.metric("ryzanstein_generation_tokens_total")
        wait_until(lambda: prometheus.value("ryzanstein_generation_tokens_total") >= tokens, 60)
        yield Watched(service, prometheus, alertmanager, webhook)


def ask(service: ServiceProcess, key: str, **fields: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{service.url}/v1/completions", json=BODY | fields, headers=headers, timeout=REQUEST_SECONDS)


def load(service: ServiceProcess) -> None:
    """Have it answer some requests of both keys, and one too late."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: ask(service, KEYS[index % 2]["key"]), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert ask(service, "sk-a", max_tokens=500, timeout=0.001).status_code == 504


def lose_a_rank(service: ServiceProcess) -> None:
    """Kill a rank while a request is under way, which is answered all the same."""
    begun, recoveries = (service.metric(f"ryzanstein_{name}") for name in (FIRST_TOKENS, "recoveries_total"))
    victim = psutil.Process(service.rank_pids()[1])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, service, "sk-a", max_tokens=600)
        wait_until(lambda: service.metric(f"ryzanstein_{FIRST_TOKENS}") > begun, REQUEST_SECONDS)
        victim.kill()
        assert answer.result().status_code == 200
    wait_until(lambda: service.metric("ryzanstein_recoveries_total") > recoveries, REQUEST_SECONDS)
    wait_until(lambda: httpx.get(f"{service.url}/ready").status_code == 200, REQUEST_SECONDS)


def with_values(expression: str) -> str:
    """Return a panel's expression as Grafana asks it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def numbers(series: list[dict[str, Any]]) -> list[float]:
    return [float(each["value"][1]) for each in series]


@pytest.mark.parametrize("expression", [pytest.param(expression, id=name) for name, expression in TARGETS])
def test_a_panel_of_the_dashboard_shows_something(watched: Watched, expression: str) -> None:
    found = numbers(watched.prometheus.query(with_values(expression)))
    assert any(math.isfinite(number) for number in found)


def test_the_dashboard_offers_the_model_and_the_instance(watched: Watched) -> None:
    for variable in dashboard.dashboard()["templating"]["list"]:
        if found := re.fullmatch(r"label_values\((.+), (\w+)\)", variable.get("definition", "")):
            series = watched.prometheus.ask("series", **{"match[]": with_values(found[1])})
            assert len({each[found[2]] for each in series}) == 1


def test_every_rule_is_evaluated_without_error(watched: Watched) -> None:
    found = [rule for group in watched.prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(RULES)
    assert [(rule["name"], rule.get("lastError")) for rule in found if rule["health"] != "ok"] == []


@pytest.mark.parametrize("name", [rule["record"] for rule in RULES if "record" in rule])
def test_a_recorded_series_is_there(watched: Watched, name: str) -> None:
    (labels,) = {frozenset(series["metric"]) for series in watched.prometheus.query(name)}
    assert {"job", "model_name"} < labels
    assert ("instance" in labels) == (not name.startswith("model_name:"))


def test_shares_are_what_the_service_did(watched: Watched) -> None:
    read = watched.prometheus.value
    wait_until(lambda: read("model_name:ryzanstein_http_responses_5xx:ratio5m") > 0, 60)  # rules lag behind
    assert 0 < read("model_name:ryzanstein_http_responses_5xx:ratio5m") < 0.3  # those that came too late
    assert 0 < read("model_name:ryzanstein_requests_timed_out:ratio5m") < 0.3
    assert read("model_name:ryzanstein_requests_rejected:ratio5m") == 0
    assert 0 < read("instance:ryzanstein_recovery_seconds:mean1h") < 60


def test_each_rank_communicated_for_a_share_of_its_time(watched: Watched) -> None:
    def are_shares() -> bool:
        shares = numbers(watched.prometheus.query("rank:ryzanstein_step_communicate:ratio5m"))
        return len(shares) == 2 and all(0 < share < 1 for share in shares)

    wait_until(are_shares, 60)  # ranks' reports and rules lag behind


def test_ranks_that_die_often_are_told_to_the_webhook(watched: Watched) -> None:
    wait_until(lambda: bool(watched.webhook.named(RANKS_DIE_OFTEN)), 60)
    alert = watched.webhook.named(RANKS_DIE_OFTEN)[0]
    assert alert["status"] == "firing"
    instance = watched.service.url.removeprefix("http://")
    assert alert["labels"]["instance"] == instance
    assert alert["labels"]["severity"] == "critical"
    assert re.fullmatch(
        rf"{re.escape(instance)} lost its ranks [34] times in a quarter of an hour", alert["annotations"]["summary"]
    )


def test_an_alert_is_marked_on_the_dashboard(watched: Watched) -> None:
    (annotation,) = dashboard.dashboard()["annotations"]["list"]
    wait_until(lambda: bool(watched.prometheus.query(annotation["expr"])), 60)
    names = {series["metric"]["alertname"] for series in watched.prometheus.query(annotation["expr"])}
    assert RANKS_DIE_OFTEN in names


# --- the page --------------------------------------------------------------------------------------------------------


def blocks(pattern: str) -> list[str]:
    """Return the page's commands that begin so, of all of its blocks."""
    found = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in found for line in block.splitlines() if re.match(pattern, line)]


ASKS = r"promtool query|amtool alert"
CHECKS = r"promtool (check|test)|amtool check"
WRITES = r"python .* --update"
SERVES = r"prometheus |alertmanager |ryzanstein serve"


def run(line: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euc", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("line", blocks(ASKS))
def test_a_question_of_the_page_is_answered(watched: Watched, line: str) -> None:
    program(line.split()[0])
    wait_until(lambda: bool(watched.webhook.named(RANKS_DIE_OFTEN)), 60)
    line = line.replace("http://127.0.0.1:9090", watched.prometheus.url)
    assert re.search(
        "=> [1-9]|=> 0[.][0-9]|" + RANKS_DIE_OFTEN, run(line.replace("http://127.0.0.1:9093", watched.alertmanager.url))
    )


@pytest.mark.parametrize("line", blocks(CHECKS))
def test_a_check_of_the_page_finds_nothing(line: str) -> None:
    program(line.split()[0])
    assert "SUCCESS" in run(line)


@pytest.mark.parametrize("line", blocks(WRITES))
def test_a_file_that_the_page_writes_is_what_it_says(line: str, tmp_path: Path) -> None:
    path = line.split()[-1]
    run(line.replace(path, str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == (ROOT / path).read_text()


@pytest.mark.parametrize("line", blocks("prometheus |alertmanager "))
def test_what_the_page_starts_listens(line: str, tmp_path: Path) -> None:
    name, *arguments = line.replace("$DATA", str(tmp_path)).replace('"', "").split()
    # The port is of the test's, and no other Alertmanager is looked for.
    alone = ["--cluster.listen-address="] if name == "alertmanager" else []
    with Listener(program(name), *arguments, *alone) as listener:
        wait_until(lambda: httpx.get(f"{listener.url}/-/ready").status_code == 200, 60)


def test_the_service_of_the_page_has_the_gateways_names(watched: Watched) -> None:
    (line,) = blocks("ryzanstein serve")
    assert line == "ryzanstein serve --vllm-metric-names"
    assert watched.service.metric("vllm:kv_cache_usage_perc") == 0


def test_no_command_of_the_page_is_forgotten() -> None:
    assert blocks("") == blocks("|".join((ASKS, CHECKS, WRITES, SERVES)))

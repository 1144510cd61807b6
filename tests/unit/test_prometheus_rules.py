"""deploy/prometheus: Prometheus' own tools find nothing wrong, and every rule asks for what is served and is tested."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.metrics.table import BY_NAME, MODEL_NAME, Label, Metric
from server.middleware.auth import OPEN_FOLDER, OPEN_PATHS
from server.middleware.overload import GENERATION_PATHS

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
PAGE = (ROOT / "docs" / "monitoring.md").read_text()
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
OF_PROMETHEUS = {"job", "instance", "le"}  # labels that it adds, and that of buckets
JOB = "ryzanstein"
REFUSED = "model_name:ryzanstein_requests_rejected:ratio5m"

RULE_FILES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RULES: list[dict[str, Any]] = [
    rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
CASES: list[dict[str, Any]] = [case for path in TESTS for case in yaml.safe_load(path.read_text())["tests"]]

each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])


def check(program: str, *arguments: str | Path) -> None:
    """Have one of Prometheus' tools check something."""
    if shutil.which(program) is None:
        package = {"promtool": "prometheus", "amtool": "prometheus-alertmanager"}[program]
        pytest.skip(f"there is no {program}: apt-get install {package}")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def test_the_configuration_is_valid() -> None:
    check("promtool", "check", "config", PROMETHEUS / "prometheus.yml")


def test_the_rules_are_valid_and_none_is_there_twice() -> None:
    check("promtool", "check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)


def test_the_operator_gets_the_same_rules() -> None:
    manifest = ROOT / "deploy" / "kubernetes" / "components" / "service-monitor" / "prometheus-rule.yaml"
    groups = [group for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"]]
    assert yaml.safe_load(manifest.read_text())["spec"]["groups"] == groups, "docs/monitoring.md: write it anew"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_do_what_their_tests_say(path: Path) -> None:
    check("promtool", "test", "rules", path)


def test_the_configuration_of_alertmanager_is_valid() -> None:
    check("amtool", "check-config", PROMETHEUS / "alertmanager.yml")


@each_alert
def test_an_alert_is_tested_silent_and_firing_beside_somebody_that_is_well(alert: dict[str, Any]) -> None:
    checks = [
        (case, check)
        for case in CASES
        for check in case.get("alert_rule_test", [])
        if check["alertname"] == alert["alert"]
    ]
    firing = [(case, check["exp_alerts"]) for case, check in checks if check.get("exp_alerts")]
    assert firing
    assert any(not check.get("exp_alerts") for _, check in checks)
    if "absent(" not in alert["expr"]:  # of nobody there is nobody beside
        for case, expected in firing:
            names = {re.search(r'instance="(\w+)', series["series"])[1] for series in case["input_series"]}  # type: ignore[index]
            assert len(names) > len(expected)


def test_every_recording_rule_is_tested() -> None:
    tested = " ".join(check["expr"] for case in CASES for check in case.get("promql_expr_test", []))
    assert [name for name in RECORDED if not re.search(rf"{re.escape(name)}\b", tested)] == []


@each_alert
def test_an_alert_says_how_bad_it_is_of_whom_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["alert"].startswith("Ryzanstein")
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook"}
    assert notes["description"].endswith(".")
    assert "$labels" in notes["summary"] or "absent(" in alert["expr"]
    assert notes["runbook"] == f"docs/monitoring.md#{alert['alert'].lower()}"
    assert f"\n### {alert['alert']}\n" in PAGE


def test_the_page_has_no_alert_that_is_none() -> None:
    assert re.findall(r"^### (Ryzanstein\w+)$", PAGE, re.MULTILINE) == [alert["alert"] for alert in ALERTS]


def test_the_page_names_each_recording_rule() -> None:
    assert [name for name in RECORDED if f"`{name}`" not in PAGE] == []


def selected(expression: str) -> list[tuple[str, str]]:
    """Return the series that an expression selects, each with what is in its braces."""
    return re.findall(r"\b((?:\w+:)?(?:ryzanstein|process)_[\w:]+|up)\b(?:\{([^}]*)\})?", expression)


def metric_of(series: str) -> Metric:
    """Return the table's line of a series."""
    return BY_NAME.get(series) or BY_NAME[re.sub(r"_(bucket|sum|count)$", "", series)]


@each_rule
def test_a_rule_asks_for_series_that_are_served(rule: dict[str, Any]) -> None:
    found = selected(rule["expr"])
    assert found
    for series, selector in found:
        if series in RECORDED or series == "up":
            continue
        labels = {label.name: label for label in (*metric_of(series).labels, MODEL_NAME)}
        for name, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selector):
            if name in OF_PROMETHEUS:
                assert (name, value) == ("job", JOB)
            elif operator in ("=", "!="):
                assert is_value(labels[name], value), (series, name, value)
            else:
                assert name in labels


def test_the_share_that_is_refused_is_of_what_needs_a_key() -> None:
    ((_, selector),) = [each for each in selected(RECORDED[REFUSED]["expr"]) if "http_responses" in each[0]]
    (left_out,) = re.findall(r'^route!~"([^"]*)"$', selector)
    assert all(re.fullmatch(left_out, path) for path in (*OPEN_PATHS, f"{OPEN_FOLDER}{{path}}"))
    assert not any(re.fullmatch(left_out, path) for path in (*GENERATION_PATHS, "/tokenize", "/v1/models", "unknown"))


def is_value(label: Label, value: str) -> bool:
    """Return whether a label may have a value, as far as the table knows."""
    known = label.values or label.some
    return not known or value in known


@each_rule
def test_a_rule_groups_by_labels_that_are_there(rule: dict[str, Any]) -> None:
    there = {label.name for metric in BY_NAME.values() for label in metric.labels} | {MODEL_NAME.name} | OF_PROMETHEUS
    groups = re.findall(r"\b(?:by|on|ignoring)\s*\(([^)]*)\)", rule["expr"])
    assert {name.strip() for group in groups for name in group.split(",")} <= there


def test_prometheus_reads_the_service_of_the_compose_file() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    ((target,),) = [each["targets"] for each in job["static_configs"]]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    name, _, port = target.partition(":")
    assert job["job_name"] == JOB
    assert services[name]["ports"][0].endswith(f":{port}")
    assert "./deploy/prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]


def test_prometheus_tells_the_alertmanager_of_the_compose_file() -> None:
    (group,) = yaml.safe_load((PROMETHEUS / "alertmanagers.yml").read_text())
    (target,) = group["targets"]
    name, _, port = target.partition(":")
    alertmanager = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    assert alertmanager["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert "./deploy/prometheus:/etc/alertmanager:ro" in alertmanager["volumes"]
    assert alertmanager["entrypoint"] == ["/bin/sh", "/etc/alertmanager/alertmanager.sh"]


def started_with(folder: Path, webhook: str | None, text: str | None = None) -> Any:
    """Return the configuration that the compose file's Alertmanager is started with."""
    for name in ("alertmanager.sh", "alertmanager.yml"):
        shutil.copy(PROMETHEUS / name, folder)
    if text is not None:
        (folder / "alertmanager.yml").write_text(text)
    program = folder / "alertmanager"  # stands in for it, and shows its file
    program.write_text('#!/bin/sh\ncat "${1#--config.file=}"\n')
    program.chmod(0o755)
    (folder / "tmp").mkdir()
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder / "tmp")}
    if webhook is not None:
        environment["ALERT_WEBHOOK_URL"] = webhook
    command = ["sh", str(folder / "alertmanager.sh")]
    return yaml.safe_load(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("address", ["https://chat.example/hook", "http://h:8080/a?b=c&d=e|f#g\\1"])
def test_alertmanager_tells_the_address_that_the_variable_gives(address: str, tmp_path: Path) -> None:
    expected = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text())
    (webhook,) = expected["receivers"][1]["webhook_configs"]
    webhook["url"] = address
    assert started_with(tmp_path, address) == expected


@pytest.mark.parametrize("webhook", [None, ""])
def test_alertmanager_tells_nobody_while_there_is_no_address(webhook: str | None, tmp_path: Path) -> None:
    expected = yaml.safe_load((PROMETHEUS / "alertmanager.yml").read_text())
    expected["route"]["receiver"] = "nobody"
    assert started_with(tmp_path, webhook) == expected


def test_alertmanager_tells_the_address_that_its_file_was_given(tmp_path: Path) -> None:
    text = (PROMETHEUS / "alertmanager.yml").read_text().replace("http://127.0.0.1:9099/alerts", "http://mine/alerts")
    assert "mine" in text
    assert started_with(tmp_path, "", text) == yaml.safe_load(text)


def test_kubernetes_service_gives_the_job_the_same_name() -> None:
    service = yaml.safe_load((ROOT / "deploy" / "kubernetes" / "base" / "service.yaml").read_text())
    assert service["metadata"]["name"] == JOB  # the operator takes a Service's name as the job

"""Each manifest of deploy/kubernetes is one that a cluster takes: by strict schemas, those of custom resources too."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.custom_resources import SCHEMAS
from tests.manifests import CUSTOM_KINDS, GRAFANA, OVERLAYS, Manifest, build, build_all, with_component

VERSIONS = ("1.30", "1.37")  # the first with preStop's sleep, and the newest that is known


def validate(path: Path, manifests: Iterable[Manifest], version: str) -> "subprocess.CompletedProcess[str]":
    path.write_text(yaml.safe_dump_all(manifests))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def custom(manifest: Manifest) -> list[str]:
    """Return what is wrong with a custom resource."""
    validator = jsonschema.Draft202012Validator(SCHEMAS[manifest["kind"]])
    return [error.message for error in validator.iter_errors(manifest)]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    gateway = with_component(OVERLAYS[0], "inference-pool", tmp_path_factory.mktemp("gateway"))
    return [*build_all(), *build("base"), *build(gateway), *build(GRAFANA)]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_each_manifest(version: str, manifests: list[Manifest], tmp_path: Path) -> None:
    own = [item for item in manifests if item["kind"] not in CUSTOM_KINDS]
    done = validate(tmp_path / "manifests.yaml", own, version)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^INFO .* passed for resource", done.stdout + done.stderr, re.MULTILINE)) == len(own)


def test_custom_resources_are_as_their_definitions_say(manifests: list[Manifest]) -> None:
    found = [item for item in manifests if item["kind"] in CUSTOM_KINDS]
    assert {item["kind"] for item in found} == set(CUSTOM_KINDS)
    assert [custom(item) for item in found] == [[]] * len(found)


def test_a_misspelt_field_is_noticed(tmp_path: Path) -> None:
    deployment = next(item for item in build("base") if item["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    done = validate(tmp_path / "manifest.yaml", [deployment], VERSIONS[-1])
    assert done.returncode != 0
    assert "terminationGracePeriod" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "change",
    [{"interval": "15"}, {"target": 8000}, {"path": "metrics"}, {"port": None}],
    ids=["duration", "field", "path", "missing"],
)
def test_a_mistake_in_a_custom_resource_is_noticed(change: dict[str, Any]) -> None:
    monitor = next(item for item in build(OVERLAYS[0]) if item["kind"] == "ServiceMonitor")
    endpoint = {**monitor["spec"]["endpoints"][0], **change}
    monitor["spec"]["endpoints"] = [{key: value for key, value in endpoint.items() if value is not None}]
    assert len(custom(monitor)) == 1


def test_a_mistake_in_a_rule_is_noticed() -> None:
    rules = next(item for item in build(OVERLAYS[0]) if item["kind"] == "PrometheusRule")
    rules["spec"]["groups"][0]["rules"][0]["for"] = "a minute"
    assert len(custom(rules)) == 1

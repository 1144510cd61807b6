"""The manifests of deploy/kubernetes agree with the code, the image and each other."""

import json
import re
import shutil
import subprocess
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.bench.capacity import BLOCK_SIZE, capacity_of
from engine.bench.capacity_page import MEASURED
from engine.bench.shapes import shape
from engine.communication.shared_memory import segment_bytes
from engine.doctor.machine import SMALLEST_SHARED_MEMORY
from engine.kernels.library import fastest_library
from engine.protocol.config import EngineConfig
from server.cli import configure
from server.config import ServerConfig
from server.http_server import GRACE_SECONDS
from server.launch import KILL_SECONDS, STOP_SECONDS
from server.metrics import dashboard
from server.options import options_of, unknown_variables
from server.routes.health import VERSION
from tests.manifests import (
    GRAFANA,
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Manifest,
    build,
    build_all,
    container_of,
    one,
    options_of_pod,
    parse_quantity,
    pod_of,
    with_component,
)

SERVER_BYTES = 2**30  # server, orchestrator, fork server; what waits in them for slow clients; shared memory


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Manifest]:
    return build(request.param)


def configuration(manifests: list[Manifest]) -> tuple[EngineConfig, ServerConfig]:
    return configure(Namespace(config=None), options_of_pod(manifests))


def volume(workload: Manifest, name: str) -> dict[str, Any]:
    (found,) = [item for item in pod_of(workload)["volumes"] if item["name"] == name]
    return dict(found)


def unread(options: dict[str, str]) -> list[str]:
    known = [option for config in (EngineConfig, ServerConfig) for option in options_of(config)]
    return unknown_variables(options, known)


def test_the_options_are_options(overlay: list[Manifest]) -> None:
    assert unread(options_of_pod(overlay)) == []
    engine, server = configuration(overlay)
    assert (server.host, server.offline, server.shard_cache) == ("0.0.0.0", True, False)
    assert engine.tensor_parallel_size > 1


def test_the_components_options_are_options(tmp_path: Path) -> None:
    manifests = build(with_component(OVERLAYS[0], "inference-pool", tmp_path))
    assert unread(options_of_pod(manifests)) == []
    configuration(manifests)
    assert len(options_of_pod(manifests)) == 1 + len(options_of_pod(build(OVERLAYS[0])))


def test_variables_of_a_service_do_not_come_to_be_options() -> None:
    variables = {option.variable for config in (EngineConfig, ServerConfig) for option in options_of(config)}
    for item in build_all():
        if item["kind"] in ("Deployment", "Job"):
            assert pod_of(item)["enableServiceLinks"] is False
    name = one(build("base"), "Service")["metadata"]["name"]
    assert f"{name.upper()}_PORT" in variables  # or the line above says nothing


def test_all_speak_of_the_port_that_is_listened_on(overlay: list[Manifest], tmp_path: Path) -> None:
    container = container_of(one(overlay, "Deployment"))
    (port,) = container["ports"]
    assert port["containerPort"] == configuration(overlay)[1].port
    (service_port,) = one(overlay, "Service")["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    probes = [container[name]["httpGet"]["port"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    (rule,) = one(overlay, "NetworkPolicy")["spec"]["ingress"]
    assert {*probes, *(item["port"] for item in rule["ports"])} == {port["name"]}
    (endpoint,) = one(overlay, "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["port"] == service_port["name"]
    pool = one(build(with_component(OVERLAYS[0], "inference-pool", tmp_path)), "InferencePool")
    assert [item["number"] for item in pool["spec"]["targetPorts"]] == [port["containerPort"]]


def test_a_pod_is_not_killed_while_it_drains(overlay: list[Manifest]) -> None:
    deployment = one(overlay, "Deployment")
    before = container_of(deployment)["lifecycle"]["preStop"]["sleep"]["seconds"]
    end = configuration(overlay)[1].drain_timeout + GRACE_SECONDS + STOP_SECONDS + KILL_SECONDS
    assert pod_of(deployment)["terminationGracePeriodSeconds"] >= before + end


def test_a_recovery_of_seconds_keeps_its_pod_in_the_service_and_a_hung_server_is_found(overlay: list[Manifest]) -> None:
    container = container_of(one(overlay, "Deployment"))
    assert container["startupProbe"]["httpGet"]["path"] == container["livenessProbe"]["httpGet"]["path"] == "/health"
    readiness, liveness = container["readinessProbe"], container["livenessProbe"]
    assert 5 <= readiness["periodSeconds"] * readiness["failureThreshold"] <= 15
    assert 30 <= liveness["periodSeconds"] * liveness["failureThreshold"] <= 120


def test_the_user_is_the_images() -> None:
    user = re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    pods = [pod_of(item) for item in build_all() if item["kind"] in ("Deployment", "Job")]
    assert {pod["securityContext"]["runAsUser"] for pod in pods} == {int(user)}


def test_the_command_is_the_images_with_other_words() -> None:
    entrypoint = re.findall(r"^ENTRYPOINT \[(.*)\]$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1]
    assert entrypoint.endswith('"ryzanstein"')
    for item in build_all():
        if item["kind"] in ("Deployment", "Job"):
            assert "command" not in container_of(item)


def test_images_are_of_this_version() -> None:
    images = {container_of(item)["image"] for item in build_all() if item["kind"] in ("Deployment", "Job")}
    assert images == {f"ryzanstein:{VERSION}", f"ryzanstein:{VERSION}-cuda"}


def test_pods_ask_for_no_more_than_restricted_namespaces_allow() -> None:
    for item in build_all():
        if item["kind"] in ("Deployment", "Job"):
            pod, own = pod_of(item), container_of(item)["securityContext"]
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            assert own == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            kinds = {key for each in pod["volumes"] for key in each if key != "name"}
            assert kinds <= {"persistentVolumeClaim", "secret", "emptyDir"}


def test_shared_memory_has_room_for_what_ranks_add_up_in(overlay: list[Manifest]) -> None:
    engine, _ = configuration(overlay)
    size = parse_quantity(volume(one(overlay, "Deployment"), "shm")["emptyDir"]["sizeLimit"])
    assert size > SMALLEST_SHARED_MEMORY  # or the doctor warns
    if engine.device == "cuda":
        assert size >= 2**30  # what the doctor asks for


def test_shared_memory_has_room_for_collectives_of_so_many_ranks() -> None:
    manifests = build("overlays/cpu")
    size = parse_quantity(volume(one(manifests, "Deployment"), "shm")["emptyDir"]["sizeLimit"])
    ranks = configuration(manifests)[0].tensor_parallel_size
    assert size >= 2 * segment_bytes(fastest_library(), ranks)  # also while one group replaces another


def test_the_memory_on_cpus_is_weights_and_kv_cache_and_what_processes_take() -> None:
    manifests = build("overlays/cpu")
    engine, _ = configuration(manifests)
    resources = container_of(one(manifests, "Deployment"))["resources"]
    rank = capacity_of(
        shape("1b"),
        engine.tensor_parallel_size,
        dtype=torch.bfloat16,
        context=BLOCK_SIZE,
        sequences=1,
        overhead=MEASURED.overhead,
    )
    assert engine.kv_cache_memory is not None  # or it would be half of whatever is free
    needed = engine.tensor_parallel_size * (rank.weights + engine.kv_cache_memory + rank.overhead) + SERVER_BYTES
    assert needed <= parse_quantity(resources["requests"]["memory"]) < needed + 2**30


def test_requests_are_limits_and_whole_cores(overlay: list[Manifest]) -> None:
    resources = container_of(one(overlay, "Deployment"))["resources"]
    assert resources["requests"] == resources["limits"]
    assert int(resources["limits"]["cpu"]) >= configuration(overlay)[0].tensor_parallel_size


def test_each_rank_has_a_gpu() -> None:
    manifests = build("overlays/gpu")
    engine, _ = configuration(manifests)
    limits = container_of(one(manifests, "Deployment"))["resources"]["limits"]
    assert (engine.device, int(limits["nvidia.com/gpu"])) == ("cuda", engine.tensor_parallel_size)


def test_the_job_writes_what_the_service_reads(overlay: list[Manifest]) -> None:
    engine, _ = configuration(overlay)
    job = one(build("model"), "Job")
    *_, destination, ranks = container_of(job)["args"]
    assert destination == engine.model
    assert ranks == f"--tensor-parallel-size={engine.tensor_parallel_size}"
    claim = one(build("model"), "PersistentVolumeClaim")["metadata"]["name"]
    for workload in (job, one(overlay, "Deployment")):
        assert volume(workload, "models")["persistentVolumeClaim"]["claimName"] == claim
        (mount,) = [item for item in container_of(workload)["volumeMounts"] if item["name"] == "models"]
        assert Path(engine.model).is_relative_to(mount["mountPath"])


def test_the_key_is_where_the_secret_is_mounted(overlay: list[Manifest]) -> None:
    container = container_of(one(overlay, "Deployment"))
    (mount,) = [item for item in container["volumeMounts"] if item["name"] == "api-key"]
    key_file = configuration(overlay)[1].api_key_file
    assert key_file is not None
    assert str(Path(key_file).parent) == mount["mountPath"]
    secret = volume(one(overlay, "Deployment"), "api-key")["secret"]
    assert secret["optional"] is False
    assert f"create secret generic {secret['secretName']} --from-file={Path(key_file).name}=" in page()


def page() -> str:
    return (ROOT / "docs/kubernetes.md").read_text()


def test_all_that_is_written_to_is_a_volume(overlay: list[Manifest]) -> None:
    for workload in (one(overlay, "Deployment"), one(build("model"), "Job")):
        mounted = {item["name"] for item in container_of(workload)["volumeMounts"]}
        assert mounted == {item["name"] for item in pod_of(workload)["volumes"]}
        assert "/tmp" in {item["mountPath"] for item in container_of(workload)["volumeMounts"]}


def test_selectors_find_the_pods_and_no_others(overlay: list[Manifest], tmp_path: Path) -> None:
    deployment, job = one(overlay, "Deployment"), one(build("model"), "Job")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    (spread,) = pod_of(deployment)["topologySpreadConstraints"]
    selectors = [
        deployment["spec"]["selector"]["matchLabels"],
        one(overlay, "Service")["spec"]["selector"],
        one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one(overlay, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        spread["labelSelector"]["matchLabels"],
        one(build(with_component(OVERLAYS[0], "inference-pool", tmp_path)), "InferencePool")["spec"]["selector"][
            "matchLabels"
        ],
    ]
    assert selectors == [labels] * len(selectors)
    assert (
        one(overlay, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
        == one(overlay, "Service")["metadata"]["labels"]
    )
    assert job["spec"]["template"]["metadata"]["labels"] != labels
    policy = one(build("model"), "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]
    assert policy == job["spec"]["template"]["metadata"]["labels"]


def test_the_autoscaler_follows_metrics_that_are_served_and_the_adapter_knows(overlay: list[Manifest]) -> None:
    engine, server = configuration(overlay)
    scaler = one(overlay, "HorizontalPodAutoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == one(overlay, "Deployment")["metadata"]["name"]
    assert "replicas" not in one(overlay, "Deployment")["spec"]
    targets = {
        item["pods"]["metric"]["name"]: int(item["pods"]["target"]["averageValue"]) for item in scaler["metrics"]
    }
    assert targets["ryzanstein_queued_requests"] < server.max_queued_requests
    assert targets["ryzanstein_num_requests_running"] < engine.max_num_seqs
    (rule,) = yaml.safe_load((KUBERNETES / "components/autoscaling/prometheus-adapter.yaml").read_text())["rules"]
    (pattern,) = re.findall(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert all(re.fullmatch(pattern, name) for name in targets)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_what_the_adapter_asks_prometheus_is_a_query(tmp_path: Path) -> None:
    (rule,) = yaml.safe_load((KUBERNETES / "components/autoscaling/prometheus-adapter.yaml").read_text())["rules"]
    query = rule["metricsQuery"]
    filled = {"Series": "ryzanstein_queued_requests", "LabelMatchers": 'namespace="a",pod=~"b|c"', "GroupBy": "pod"}
    for name, text in filled.items():
        query = query.replace(f"<<.{name}>>", text)
    rules = [{"record": f"test:{number}", "expr": expr} for number, expr in enumerate((query, rule["seriesQuery"]))]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "adapter", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_in_the_namespace_is_in_one() -> None:
    namespace, *others = build_all()
    assert {item["metadata"]["namespace"] for item in others} == {namespace["metadata"]["name"]}


def test_grafana_finds_the_dashboard_in_the_cluster_as_it_is_in_the_file() -> None:
    (config_map,) = build(GRAFANA)
    assert config_map["kind"] == "ConfigMap"
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config_map["data"] == {"ryzanstein.json": dashboard.text()}
    assert len(json.dumps(config_map)) < 256 << 10  # for `kubectl apply` notes it in an annotation


def test_the_pages_variables_are_of_fields() -> None:
    names = {item.name for config in (EngineConfig, ServerConfig) for item in fields(config)}
    written = set(re.findall(r"RYZANSTEIN_([A-Z_]+)", page()))
    assert {name.lower() for name in written} <= names

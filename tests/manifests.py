"""deploy/kubernetes as kustomize builds it."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "deploy/kubernetes"
GRAFANA = ROOT / "deploy/grafana"  # the dashboard for a Grafana in a cluster
OVERLAYS = ("overlays/cpu", "overlays/gpu")
CUSTOM_KINDS = ("ServiceMonitor", "PrometheusRule", "InferencePool")  # which no cluster knows by itself
Manifest = dict[str, Any]


@cache
def kustomize_command() -> tuple[str, ...]:
    """Return the words before a folder that kustomize builds; skip the test where there is none of version 5."""
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "version", "--client", "--output=json"], capture_output=True, check=False)
        found = json.loads(done.stdout).get("kustomizeVersion", "none") if done.returncode == 0 else "none"
        if found.startswith("v5"):
            return ("kubectl", "kustomize")
        pytest.skip(f"kustomize 5 is needed, and kubectl holds {found}")
    pytest.skip("neither kustomize nor kubectl is installed")


@cache
def build_text(folder: Path) -> str:
    """Return what kustomize makes of a folder, as YAML documents."""
    done = subprocess.run([*kustomize_command(), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # deprecated fields
    return done.stdout


def build(folder: str | Path) -> list[Manifest]:
    """Return the resources of a folder below deploy/kubernetes, or of another."""
    return list(yaml.safe_load_all(build_text(KUBERNETES / folder)))


def build_all() -> list[Manifest]:
    """Return the resources of all folders, and the namespace that they are in."""
    namespace = yaml.safe_load((KUBERNETES / "namespace.yaml").read_text())
    return [namespace, *(item for folder in ("model", *OVERLAYS) for item in build(folder))]


def with_component(overlay: str, component: str, folder: Path) -> Path:
    """Return a copy of an overlay, below a folder, that has one component more, as a user would add it."""
    copy = Path(shutil.copytree(KUBERNETES, folder / "kubernetes")) / overlay
    path = copy / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text())
    kustomization["components"].append(f"../../components/{component}")
    path.write_text(yaml.safe_dump(kustomization))
    return copy


def one(manifests: Sequence[Manifest], kind: str) -> Manifest:
    """Return the only resource of a kind."""
    (found,) = [item for item in manifests if item["kind"] == kind]
    return found


def pod_of(workload: Manifest) -> Manifest:
    """Return the pod's specification of a Deployment or a Job."""
    pod: Manifest = workload["spec"]["template"]["spec"]
    return pod


def container_of(workload: Manifest) -> Manifest:
    """Return the only container of a Deployment or a Job."""
    (container,) = pod_of(workload)["containers"]
    found: Manifest = container
    return found


def options_of_pod(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Return the variables that the Deployment's container is given."""
    config_map = one(manifests, "ConfigMap")
    (source,) = container_of(one(manifests, "Deployment"))["envFrom"]
    assert source["configMapRef"]["name"] == config_map["metadata"]["name"]
    options: dict[str, str] = config_map["data"]
    return options


def parse_quantity(text: str) -> int:
    """Return the bytes of a quantity such as 8Gi."""
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    return int(text[:-2]) * units[text[-2:]] if text[-2:] in units else int(text)

"""The pods of deploy/kubernetes, run by podman: the Job's splits the embedded model, the Deployment's serves it.

Podman 4.3 knows less than a kubelet. What is left out or changed for it is in `for_podman`; probes are asked here.
"""

import base64
import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.container.containers import CommandFailedError, Containers
from tests.manifests import Manifest, build, container_of, one, pod_of
from tests.service_process import wait_until

KEY = "a-key-of-a-secret"
URL = "http://127.0.0.1:8000"
POD, CONTAINER, SHARD = "ryzanstein-pod-0", "ryzanstein-pod-0-ryzanstein", "ryzanstein-shard-shard"
KEY_FILE = "/run/secrets/ryzanstein/api-key"
SECONDS = 180.0
ASK = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json",
    "Authorization": "Bearer " + sys.argv[3]})
sys.stdout.buffer.write(urllib.request.urlopen(request, timeout=60).read())
"""


def for_podman(workload: Manifest, image: str) -> Manifest:
    """Return a Deployment or a Job that runs another image, without what podman does not know."""
    changed = copy.deepcopy(workload)
    container, pod = container_of(changed), pod_of(changed)
    container["image"] = image
    for name in ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):  # there is no kubelet
        container.pop(name, None)
    for port in container.get("ports", []):
        port["hostPort"] = port["containerPort"]  # there is no Service
    # Volumes in memory lie on disk there: the ranks take the /dev/shm that podman gives each pod.
    pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "shm"]
    container["volumeMounts"] = [mount for mount in container["volumeMounts"] if mount["name"] != "shm"]
    return changed


def as_pod(job: Manifest) -> Manifest:
    """Return the pod that a cluster would make of a Job, which podman does not."""
    metadata = {"name": job["metadata"]["name"], "labels": job["spec"]["template"]["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_of(job)}


def play(containers: Containers, *manifests: Manifest) -> None:
    path = containers.folder / "manifests.yaml"
    path.write_text(yaml.safe_dump_all(manifests))
    containers.inside("podman", "kube", "play", str(path), seconds=SECONDS)


@pytest.fixture
def model(containers: Containers, image: str) -> Iterator[str]:
    """The log of the Job's container, which has written the embedded model into the volume."""
    program = "from engine.protocol.config import EMBEDDED_MODEL; print(EMBEDDED_MODEL)"
    source = containers.inside("podman", "run", "--rm", "--entrypoint", "python", image, "-c", program).strip()
    job = for_podman(one(build("model"), "Job"), image)
    words = container_of(job)["args"]
    words[words.index("org/name")] = source
    play(containers, as_pod(job))
    code = containers.inside("podman", "wait", SHARD, seconds=SECONDS).strip()
    log = containers.logs(SHARD)
    assert code == "0", log
    containers.inside("podman", "pod", "rm", "--force", one(build("model"), "Job")["metadata"]["name"])
    yield log
    containers.inside("podman", "volume", "rm", "--force", "ryzanstein-models")


@pytest.fixture
def served(containers: Containers, image: str, model: str) -> Iterator[Manifest]:
    """The Deployment whose pod is READY, on what the Job wrote."""
    assert model
    manifests = build("overlays/cpu")
    deployment = for_podman(one(manifests, "Deployment"), image)
    data = {"api-key": base64.b64encode(KEY.encode()).decode()}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "ryzanstein-api-key"}, "data": data}
    play(containers, one(manifests, "ConfigMap"), secret, deployment)
    try:
        wait_until(lambda: is_ready(containers), SECONDS)
    except TimeoutError:
        raise TimeoutError(f"the pod did not become ready:\n{containers.logs(CONTAINER)}") from None
    yield deployment
    containers.inside("podman", "pod", "rm", "--force", POD)


def is_ready(containers: Containers) -> bool:
    """Ask what the readiness probe asks."""
    path = container_of(one(build("overlays/cpu"), "Deployment"))["readinessProbe"]["httpGet"]["path"]
    try:
        return bool(containers.ask(f"{URL}{path}")["state"] == "READY")
    except CommandFailedError:
        return False


def complete(containers: Containers, key: str) -> Any:
    body = {"model": "model", "prompt": "import ", "max_tokens": 8, "temperature": 0}
    command = ["podman", "exec", CONTAINER, "python", "-c", ASK, f"{URL}/v1/completions", json.dumps(body), key]
    return json.loads(containers.inside(*command))


def test_the_deployments_pod_answers_from_what_the_job_wrote_and_ends_in_order(
    containers: Containers, served: Manifest
) -> None:
    key = containers.inside(
        "podman", "exec", CONTAINER, "cat", KEY_FILE
    )  # podman 4.3 leaves a Secret's base64 as it is
    assert complete(containers, key)["usage"]["completion_tokens"] == 8
    with pytest.raises(CommandFailedError, match="401"):
        complete(containers, "another")
    assert len(containers.ask(f"{URL}/ready")["ranks"]) == 2
    assert containers.ask(f"{URL}/health")
    see_that_it_has_no_rights(containers, served)
    containers.inside("podman", "pod", "stop", "--time", str(pod_of(served)["terminationGracePeriodSeconds"]), POD)
    assert containers.inspect(CONTAINER)["State"]["ExitCode"] == 0


def see_that_it_has_no_rights(containers: Containers, deployment: Manifest) -> None:
    status = containers.inside("podman", "exec", CONTAINER, "cat", "/proc/1/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    security = pod_of(deployment)["securityContext"]
    assert lines["Uid"].split() == [str(security["runAsUser"])] * 4
    assert lines["Gid"].split() == [str(security["runAsGroup"])] * 4
    assert (lines["CapEff"], lines["CapBnd"], lines["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert lines["Seccomp"] == "2"
    for path in ("/x", "/models/x", "/run/secrets/ryzanstein/x"):
        with pytest.raises(CommandFailedError, match="Read-only file system"):
            containers.inside("podman", "exec", CONTAINER, "touch", path)
    containers.inside("podman", "exec", CONTAINER, "touch", "/tmp/x")

"""The commands of docs/kubernetes.md, by the real kubectl, in their order; what answers is an API of the tests."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes_api import NODE, KubernetesAPI
from tests.manifests import KUBERNETES, ROOT, build, kustomize_command

PAGE = (ROOT / "docs/kubernetes.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
INLINE = re.findall(r"`(kubectl -n [^`]*)`", PAGE)
# What needs a pod that runs: test_kubernetes_service.py asks such a service what the second asks.
NOT_RUN = ("kubectl -n ryzanstein port-forward", "curl ")
COMMANDS = [command for command in (*BLOCKS, *INLINE) if not command.startswith(NOT_RUN)]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesAPI]:
    kustomize_command()
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    with KubernetesAPI(tmp_path_factory.mktemp("cluster")) as api:
        api.put("v1", "Namespace", "ingress-nginx")
        api.put("v1", "Node", NODE, spec={})
        yield api


def run(command: str, api: KubernetesAPI, folder: Path) -> "subprocess.CompletedProcess[str]":
    key_file = folder / "key"
    key_file.write_text("a-key")
    own = {"KUBECONFIG": str(api.kubeconfig), "HOME": str(folder), "KEY_FILE": str(key_file), "NODE": NODE}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_kubectl_does_what_the_page_says(command: str, api: KubernetesAPI, tmp_path: Path) -> None:
    done = run(command, api, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "deprecated" not in done.stderr


def test_all_of_it_has_come_to_the_cluster(api: KubernetesAPI) -> None:
    wanted = {(item["kind"], item["metadata"]["name"]) for name in ("model", "overlays/cpu") for item in build(name)}
    assert wanted | {("Namespace", "ryzanstein"), ("Secret", "ryzanstein-api-key")} <= api.objects.keys()
    assert api.objects["Namespace", "ingress-nginx"]["metadata"]["labels"] == {"ryzanstein/client": "true"}
    assert api.objects["Deployment", "ryzanstein"]["spec"]["replicas"] == 3
    assert api.objects["Node", NODE]["spec"]["unschedulable"] is True
    assert ("Pod", "ryzanstein-1-again") in api.objects  # what was evicted
    restarted = api.objects["Deployment", "ryzanstein"]["spec"]["template"]["metadata"]["annotations"]
    assert "kubectl.kubernetes.io/restartedAt" in restarted


def test_a_command_that_kubectl_does_not_understand_is_noticed(api: KubernetesAPI, tmp_path: Path) -> None:
    assert run("kubectl -n ryzanstein rollout status deployment/ryzanstein --no-such-flag", api, tmp_path).returncode
    assert run("kubectl -n ryzanstein get deployment no-such-name", api, tmp_path).returncode


def test_the_page_names_what_is_there() -> None:
    for path in re.findall(r"`((?:base|model|overlays|components)/[\w./-]+)`", PAGE):
        assert (KUBERNETES / path).exists(), path

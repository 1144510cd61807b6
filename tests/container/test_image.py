"""The image: what is in it, and what a container of it does."""

import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.container.conftest import BUILD_SECONDS
from tests.container.containers import CommandFailedError, Containers
from tests.service_process import wait_until

ROOT = Path(__file__).parents[2]
LARGEST = 1.6e9
# As little as docker gives a container: its root cannot be written, and there is no /tmp but where one is asked for.
LOCKED_DOWN = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs", "/tmp"),
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--memory", "2g", "--pids-limit", "512"),
)
URL = "http://127.0.0.1:8000"


@pytest.fixture
def served(containers: Containers, image: str) -> Iterator[str]:
    """The name of a container that serves the embedded model on two ranks, at port 8000."""
    options = ["--name", "served", "--publish", "8000:8000", *LOCKED_DOWN]
    arguments = ["serve", "--tensor-parallel-size", "2", "--drain-timeout", "300"]  # however slow the machine is
    containers.inside("podman", "run", "--detach", *options, image, *arguments)
    containers.wait_until_healthy("served")
    yield "served"
    containers.remove("served")


def run(containers: Containers, image: str, *command: str, user: str = "10001:0") -> str:
    """Run a program of the image in a container of its own, and return what it prints."""
    start = ["podman", "run", "--rm", "--network", "none", "--user", user, *LOCKED_DOWN]
    return containers.inside(*start, "--entrypoint", command[0], image, *command[1:])


def test_the_image_for_cpus_is_smaller_than_1600_mb(
    containers: Containers, image: str, tell: Callable[[str], None]
) -> None:
    size = containers.inspect(image)["Size"]
    tell(f"the image for CPUs takes {size / 1e6:.0f} MB")
    assert size < LARGEST


def test_docker_run_with_a_port_answers(containers: Containers, image: str) -> None:
    containers.inside("docker", "run", "--detach", "--name", "plain", "-p", "8000:8000", image)
    containers.wait_until_healthy("plain")
    answer = containers.ask(f"{URL}/v1/completions", prompt="def is_prime(n):", max_tokens=8, temperature=0)
    assert answer["usage"]["completion_tokens"] == 8
    containers.remove("plain")


def test_a_container_without_any_right_answers_and_is_healthy(containers: Containers, served: str) -> None:
    answer = containers.ask(f"{URL}/v1/completions", prompt="import ", max_tokens=8, temperature=0)
    assert answer["usage"]["completion_tokens"] == 8
    assert len(containers.ask(f"{URL}/ready")["ranks"]) == 2
    assert containers.is_healthy(served)


def test_its_processes_have_no_user_root_no_capability_and_no_file_to_write(
    containers: Containers, served: str
) -> None:
    status = containers.inside("podman", "exec", served, "sh", "-c", "cat /proc/[0-9]*/status")
    users = set(re.findall(r"^Uid:\s+(.*)$", status, re.MULTILINE))
    assert users == {"10001\t10001\t10001\t10001"}
    assert set(re.findall(r"^Cap(?:Inh|Prm|Eff|Bnd|Amb):\s+(\w+)$", status, re.MULTILINE)) == {"0" * 16}
    assert set(re.findall(r"^NoNewPrivs:\s+(\d)$", status, re.MULTILINE)) == {"1"}
    mounts = containers.inside("podman", "exec", served, "cat", "/proc/self/mounts").splitlines()
    (root,) = [line.split() for line in mounts if line.split()[1] == "/"]
    assert "ro" in root[3].split(",")
    writable = {line.split()[1] for line in mounts if "rw" in line.split()[3].split(",")}
    of_every_container = re.compile(
        r"/(dev|proc|sys)(/.*)?|/run/\.containerenv|/run/secrets|/etc/(hosts|hostname|resolv\.conf)"
    )
    assert {path for path in writable if not of_every_container.fullmatch(path)} == {
        "/cache/huggingface",
        "/cache/shards",
        "/tmp",
    }


def test_the_caches_are_volumes_that_it_can_write(containers: Containers, image: str, served: str) -> None:
    assert set(containers.inspect(image)["Config"]["Volumes"]) == {"/cache/huggingface", "/cache/shards"}
    for path in ("/cache/huggingface", "/cache/shards"):
        containers.inside("podman", "exec", served, "touch", f"{path}/x")


def test_any_user_of_group_0_can_serve(containers: Containers, image: str) -> None:
    options = ["--name", "other", "--user", "23456:0", "--publish", "8000:8000", *LOCKED_DOWN]
    containers.inside("podman", "run", "--detach", *options, image)
    containers.wait_until_healthy("other")
    assert containers.ask(f"{URL}/v1/completions", prompt="import ", max_tokens=2)["choices"]
    containers.inside("podman", "exec", "other", "touch", "/cache/shards/x")
    containers.remove("other")


def test_sigterm_lets_a_stream_finish_and_the_exit_code_is_0(containers: Containers, served: str) -> None:
    body = '{"prompt": "import ", "max_tokens": 400, "ignore_eos": true, "stream": true}'
    curl = ["podman", "exec", served, "python", "-c", STREAM, body]
    stream = containers.start_inside(*curl)
    assert stream.stdout is not None
    first = stream.stdout.readline()
    assert first.startswith(("id: ", "data: "))
    containers.inside("podman", "kill", "--signal", "TERM", served)
    wait_until(lambda: "may take 300 s to finish" in containers.logs(served), 60)
    rest = stream.stdout.read()
    assert stream.wait(60) == 0
    stream.stdout.close()
    assert rest.rstrip().endswith("data: [DONE]")
    assert rest.count('"finish_reason":"length"') == 1
    containers.inside("podman", "wait", served)
    assert containers.inspect(served)["State"]["ExitCode"] == 0


STREAM = """
import sys, urllib.request
request = urllib.request.Request(
    "http://127.0.0.1:8000/v1/completions", sys.argv[1].encode(), {"Content-Type": "application/json"}
)
for line in urllib.request.urlopen(request):
    sys.stdout.write(line.decode())
    sys.stdout.flush()
"""


def processes(containers: Containers, name: str) -> dict[int, tuple[str, str, int]]:
    """Return command, state and parent of each process of a container."""
    text = containers.inside("podman", "exec", name, "sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null || :")
    rows = re.findall(r"^(\d+) \((.*)\) (\w) (\d+) ", text, re.MULTILINE)
    return {int(pid): (command, state, int(parent)) for pid, command, state, parent in rows}


def test_process_1_reaps_what_loses_its_parent(containers: Containers, served: str) -> None:
    assert processes(containers, served)[1][0] == "tini"
    containers.inside("podman", "exec", served, "sh", "-c", "sleep 60 & echo $! > /tmp/orphan")
    orphan = int(containers.inside("podman", "exec", served, "cat", "/tmp/orphan"))
    wait_until(lambda: processes(containers, served)[orphan][2] == 1, 30)
    containers.inside("podman", "exec", served, "sh", "-c", f"kill {orphan}")
    wait_until(lambda: orphan not in processes(containers, served), 30)


def test_ranks_of_a_killed_orchestrator_leave_nothing_and_the_service_goes_on(
    containers: Containers, served: str
) -> None:
    before = {rank["pid"] for rank in containers.ask(f"{URL}/ready")["ranks"]}
    (orchestrator,) = {processes(containers, served)[pid][2] for pid in before}
    containers.inside("podman", "exec", served, "sh", "-c", f"kill -KILL {orchestrator}")
    wait_until(lambda: not {orchestrator, *before} & set(processes(containers, served)), 60)
    containers.wait_until_healthy(served)
    assert containers.ask(f"{URL}/v1/completions", prompt="import ", max_tokens=2)["choices"]
    assert not [state for _, state, _ in processes(containers, served).values() if state == "Z"]


def test_it_has_the_kernels_and_no_compiler_no_pip_and_no_headers(containers: Containers, image: str) -> None:
    program = (
        "from engine.kernels.instruction_sets import INSTRUCTION_SETS\n"
        "from engine.kernels.library import KernelLibrary\n"
        "print(*(KernelLibrary(item.name).instruction_set for item in INSTRUCTION_SETS))"
    )
    assert run(containers, image, "python", "-c", program).split() == ["avx512_bf16", "avx512", "avx2"]
    compilers = ("cc", "c++", "gcc", "g++", "gcc-12", "g++-12", "cc1", "cc1plus", "clang", "as", "ld", "make")
    names = (*compilers, "pip", "pip3", "curl", "wget", "Python.h", "protoc")
    looked_for = " -o ".join(f"-name {shlex.quote(name)}" for name in names)
    found = run(containers, image, "sh", "-c", f"find / -xdev -not -type d '(' {looked_for} ')' 2>/dev/null || :")
    assert found.splitlines() == []


def test_nothing_of_the_builds_secrets_is_in_any_file_of_the_image_or_its_history(
    containers: Containers, image: str, secret: str
) -> None:
    mounted = containers.inside("podman", "image", "mount", image).strip()
    looking = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", "--devices=skip", secret.strip()]
    with pytest.raises(CommandFailedError, match="ended with 1:"):  # grep found nothing
        containers.inside(*looking, mounted)
    containers.inside(*looking, str(containers.folder / "secrets"))  # but where it is, it finds it
    containers.inside("podman", "image", "unmount", image)
    known = str(containers.inspect(image))
    assert secret.strip() not in known
    assert "PIP_" not in known.replace("--mount=type=secret", "")
    assert run(containers, image, "sh", "-c", "ls /run/secrets /etc/pip.conf 2>/dev/null || :") == ""


def test_its_labels_say_what_it_is(containers: Containers, image: str) -> None:
    labels = containers.inspect(image)["Labels"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "org.opencontainers.image."
    known = {name.removeprefix(prefix): value for name, value in labels.items() if name.startswith(prefix)}
    subprocess.run(["git", "merge-base", "--is-ancestor", known.pop("revision"), "HEAD"], cwd=ROOT, check=True)
    assert known == {
        "title": project["name"],
        "description": "Serves open-weights language models over an OpenAI-compatible API",
        "licenses": project["license"],
        "version": project["version"],
        "base.name": "docker.io/library/debian:12-slim",
    }


def test_other_commands_than_serve_run_too(containers: Containers, image: str) -> None:
    help_text = containers.inside("podman", "run", "--rm", "--network", "none", image, "checkpoint", "shard", "--help")
    assert "--tensor-parallel-size" in help_text


def test_the_target_for_cuda_says_so_when_torch_has_none(
    containers: Containers, image: str, image_options: str
) -> None:
    assert image  # its layers are found again
    options = ["BUILDER=buildah", f"IMAGE_OPTIONS={image_options}", "IMAGE_TARGET=cuda"]
    with pytest.raises(CommandFailedError, match="TORCH: the target cuda needs a build with CUDA"):
        containers.outside("make", "image", *options, cwd=ROOT, seconds=BUILD_SECONDS)

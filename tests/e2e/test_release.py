"""A release from a fresh clone: what `make dist` builds, and what it does where there is no compiler."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from engine.kernels.build import find_compiler
from engine.kernels.instruction_sets import INSTRUCTION_SETS, usable_instruction_sets
from engine.kernels.sources import HEADERS, SOURCES, library_name
from tests.service_process import ROOT, ServiceProcess

SECONDS = 600.0  # for one command: generous, compilers and pip take their time on a busy machine
LIBRARIES = {f"engine/kernels/{library_name(item.name)}" for item in INSTRUCTION_SETS}
MADE_BY_SETUPTOOLS = {"PKG-INFO", "setup.cfg"}
BESIDE_THE_PACKAGES = {"LICENSE", "README.md", "pyproject.toml"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        platform.machine() != "x86_64" or find_compiler() is None, reason="nothing here compiles the kernels"
    ),
    pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="this is no git checkout"),
]


def run(*command: str, cwd: Path, path: str = os.environ["PATH"]) -> str:
    """Return what a command writes, all of it."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": path, "PYTHONPATH": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh clone of what is committed, in which a release was built."""
    folder = tmp_path_factory.mktemp("release")
    run("git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", "clone", cwd=folder)
    run("make", "dist", f"PYTHON={sys.executable}", cwd=folder / "clone")
    yield folder / "clone"
    shutil.rmtree(folder)  # with torch in it, a gigabyte


@pytest.fixture(scope="module")
def wheel(clone: Path) -> Path:
    (path,) = (clone / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def source(clone: Path) -> Path:
    (path,) = (clone / "dist").glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def clean_python(clone: Path, wheel: Path) -> Path:
    """The wheel with all that it needs, and nothing else, installed where PATH has no compiler."""
    environment = clone.parent / "environment"
    run(sys.executable, "-m", "venv", str(environment), cwd=clone.parent)
    python = environment / "bin" / "python"
    torch = f"torch=={version('torch').partition('+')[0]}"  # any newer one would do; this one is at hand
    run(str(python), "-m", "pip", "install", "--quiet", torch, str(wheel), cwd=clone.parent, path=str(python.parent))
    return python


def tracked(clone: Path) -> set[str]:
    """Return the files of the two packages, as git knows them."""
    return set(run("git", "ls-files", "engine", "server", cwd=clone).split())


def kernels_of(python: Path) -> str:
    """Serve with what is installed, ask for something, and return what computed it."""
    command = [str(python.with_name("ryzanstein")), "serve", "--port", "0"]
    with ServiceProcess(command=command, environment={"PATH": str(python.parent), "PYTHONPATH": ""}) as service:
        assert service.complete(prompt="import ", max_tokens=8, temperature=0)["text"]
        assert httpx.get(f"{service.url}/version").json() == {"version": version("ryzanstein")}
        found = re.search(r"^  kernels +(\w+)", service.stderr, re.MULTILINE)
        assert found, service.stderr
        return found[1]


def test_a_source_distribution_holds_what_a_build_needs_and_nothing_else(clone: Path, source: Path) -> None:
    with tarfile.open(source) as packed:
        names = {name.partition("/")[2] for name in (member.name for member in packed if member.isfile())}
    names = {name for name in names if not name.startswith("ryzanstein.egg-info/")} - MADE_BY_SETUPTOOLS
    assert names == tracked(clone) | BESIDE_THE_PACKAGES


def test_a_wheel_holds_sources_and_libraries_for_any_python_and_the_linux_that_it_names(
    clone: Path, wheel: Path
) -> None:
    assert re.fullmatch(rf"ryzanstein-{version('ryzanstein')}-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    names = {name for name in names if not name.endswith("/") and ".dist-info/" not in name}
    assert names == tracked(clone) | LIBRARIES
    assert {f"engine/kernels/cpu/{path.name}" for path in (*SOURCES, *HEADERS)} <= names


def test_the_wheel_serves_with_its_kernels_where_there_is_no_compiler(clean_python: Path) -> None:
    run(str(clean_python), "-m", "pip", "check", cwd=clean_python.parent, path=str(clean_python.parent))
    (best, *_) = [item.name for item in usable_instruction_sets()] or ["torch"]
    assert kernels_of(clean_python) == best


def test_traces_without_their_extra_are_refused_in_one_line(clean_python: Path) -> None:
    command = [str(clean_python.with_name("ryzanstein")), "serve", "--otlp-traces-endpoint", "http://127.0.0.1:9/"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    message = "ryzanstein: error: --otlp-traces-endpoint needs OpenTelemetry: pip install 'ryzanstein[traces]'\n"
    assert (refused.returncode, refused.stderr) == (2, message)


def test_the_source_distribution_serves_with_torch_where_there_is_no_compiler(clean_python: Path, source: Path) -> None:
    again = ("install", "--quiet", "--force-reinstall", "--no-deps", str(source))
    run(str(clean_python), "-m", "pip", *again, cwd=clean_python.parent, path=str(clean_python.parent))
    assert kernels_of(clean_python) == "torch"

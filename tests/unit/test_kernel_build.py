"""The package's build compiles the C++ kernels, or says that it cannot and goes on."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.kernels.build import compile_kernels, find_compiler
from engine.kernels.instruction_sets import INSTRUCTION_SETS, usable_instruction_sets
from engine.kernels.sources import DIRECTORY, library_name
from tests.service_process import ROOT

LIBRARIES = [library_name(item.name) for item in INSTRUCTION_SETS]
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or find_compiler() is None, reason="nothing here compiles the kernels"
)


def setup(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a step of the package's build, as pip does, on the sources in `directory`."""
    return subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "--quiet", *arguments],
        cwd=directory,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.slow
@needs_compiler
def test_the_kernels_compile_without_a_warning(tmp_path: Path) -> None:
    paths = compile_kernels(tmp_path / "kernels", warnings_are_errors=True)
    assert [path.name for path in paths] == LIBRARIES
    assert sorted((tmp_path / "kernels").iterdir()) == sorted(paths)  # and nothing unfinished beside them


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "/no/such/compiler"}, "/no/such/compiler cannot be run: No such file or directory"),
        ({"CXX": "", "PATH": "/no/such/folder"}, "no C++ compiler was found: neither $CXX nor g++ nor c++"),
        ({"CXX": "false"}, "false cannot compile the kernels for avx"),
    ],
)
def test_a_build_without_a_compiler_says_so_once_and_succeeds(
    environment: dict[str, str], why: str, tmp_path: Path
) -> None:
    built = setup(ROOT, "build_ext", "--build-lib", str(tmp_path), **environment)
    assert built.returncode == 0, built.stderr
    warnings = [line for line in built.stderr.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"warning: ryzanstein is built without its C++ kernels: {why}")
    assert list(tmp_path.rglob("*.so")) == []


def test_a_build_that_cannot_write_says_so_and_succeeds(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    built = setup(ROOT, "build_ext", "--build-lib", str(tmp_path / "file"), CXX="false")
    assert built.returncode == 0, built.stderr
    assert re.search(r"warning: ryzanstein is built without its C\+\+ kernels: .*Not a directory", built.stderr)


@needs_compiler
def test_a_build_without_a_compiler_leaves_no_library_of_other_sources(tmp_path: Path) -> None:
    directory = tmp_path / "engine" / "kernels"
    directory.mkdir(parents=True)
    kept, removed = LIBRARIES[:2]
    shutil.copy(DIRECTORY / kept, directory)
    (directory / removed).write_bytes(b"\x7fELF of other sources")
    assert setup(ROOT, "build_ext", "--build-lib", str(tmp_path), CXX="/no/such/compiler").returncode == 0
    assert [path.name for path in directory.iterdir()] == [kept]


def test_another_processor_has_no_kernels_and_compiles_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert usable_instruction_sets() == []
    with pytest.raises(RuntimeError, match="for x86-64, and this is aarch64"):
        compile_kernels(tmp_path)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("fpu avx avx2", []),  # no fma
        ("fma avx2 f16c", ["avx2"]),
        ("fma avx2 f16c avx512f avx512bw avx512vl", ["avx2"]),  # not all of AVX-512
        ("fma avx2 f16c avx512f avx512bw avx512vl avx512dq", ["avx512", "avx2"]),
        ("fma avx2 f16c avx512f avx512bw avx512vl avx512dq avx512_bf16", ["avx512", "avx2"]),  # no VNNI
        (
            "fma avx2 f16c avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni",
            ["avx512_bf16", "avx512", "avx2"],
        ),
    ],
)
def test_a_processor_has_an_instruction_set_when_it_has_every_flag_of_it(
    flags: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nmodel name\t: avx2 of a name\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert [item.name for item in usable_instruction_sets(cpuinfo)] == names


def test_a_processor_that_does_not_say_what_it_has_has_none(tmp_path: Path) -> None:
    assert usable_instruction_sets(tmp_path / "nothing") == []

"""The C++ kernels are there and load on each instruction set of this machine; where not, it is told in one line."""

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.kernels import library
from engine.kernels.build import find_compiler
from engine.kernels.instruction_sets import INSTRUCTION_SETS, usable_instruction_sets
from engine.kernels.library import SIGNATURES, KernelLibrary, find_library
from engine.kernels.sources import DIRECTORY, SOURCES, library_name, source_hash
from tests.service_process import ROOT, ServiceProcess

USABLE = [item.name for item in usable_instruction_sets()]
BUILD_THEM = "the C++ kernels are missing or of other sources: run `make install`, or `python -m engine.kernels.build`"
needs_kernels = pytest.mark.skipif(not USABLE, reason="this machine has none of the instruction sets")
needs_compiler = pytest.mark.skipif(
    platform.machine() != "x86_64" or find_compiler() is None, reason="nothing here compiles the kernels"
)


def copies(directory: Path) -> Path:
    """Copy the libraries into `directory`, to spoil, and return that of the fastest instruction set."""
    for path in DIRECTORY.glob("kernels_*.so"):
        shutil.copy(path, directory)
    return directory / library_name(USABLE[0])


@needs_compiler
@pytest.mark.parametrize("instruction_set", [item.name for item in INSTRUCTION_SETS])
def test_there_is_a_library_for_every_instruction_set(instruction_set: str) -> None:
    assert (DIRECTORY / library_name(instruction_set)).is_file(), BUILD_THEM


@needs_compiler
@pytest.mark.parametrize("instruction_set", USABLE)
def test_each_library_that_this_machine_can_run_loads_and_is_of_these_sources(instruction_set: str) -> None:
    assert KernelLibrary(instruction_set).source_hash == source_hash(), BUILD_THEM


@needs_compiler
@pytest.mark.parametrize("instruction_set", USABLE)
def test_a_library_has_every_function_whose_arguments_are_declared(instruction_set: str) -> None:
    kernels = KernelLibrary(instruction_set)
    for name in SIGNATURES:
        kernels.function(name)


@needs_compiler
@needs_kernels
def test_auto_is_the_fastest_that_this_machine_has_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    found = find_library()
    assert found is not None
    assert found.instruction_set == USABLE[0]
    assert caplog.records == []


def cut_short(path: Path) -> str:
    os.truncate(path, path.stat().st_size // 2)
    return f"{path} is cut short"


def empty(path: Path) -> str:
    path.write_bytes(b"")
    return f"{path} is no library"


def of_another_machine(path: Path) -> str:
    header = bytearray(path.read_bytes())
    header[18] = 183  # AArch64
    path.write_bytes(header)
    return f"{path}: cannot open shared object file"


def missing(path: Path) -> str:
    path.unlink()
    return f"No such file or directory: '{path}'"


SPOILT = pytest.mark.parametrize("spoil", [cut_short, empty, of_another_machine, missing])


@needs_compiler
@needs_kernels
@SPOILT
def test_a_library_that_cannot_be_loaded_is_one_warning_for_auto(
    spoil: Callable[[Path], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    why = spoil(copies(tmp_path))
    assert find_library("auto", tmp_path) is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("there are no C++ kernels, so torch computes, slower: ")
    assert why in record.getMessage()


@needs_compiler
@needs_kernels
@SPOILT
def test_a_library_that_cannot_be_loaded_is_an_error_where_it_was_asked_for(
    spoil: Callable[[Path], str], tmp_path: Path
) -> None:
    why = spoil(copies(tmp_path))
    with pytest.raises(ValueError, match=f"^--kernels {USABLE[0]}: .*{re.escape(why)}"):
        find_library(USABLE[0], tmp_path)


@pytest.fixture
def updated(tmp_path: Path) -> Path:
    """Libraries, and a source that changed after they were compiled."""
    copies(tmp_path)
    shutil.copytree(DIRECTORY / "cpu", tmp_path / "cpu")
    with (tmp_path / "cpu" / SOURCES[0].name).open("a") as file:
        file.write("// one more line\n")
    return tmp_path


OF_OTHER_SOURCES = (
    r"was compiled from other sources than those beside it: run `make install`, or `python -m engine\.kernels\.build`$"
)


@needs_compiler
@needs_kernels
@pytest.mark.parametrize("instruction_set", ["auto", *USABLE])
def test_a_library_of_other_sources_is_an_error_that_says_what_to_run(instruction_set: str, updated: Path) -> None:
    with pytest.raises(ValueError, match=OF_OTHER_SOURCES):
        find_library(instruction_set, updated)


@needs_compiler
@needs_kernels
@pytest.mark.parametrize("changed", ["added header", "removed source"])
def test_a_source_that_came_or_went_is_noticed(changed: str, tmp_path: Path) -> None:
    copies(tmp_path)
    shutil.copytree(DIRECTORY / "cpu", tmp_path / "cpu")
    assert find_library("auto", tmp_path) is not None
    if changed == "added header":
        (tmp_path / "cpu" / "new.h").touch()
    else:
        (tmp_path / "cpu" / SOURCES[-1].name).unlink()
    with pytest.raises(ValueError, match=OF_OTHER_SOURCES):
        find_library("auto", tmp_path)


@needs_compiler
@needs_kernels
def test_a_library_without_sources_beside_it_is_taken_as_it_is(tmp_path: Path) -> None:
    copies(tmp_path)
    assert find_library("auto", tmp_path) is not None


def test_an_instruction_set_that_this_machine_lacks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "usable_instruction_sets", list)
    with pytest.raises(ValueError, match=r"^--kernels avx2: this machine has none of them$"):
        find_library("avx2")


def test_a_machine_without_any_instruction_set_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "usable_instruction_sets", list)
    assert find_library() is None
    [record] = caplog.records
    expected = "there are no C++ kernels, so torch computes, slower: this is no x86-64 with AVX2"
    assert record.getMessage() == expected


@pytest.fixture(scope="module")
def package_without_libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it is installed where there was no compiler."""
    root = tmp_path_factory.mktemp("package")
    for name in ("engine", "server"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    return root


def serve(package: Path, *arguments: str) -> list[str]:
    """Return the command that serves with another copy of the package, which is left out when coverage is measured."""
    python = ["env", "-u", "COVERAGE_PROCESS_CONFIG", "-u", "COVERAGE_PROCESS_START", f"PYTHONPATH={package}"]
    return [*python, sys.executable, "-P", "-m", "server", "serve", "--port", "0", *arguments]


def test_without_its_kernels_a_service_starts_with_one_warning_and_computes(package_without_libraries: Path) -> None:
    with ServiceProcess(command=serve(package_without_libraries, "--kernels", "auto")) as service:
        assert service.complete(prompt="import ", max_tokens=2)["text"]
    assert service.stderr.count("there are no C++ kernels") == 1
    assert str(package_without_libraries) in service.stderr or not USABLE


@needs_compiler
@needs_kernels
def test_a_service_whose_kernels_are_of_other_sources_ends_in_one_line(
    package_without_libraries: Path, tmp_path: Path
) -> None:
    package = shutil.copytree(package_without_libraries, tmp_path / "package")
    copies(package / "engine/kernels")
    (package / "engine/kernels/cpu" / SOURCES[0].name).write_text("// another\n")
    ended = subprocess.run(
        serve(package, "--kernels", "auto"), capture_output=True, text=True, timeout=100, check=False, cwd=ROOT
    )
    assert ended.returncode == 2
    (error,) = [line for line in ended.stderr.splitlines() if "ryzanstein: error: " in line]
    assert re.search(OF_OTHER_SOURCES, error)


@needs_kernels
def test_without_its_kernels_a_service_that_asks_for_them_ends_in_one_line(package_without_libraries: Path) -> None:
    command = serve(package_without_libraries, "--kernels", USABLE[0])
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=ROOT)
    assert ended.returncode == 2
    (error,) = [line for line in ended.stderr.splitlines() if "ryzanstein: error: " in line]
    assert f"ryzanstein: error: --kernels {USABLE[0]}: " in error
    assert library_name(USABLE[0]) in error

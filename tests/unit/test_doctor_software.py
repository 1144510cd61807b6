"""Checks of packages, torch and what it can drive."""

from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from engine.doctor import software
from engine.protocol.checks import CheckStatus
from engine.protocol.config import EngineConfig

OK, WARNING, FAILURE = CheckStatus.OK, CheckStatus.WARNING, CheckStatus.FAILURE
DRIVER = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0
"""


@pytest.mark.parametrize(
    ("requirement", "problem", "is_missing"),
    [
        ("torch>=2", "", False),
        ("msgspec", "", False),
        ("msgspec<0.1", "msgspec {} is installed, <0.1 is needed", False),
        ("no-such-package-here>=1", "no-such-package-here is not installed", True),
    ],
)
def test_packages_are_compared_with_what_is_asked_for(requirement: str, problem: str, is_missing: bool) -> None:
    problems, missing = software.package_problems([Requirement(requirement)])
    assert problems == ([problem.format(version("msgspec"))] if problem else [])
    assert missing is is_missing


def test_every_check_of_this_installation_passes() -> None:
    found = {check.name: check.run() for check in software.checks(EngineConfig(tensor_parallel_size=2, device="cpu"))}
    assert {result.status for result in found.values()} == {OK}
    assert "the " in found["packages"].detail
    assert "gloo" in found["collectives"].detail


def test_the_drivers_version_is_found(tmp_path: Path) -> None:
    path = tmp_path / "version"
    assert software.driver(path) == ""
    path.write_text(DRIVER)
    assert software.driver(path) == "driver 550.54.15"


def test_no_driver_is_no_problem() -> None:
    assert software.unused_driver("", None, []).status is OK


def test_a_driver_without_a_cuda_build_of_torch_is_warned_of() -> None:
    found = software.unused_driver("driver 550.54.15", None, [])
    assert found.status is WARNING
    assert "this torch was built for CPUs only" in found.detail
    assert "make clean install TORCH=" in found.hint


def test_a_driver_that_torch_cannot_use_is_warned_of_in_torchs_words() -> None:
    found = software.unused_driver("driver 390.1", "12.8", ["The NVIDIA driver on your system is too old"])
    assert found.status is WARNING
    assert found.detail.endswith("torch finds no device: The NVIDIA driver on your system is too old")


@pytest.mark.parametrize(
    ("cpuinfo", "bfloat16"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 avx512_bf16\n", True),
        ("processor : 0\nflags\t\t: fpu avx2\n", False),
        ("processor : 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor : 0\n", False),
    ],
)
def test_half_precision_is_told_by_the_processors_flags(cpuinfo: str, bfloat16: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert software.has_half_precision("bfloat16", software.cpu_flags(path)) is bfloat16

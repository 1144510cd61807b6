"""Python, packages, torch and what it can drive."""

import platform
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from engine.communication.meeting import load_library
from engine.protocol.checks import Check, Finding, failure, ok, warning
from engine.protocol.config import EngineConfig
from engine.protocol.units import format_bytes
from engine.worker.device import num_cuda_devices

SECTION = "software"
CPUINFO = Path("/proc/cpuinfo")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
SLOW_CPU = ("DEFAULT", "NO AVX")  # torch's words for a processor without wide vectors
# Instruction sets that multiply in half precision, by type; the last of each is Arm's.
HALF_PRECISION_FLAGS = {
    "bfloat16": ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"),
    "float16": ("avx512_fp16", "amx_fp16", "asimdhp"),
}


def checks(engine: EngineConfig) -> list[Check]:
    """Return this section's checks."""
    return [
        Check(SECTION, "Python", _python),
        Check(SECTION, "packages", _packages),
        Check(SECTION, "torch", _torch),
        Check(SECTION, "instructions", _instructions),
        Check(SECTION, "CUDA", _cuda),
        Check(SECTION, "collectives", lambda: _collectives(engine)),
    ]


def _python() -> Finding:
    bits = 64 if sys.maxsize > 2**32 else 32
    found = f"{platform.python_implementation()} {platform.python_version()}, {bits} bits, {sys.executable}"
    return ok(found) if bits == 64 else failure(found, "install a 64-bit Python")


def _packages() -> Finding:
    """Compare what is installed with what this package asks for."""
    required = [Requirement(text) for text in requires("ryzanstein") or []]
    required = [requirement for requirement in required if requirement.marker is None or requirement.marker.evaluate()]
    problems, missing = package_problems(required)
    if not problems:
        return ok(f"ryzanstein {version('ryzanstein')} and the {len(required)} packages that it needs")
    hint = "run `make install`, or pip install the package again"
    return failure("; ".join(problems), hint) if missing else warning("; ".join(problems), hint)


def package_problems(required: list[Requirement]) -> tuple[list[str], bool]:
    """Return what is wrong with the installed packages, and whether any is missing altogether."""
    problems, missing = [], False
    for requirement in required:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            missing = True
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} {found} is installed, {requirement.specifier} is needed")
    return problems, missing


def _torch() -> Finding:
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return ok(f"{torch.__version__}, {build}, {'with' if has_onednn else 'without'} oneDNN")


def _instructions() -> Finding:
    capability = torch.backends.cpu.get_cpu_capability()
    flags = cpu_flags(CPUINFO)
    native = [name for name in HALF_PRECISION_FLAGS if has_half_precision(name, flags)]
    half = f"{' and '.join(native)} in hardware" if native else "no half precision in hardware"
    found = f"torch uses {capability} on {platform.machine()}; {half}"
    if capability in SLOW_CPU:
        return warning(found, "a processor with AVX2 or AVX-512 is several times faster")
    return ok(found)


def cpu_flags(cpuinfo: Path) -> set[str]:
    """Return the instruction sets that the kernel lists for the first core."""
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    return set(match[1].split()) if match else set()


def has_half_precision(dtype: str, flags: set[str]) -> bool:
    """Return whether a processor with these flags multiplies numbers of `dtype`, bfloat16 or float16."""
    return not flags.isdisjoint(HALF_PRECISION_FLAGS[dtype])


def _cuda() -> Finding:
    with warnings.catch_warnings(record=True) as caught:  # torch says why a device cannot be used
        warnings.simplefilter("always")
        count = num_cuda_devices()
    reasons = [" ".join(str(item.message).split()) for item in caught]
    if count:
        devices = [torch.cuda.get_device_properties(index) for index in range(count)]
        names = ", ".join(f"{device.name} ({format_bytes(device.total_memory)})" for device in devices)
        return ok(f"{count} device(s): {names}; {driver(NVIDIA_DRIVER) or 'driver version unknown'}")
    return unused_driver(driver(NVIDIA_DRIVER), torch.version.cuda, reasons)


def driver(path: Path) -> str:
    """Return the NVIDIA kernel driver's name and version; nothing where there is none."""
    match = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text()) if path.is_file() else None
    return f"driver {match[1]}" if match else ""


def unused_driver(found: str, cuda_build: str | None, reasons: list[str]) -> Finding:
    """Say why there are no CUDA devices, where there could be.

    Args:
        found: the driver's version, if there is a driver.
        cuda_build: the CUDA version that torch was built for, if it was.
        reasons: torch's warnings.
    """
    if not found:
        return ok("no NVIDIA driver on this machine; ranks run on the CPU")
    if cuda_build is None:
        return warning(
            f"NVIDIA {found} is there, but this torch was built for CPUs only",
            "install a CUDA build of torch: `make clean install TORCH=…` (README, Where torch comes from)",
        )
    return warning(f"NVIDIA {found} is there, but torch finds no device: {'; '.join(reasons) or 'it gives no reason'}")


def _collectives(engine: EngineConfig) -> Finding:
    libraries = {"shared memory": "", "gloo": "", "NCCL": ""}
    if load_library()[0] is not None:
        libraries["shared memory"] = "shared memory"
    if dist.is_gloo_available():
        libraries["gloo"] = "gloo"
    if dist.is_nccl_available():
        libraries["NCCL"] = f"NCCL {'.'.join(str(part) for part in torch.cuda.nccl.version())}"  # type: ignore[no-untyped-call]
    found = ", ".join(text for text in libraries.values() if text) or "none"
    if engine.tensor_parallel_size == 1:
        return ok(f"{found} (needed here: none, with one rank)")
    needed = _carriers(engine)
    if not any(libraries[carrier] for carrier in needed):
        hint = (
            "install another build of torch"
            if needed != ("shared memory",)
            else "install a C++ compiler, and then this"
        )
        return failure(f"{found}; ranks need {' or '.join(needed)}", hint)
    return ok(f"{found} (needed here: {' or '.join(needed)})")


def _carriers(engine: EngineConfig) -> tuple[str, ...]:
    """Return what ranks may use, the first that there is."""
    if engine.device != "cpu" and num_cuda_devices() >= engine.tensor_parallel_size:
        return ("NCCL",)
    return {"shared-memory": ("shared memory",), "gloo": ("gloo",), "auto": ("shared memory", "gloo")}[
        engine.collectives
    ]

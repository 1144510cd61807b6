"""The instruction sets that the C++ kernels are compiled for, and which of them this machine has."""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class InstructionSet:
    """One build of the kernels."""

    name: str
    compiler_flags: tuple[str, ...]
    # As /proc/cpuinfo has them; a CPU must have all. The kernel leaves out what it does not save for a process, such as
    # the registers of AVX-512, so nothing needs to ask the processor (xgetbv).
    cpu_flags: frozenset[str]


_AVX2 = InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c"), frozenset({"avx2", "fma", "f16c"}))
_AVX512 = InstructionSet(
    "avx512",
    (*_AVX2.compiler_flags, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
    _AVX2.cpu_flags | {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
)
_AVX512_BF16 = InstructionSet(
    "avx512_bf16",
    (*_AVX512.compiler_flags, "-mavx512bf16", "-mavx512vnni"),
    _AVX512.cpu_flags | {"avx512_bf16", "avx512_vnni"},
)
INSTRUCTION_SETS = (_AVX512_BF16, _AVX512, _AVX2)  # the fastest first


def usable_instruction_sets(cpuinfo: Path = CPUINFO) -> list[InstructionSet]:
    """Return those that this machine has, the fastest first; none where it is no x86-64."""
    if platform.machine() != "x86_64":
        return []
    flags = _cpu_flags(cpuinfo)
    return [item for item in INSTRUCTION_SETS if item.cpu_flags <= flags]


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    """Return what the first core can do; none if the file cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), frozenset())

"""How much memory this process has, and what the system read from disks for it."""

from pathlib import Path

PROCESS = Path("/proc/self")
RESET_PEAK = "5"  # proc(5), clear_refs


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory, mapped files included: exact, unlike `VmRSS`."""
    return _kibibytes(PROCESS / "smaps_rollup", "Rss:")


def peak_bytes() -> int:
    """Return the most that was in memory since `reset_peak`; some pages more or less."""
    return _kibibytes(PROCESS / "status", "VmHWM:")


def reset_peak() -> None:
    """Have `peak_bytes` begin with what is in memory now."""
    (PROCESS / "clear_refs").write_text(RESET_PEAK)


def storage_bytes() -> int | None:
    """Return the bytes that were read from a disk for this process; None where the system does not count them."""
    try:
        lines = (PROCESS / "io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def _kibibytes(path: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(name)) * 1024

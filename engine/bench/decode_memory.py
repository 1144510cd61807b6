"""What a rank's process takes beside weights and KV cache, read from outside."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)", re.MULTILINE)
IMPORT_TORCH = (
    "import torch\n"
    "lines = open('/proc/self/smaps_rollup').read().splitlines()\n"
    "print(next(line.split()[1] for line in lines if line.startswith('Rss:')))\n"
)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Resident bytes of one rank."""

    resident: int
    weights: int
    kv_cache: int  # of which so much is known to be in memory

    def beyond(self, bare: int) -> int:
        """Return what is beyond weights, KV cache, and `bare`, that of a process that only imported torch."""
        return self.resident - self.weights - self.kv_cache - bare

    def share_beyond(self, bare: int) -> float:
        """Return the same as a share of weights and KV cache."""
        return self.beyond(bare) / (self.weights + self.kv_cache)


def rank_memory(pid: int, weights: int, kv_cache: int, proc: Path = PROC) -> RankMemory:
    """Return what a rank's process has in memory.

    Args:
        pid: of the process.
        weights: bytes of them that are in memory, as the rank says.
        kv_cache: bytes of its KV cache, in memory or not.
        proc: where the system tells of processes.
    """
    text = (proc / str(pid) / "smaps").read_text()
    regions = list(_anonymous_regions(text))
    resident = sum(int(size) for size in re.findall(r"^Rss:\s+(\d+) kB$", text, re.MULTILINE)) * 1024
    return RankMemory(resident=resident, weights=weights, kv_cache=_resident_cache(regions, kv_cache))


def bare_memory() -> int:
    """Return the resident bytes of a process that only imported torch."""
    done = subprocess.run([sys.executable, "-c", IMPORT_TORCH], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024


def _anonymous_regions(smaps: str) -> list[tuple[int, int]]:
    """Return size and resident bytes of each region that is no file's."""
    heads = list(REGION.finditer(smaps))
    ends = [head.start() for head in heads[1:]] + [len(smaps)]
    found = []
    for head, end in zip(heads, ends, strict=True):
        resident = re.search(r"^Rss:\s+(\d+) kB$", smaps[head.start() : end], re.MULTILINE)
        if head[3] == "0" and resident is not None:
            found.append((int(head[2], 16) - int(head[1], 16), int(resident[1]) * 1024))
    return found


def _resident_cache(regions: list[tuple[int, int]], kv_cache: int) -> int:
    """Return how much of the cache is in memory at least: it is one mapping, with which the system may merge others."""
    fitting = [region for region in regions if region[0] >= kv_cache]
    if not fitting:
        return 0
    size, resident = min(fitting)
    return max(0, min(kv_cache, resident - (size - kv_cache)))

"""`python -m engine.bench.capacity_page`: write the tables of docs/capacity.md; `--update PAGE` puts them there.

What was measured is written down here, once; everything else in the tables follows from engine.bench.capacity.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.bench.capacity import Capacity, LoadTime, Speeds, capacity_of, load_time
from engine.bench.shapes import shape
from engine.protocol.units import format_bytes, format_seconds

BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
MODELS = ("7b", "13b", "70b")
RANKS = (1, 2, 4, 8)
CONTEXT, SEQUENCES = 4096, 8
DTYPE = torch.bfloat16
DISKS = {"0.5 GB/s": 0.5e9, "3 GB/s": 3e9, "7 GB/s": 7e9}
BUSES = {"PCIe 4.0 x16, 25 GB/s": 25e9, "PCIe 5.0 x16, 50 GB/s": 50e9}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `ryzanstein bench load` and a service said of the 1B shape in bfloat16, on two ranks and two cores."""

    file_bytes: int
    weight_bytes: int
    load_seconds: float
    touch_rate: float  # of one rank, while the other was at it too: the plain loop's
    warm_seconds: float  # until all was touched
    disk_rate: float  # of both together: the plain loop's
    cold_seconds: float
    overhead: int  # resident memory of a rank beside weights and written KV blocks, after a request


MEASURED = Measured(
    file_bytes=1_235_893_376,
    weight_bytes=1_235_881_984,
    load_seconds=0.0293,
    touch_rate=12.25e9,
    warm_seconds=0.1414,
    disk_rate=1.19e9,
    cold_seconds=2.1,
    overhead=265_080_832,
)


def tables() -> str:
    """Return all tables, as Markdown."""
    sections = (_check_table(), _size_table(), _cpu_table(), _device_table())
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def with_tables(page: str) -> str:
    """Return a page with the tables in their place.

    Raises:
        ValueError: if it has no such place.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def predicted_for_1b() -> tuple[Capacity, LoadTime]:
    """Return what the formula says of what was measured."""
    capacity = _capacity("1b", 2)
    return capacity, load_time(capacity, 2, _speeds(disk_rate=MEASURED.disk_rate))


def _check_table() -> Iterator[str]:
    capacity, times = predicted_for_1b()
    yield "### The formula and what was measured: 1B, two ranks"
    yield ""
    yield "| | predicted | measured |"
    yield "|---|---:|---:|"
    yield f"| bytes of a rank's file | {capacity.file:,} | {MEASURED.file_bytes:,} |"
    yield f"| bytes of a rank's weights | {capacity.weights:,} | {MEASURED.weight_bytes:,} |"
    yield f"| until all weights are touched, warm | {_time(times.warm_cpu)} | {_time(MEASURED.warm_seconds)} |"
    yield f"| until all weights are touched, cold | {_time(times.cold_cpu)} | {_time(MEASURED.cold_seconds)} |"


def _size_table() -> Iterator[str]:
    yield f"### Bytes (computed, not run), KV cache for {SEQUENCES} sequences of {CONTEXT} tokens"
    yield ""
    yield "| Model | Ranks | A rank's file, bytes | its weights | its KV cache | its memory | memory of all ranks |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, ranks in _rows():
        item = _capacity(name, ranks)
        sizes = (item.weights, item.kv_cache, item.memory, ranks * item.memory)
        yield f"| {name.upper()} | {ranks} | {item.file:,} | {' | '.join(map(format_bytes, sizes))} |"


def _cpu_table() -> Iterator[str]:
    yield "### Seconds until all weights are in memory, on the CPU of one host (computed, not run)"
    yield ""
    yield f"| Model | Ranks | warm | {' | '.join(f'cold, disk {name}' for name in DISKS)} |"
    yield f"|---|---:|---:|{'---:|' * len(DISKS)}"
    for name, ranks in _rows():
        times = [load_time(_capacity(name, ranks), ranks, _speeds(disk_rate=rate)) for rate in DISKS.values()]
        cells = [times[0].warm_cpu, *(item.cold_cpu for item in times)]
        yield f"| {name.upper()} | {ranks} | {' | '.join(map(_time, cells))} |"


def _device_table() -> Iterator[str]:
    heads = [f"{state}, {bus}" for bus in BUSES for state in ("warm", "cold, disk 7 GB/s")]
    yield "### Seconds until all weights are on the devices of one host, each on a bus of its own (computed, not run)"
    yield ""
    yield f"| Model | Ranks | {' | '.join(heads)} |"
    yield f"|---|---:|{'---:|' * len(heads)}"
    for name, ranks in _rows():
        speeds = _speeds(disk_rate=DISKS["7 GB/s"])
        times = [load_time(_capacity(name, ranks), ranks, replace(speeds, bus_rate=rate)) for rate in BUSES.values()]
        cells = [seconds for item in times for seconds in (item.warm_device, item.cold_device)]
        yield f"| {name.upper()} | {ranks} | {' | '.join(map(_time, cells))} |"


def _rows() -> Iterator[tuple[str, int]]:
    return ((name, ranks) for name in MODELS for ranks in RANKS)


def _capacity(name: str, ranks: int) -> Capacity:
    return capacity_of(
        shape(name), ranks, dtype=DTYPE, context=CONTEXT, sequences=SEQUENCES, overhead=MEASURED.overhead
    )


def _speeds(*, disk_rate: float) -> Speeds:
    return Speeds(
        load_seconds=MEASURED.load_seconds,
        touch_rate=MEASURED.touch_rate,
        disk_rate=disk_rate,
        bus_rate=next(iter(BUSES.values())),
    )


def _time(seconds: float) -> str:
    return format_seconds(seconds)


def main(arguments: list[str]) -> int:
    """Write the tables to standard output, or into a page; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engine.bench.capacity_page", description="Compute the tables.")
    parser.add_argument("--update", metavar="PAGE", type=Path, help="put the tables into this page")
    page = parser.parse_args(arguments).update
    if page is None:
        sys.stdout.write(tables())
    else:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

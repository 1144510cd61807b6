"""What metrics cost the server's process: CPU time of a streamed token, and of a page.

    .venv/bin/python benchmarks/metrics_cpu.py --streams 64 --ranks 4 --json metrics.json

A step of the engine brings each stream a token. The time of taking such a step in is measured with and without its
metrics, in turns; the difference by the streams is a token's cost. A page is what Prometheus reads, as text and as
OpenMetrics, of so many ranks that have told all that they can. Times are medians, with the quartiles.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import zmq.asyncio

from engine.protocol.messages import (
    GroupState,
    GroupStatus,
    HistogramDelta,
    RankStats,
    Request,
    SamplingParams,
    SchedulerStats,
    StatsReport,
    TokenBatch,
    TokenOutput,
)
from engine.protocol.stats import MEMORY_KINDS, OPERATIONS, PHASES, STEP_BUCKETS, TIME_BUCKETS
from server.engine_client import EngineClient
from server.flights import Inbox
from server.metrics.metrics import Metrics

ROUNDS, STEPS = 41, 50
FORMATS = {"text": "text/plain", "OpenMetrics": "application/openmetrics-text"}


class NobodysInbox(Inbox):
    """Takes outputs and keeps none."""

    def put(self, output: TokenOutput) -> None:
        """Drop it."""


class Unmeasured(EngineClient):
    """The link to the engine without its metrics."""

    def _measure(self, *_: object, **__: object) -> None:
        """Count nothing."""


def streaming(kind: type[EngineClient], num_streams: int) -> Callable[[], None]:
    """Return what takes in a step of so many streams; call it in an event loop."""
    client = kind(zmq.asyncio.Context.instance(), Metrics("model"))
    client.set_status(GroupStatus(1, GroupState.READY, max_model_len=2**20))
    ids = [f"request-{index}" for index in range(num_streams)]
    client.submit(
        [Request(name, [1, 2, 3], SamplingParams(max_tokens=2**20)) for name in ids],
        time.perf_counter(),
        NobodysInbox(),
    )
    for flight in client._choose():
        client._send_off(flight)
    batch = TokenBatch(1, 1, [TokenOutput(name, [7]) for name in ids])
    return lambda: client._handle(batch)


def token_costs(num_streams: int) -> list[float]:
    """Return the seconds that metrics add to a token, one figure a round."""
    with_metrics, without = streaming(EngineClient, num_streams), streaming(Unmeasured, num_streams)
    count = Metrics("model").key_generation_tokens.labels("key").inc  # the admission's, once a token

    def counted() -> None:
        with_metrics()
        for _ in range(num_streams):
            count(1)

    costs = [cpu_seconds(counted, STEPS) - cpu_seconds(without, STEPS) for _ in range(ROUNDS)]
    return [cost / num_streams for cost in costs]


def page_costs(num_ranks: int, accept: str) -> tuple[list[float], int]:
    """Return the seconds of each of some pages, and how many lines one has."""
    metrics = Metrics("model")
    metrics.add_report(StatsReport(1, SchedulerStats(1, 1, 8, 4, 0, 1, 0), [full(rank) for rank in range(num_ranks)]))
    num_lines = metrics.render(accept)[0].count(b"\n")
    return [cpu_seconds(lambda: metrics.render(accept), 1) for _ in range(ROUNDS)], num_lines


def full(rank: int) -> RankStats:
    """Return all that a rank can tell."""
    times = HistogramDelta([1] * (len(TIME_BUCKETS) + 1), 1.0)
    phases = dict.fromkeys(PHASES, HistogramDelta([1] * (len(STEP_BUCKETS) + 1), 1.0))
    collectives, num_bytes = dict.fromkeys(OPERATIONS, times), dict.fromkeys(OPERATIONS, 1000)
    memory = dict.fromkeys(MEMORY_KINDS, 2**30)
    return RankStats(1, rank, collectives, memory, collectives, "gloo", 4, num_bytes, phases)


def cpu_seconds(action: Callable[[], object], repeats: int) -> float:
    """Return the CPU time of one call."""
    begin = time.process_time()
    for _ in range(repeats):
        action()
    return (time.process_time() - begin) / repeats


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Return the three, in seconds."""
    return dict(zip(("lower", "median", "upper"), statistics.quantiles(values, n=4), strict=True))


def positive(text: str) -> int:
    """Read a number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


async def main(arguments: list[str]) -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description="Measure what metrics cost.")
    parser.add_argument("--streams", type=positive, default=64, help="streams that each step brings a token (64)")
    parser.add_argument("--ranks", type=positive, default=4, help="ranks that a page tells of (4)")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, float]] = {"token": quartiles(token_costs(options.streams))}
    for name, accept in FORMATS.items():
        seconds, num_lines = page_costs(options.ranks, accept)
        found[f"page, {name}"] = {**quartiles(seconds), "lines": num_lines}
    for name, figures in found.items():
        lower, median, upper = (figures[each] * 1e6 for each in ("lower", "median", "upper"))
        lines = f", {figures['lines']:.0f} lines" if "lines" in figures else ""
        sys.stdout.write(f"{name:<18} {median:8.2f} µs ({lower:.2f} to {upper:.2f}){lines}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))

"""How fast tokens come over HTTP, as a share of what reading memory allows.

    .venv/bin/python benchmarks/http_decode.py MODEL --batch 1 8 --json http.json

Starts `ryzanstein serve MODEL`, and asks for as many streams at once as a batch has, each of a prompt of random tokens.
Counted are the tokens that came while all streams ran: from the last stream's first token to the first stream's end.
The limits are measured before and after each batch, on all cores, while the service is idle. The first round, which
fills the KV cache with the prompts, is not counted. Options that are not known here are the service's.
What was found on one machine is in docs/decisions.md.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from arguments import count
from running_service import running_service

from engine.bench.decode_costs import ModelCosts, StepCost
from engine.bench.figures import aligned
from engine.bench.limits import LimitMeter
from engine.protocol.config import QUANTIZATIONS
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import find_model_directory
from engine.worker import host

REQUEST_SECONDS = 600.0
LIMIT_TRIES = 3


async def stream_times(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> list[float]:
    """Return when each token of one stream came."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "return_token_ids": True}  # fmt: skip
    times: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                choices = json.loads(line[len("data: ") :])["choices"]
                times += [time.perf_counter()] * sum(len(choice.get("token_ids") or ()) for choice in choices)
    return times


async def run_batch(url: str, prompts: list[list[int]], max_tokens: int) -> list[list[float]]:
    """Return when each token of each stream came."""
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_SECONDS, limits=limits) as client:
        return await asyncio.gather(*(stream_times(client, prompt, max_tokens) for prompt in prompts))


def step_seconds(streams: list[list[float]]) -> float:
    """Return the seconds a token of each stream, while all of them ran.

    Raises:
        RuntimeError: if that was no time: one ended before another began, or has one token alone.
    """
    begin, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    counts = [sum(begin < moment <= end for moment in times) for times in streams]
    if not any(counts):
        raise RuntimeError("--max-tokens: too few for all streams to run at once")
    return (end - begin) / statistics.fmean(counts)


class Limits:
    """Reads memory and multiplies matrices on all cores."""

    def __init__(self, dtype: str) -> None:
        cores = host.num_cpus()
        meter = LimitMeter((cores,), (dtype,))
        self._ways = {"read": meter.reader(cores), "multiply": meter.multiplier(dtype, cores)}

    def measure(self) -> dict[str, float]:
        """Return the median rates of some tries."""
        return {name: statistics.median(way.rate() for _ in range(LIMIT_TRIES)) for name, way in self._ways.items()}


def measure(namespace: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Return what was found for each batch."""
    config = ModelConfig.from_directory(find_model_directory(namespace.model))
    dtype = namespace.dtype if namespace.dtype != "auto" else config.dtype
    quantization, tp_size = namespace.quantization, namespace.tensor_parallel_size
    costs = ModelCosts.of(config, tp_size, getattr(torch, dtype), quantization)
    draw = random.Random(0)
    # One more than whole KV blocks: what the cache has is all but the last token.
    length = namespace.context // 16 * 16 + 1
    prompts = [[draw.randrange(config.vocab_size) for _ in range(length)] for _ in range(max(namespace.batch))]
    limits = Limits(dtype if quantization == "none" else quantization)
    options = ["--dtype", namespace.dtype, "--tensor-parallel-size", str(tp_size), "--quantization", quantization]
    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in namespace.batch}
    with running_service([namespace.model, *options, *arguments]) as url:
        asyncio.run(run_batch(url, prompts, 1))
        for _ in range(namespace.runs):
            for batch in namespace.batch:
                before = limits.measure()
                seconds = step_seconds(asyncio.run(run_batch(url, prompts[:batch], namespace.max_tokens)))
                cost = costs.decode(batch, length + namespace.max_tokens / 2)
                found[batch].append(compare(batch, seconds, cost, before, limits.measure()))
    return [{"batch": batch, "runs": runs} for batch, runs in found.items()]


def compare(
    batch: int, seconds: float, cost: StepCost, before: dict[str, float], after: dict[str, float]
) -> dict[str, float]:
    """Return a step's time beside what the machine allows."""
    rates = {name: (before[name] + after[name]) / 2 for name in before}
    read, compute = cost.read_bytes / rates["read"], cost.operations / rates["multiply"]
    return {
        "step_seconds": seconds,
        "tokens_per_second": batch / seconds,
        "read_seconds": read,
        "compute_seconds": compute,
        "read_share": read / seconds,
        "roof_share": max(read, compute) / seconds,
        "read_rate_before": before["read"],
        "read_rate_after": after["read"],
    }


def table(found: list[dict[str, Any]]) -> str:
    """Return it as people read it: medians, with the least and the most."""
    lines = [("batch", "tokens/s", "of the read limit", "of max(read, compute)", "read before, after")]
    for row in found:
        cells = [str(row["batch"])]
        for name, factor, unit in (("tokens_per_second", 1, ""), ("read_share", 100, "%"), ("roof_share", 100, "%")):
            values = [factor * run[name] for run in row["runs"]]
            cells.append(f"{statistics.median(values):.1f}{unit} ({min(values):.1f} to {max(values):.1f})")
        pairs = (f"{run['read_rate_before'] / 1e9:.1f}, {run['read_rate_after'] / 1e9:.1f}" for run in row["runs"])
        lines.append((*cells, "; ".join(pairs) + " GB/s"))
    return "\n".join(aligned(lines)) + "\n"


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="directory of a checkpoint of either form")
    parser.add_argument("--batch", type=count, nargs="+", default=[1], help="numbers of streams (1)")
    parser.add_argument("--context", type=count, default=256, help="tokens of a prompt (256)")
    parser.add_argument("--max-tokens", type=count, default=64, help="that a stream gets (64)")
    parser.add_argument("--runs", type=count, default=3, help="times that each is measured, in turns (3)")
    parser.add_argument("--dtype", default="auto", help="as serve has it")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, default="none", help="as serve has it")
    parser.add_argument("--tensor-parallel-size", "-tp", type=count, default=1, help="ranks (1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    namespace, arguments = parser.parse_known_args()
    try:
        found = measure(namespace, arguments)
    except (RuntimeError, ValueError, httpx.HTTPError) as error:
        sys.exit(f"{parser.prog}: error: {error}")
    sys.stdout.write(table(found))
    if namespace.json is not None:
        namespace.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()

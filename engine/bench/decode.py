"""`ryzanstein bench decode`: steps of a real engine, beside what the machine allows."""

import contextlib
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Self

import torch

from engine.bench.decode_costs import ModelCosts, StepCost
from engine.bench.decode_memory import bare_memory, rank_memory
from engine.bench.decode_report import DecodeBenchmark, Ratio, Row, SetupReport, row_name
from engine.bench.engine_process import Arrival, EngineProcess
from engine.bench.figures import Figure
from engine.bench.limits import LimitMeter
from engine.bench.limits_report import READ, Limit
from engine.protocol.commands import BenchDecodeCommand
from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.protocol.model_directory import find_model_directory
from engine.worker import host
from engine.worker.placement import asked_threads, place, read_processors

FIRST_STEPS = 2  # of a turn, which are not counted: the first admits the sequences, the next may wait for what it woke
LIMIT_TRIES = 3


def measure_decode(command: BenchDecodeCommand) -> DecodeBenchmark:
    """Start engines and measure them in turns, with the machine's limits before and after each turn.

    Raises:
        ValueError: naming the file or option, if the model cannot be run so.
        RuntimeError: if an engine ended.
    """
    subject = _Subject.open(command)
    with contextlib.ExitStack() as stack:
        setups = [stack.enter_context(_Setup(subject, *where)) for where in _places(command)]
        meter = _Limits(tuple(sorted({1, *(setup.cores for setup in setups)})), subject.dtype)
        for setup in setups:
            setup.fill_cache()
        for turn in range(command.runs):
            for index in range(len(setups)):
                setup = setups[(turn + index) % len(setups)]  # what runs first in a turn changes
                before = meter.measure()
                setup.measure(turn)
                setup.note_limits(before, meter.measure())
        bare = bare_memory()
        reports = tuple(setup.report() for setup in setups)
    return DecodeBenchmark(
        path=subject.directory,
        dtype=subject.dtype,
        kernels=command.kernels,
        runs=command.runs,
        steps=command.steps,
        setups=reports,
        ratios=tuple(_ratios(setups[0], setups[1:], subject)),
        limits=meter.report(),
        bare_memory=bare,
    )


def _places(command: BenchDecodeCommand) -> list[tuple[int, int]]:
    """Return the ranks, and threads of each, of every setup: what is asked for, then what it is compared with."""
    tp_size = command.tensor_parallel_size
    threads = command.threads or place(read_processors(), tp_size, 0, asked_threads()).num_threads
    asked = [(tp_size, threads)]
    return [*asked, (1, threads), (1, tp_size * threads)] if command.compare else asked


@dataclass(frozen=True)
class _Subject:
    """What is measured, the same on every setup."""

    command: BenchDecodeCommand
    directory: str
    config: ModelConfig
    dtype: str
    rows: tuple[tuple[str, int, int], ...]  # phase, batch, and context or length of the prompt

    @classmethod
    def open(cls, command: BenchDecodeCommand) -> "_Subject":
        directory = find_model_directory(command.model)
        config = ModelConfig.from_directory(directory)
        config.check_tensor_parallel_size(command.tensor_parallel_size)
        decodes = product(command.numbers("context"), command.numbers("batch"))
        rows = (
            *(("decode", batch, context) for context, batch in decodes),
            *(("prefill", 1, length) for length in command.numbers("prefill")),
        )
        if not rows:
            raise ValueError("--batch, --context and --prefill leave nothing to measure")
        subject = cls(command, str(directory), config, config.dtype if command.dtype == "auto" else command.dtype, rows)
        if (longest := subject.longest_sequence) > config.longest_context:
            raise ValueError(
                f"--context, --prefill and --steps need {longest} tokens, and the model has {config.longest_context}"
            )
        return subject

    @property
    def longest_sequence(self) -> int:
        return max(context + self.new_tokens for _, _, context in self.rows)

    @property
    def new_tokens(self) -> int:
        """That a decoding sequence gets in a turn."""
        return self.command.steps + FIRST_STEPS + 1

    @property
    def most_sequences(self) -> int:
        return max(batch for _, batch, _ in self.rows)

    @property
    def longest_context(self) -> int:
        return max(context for phase, _, context in self.rows if phase == "decode")

    def engine(self, tp_size: int) -> EngineConfig:
        """Return the options of an engine whose KV cache holds all that is ever computed on it."""
        return EngineConfig(
            model=self.directory,
            tensor_parallel_size=tp_size,
            device="cpu",
            dtype=self.command.dtype,
            kernels=self.command.kernels,
            max_num_seqs=self.most_sequences,
            max_num_batched_tokens=max(EngineConfig.max_num_batched_tokens, self.most_sequences),
            num_kv_blocks=self._num_kv_blocks(),
        )

    def _num_kv_blocks(self) -> int:
        """Return as many as all prompts that decode take, with what each turn adds: none is ever given to another."""
        size, turns = EngineConfig.block_size, self.command.runs
        prompts = self.most_sequences * -(-self.longest_context // size)
        new = sum(batch * (2 + self.new_tokens // size) for phase, batch, _ in self.rows if phase == "decode")
        prefilled = sum(2 + context // size for phase, _, context in self.rows if phase == "prefill")
        return max(prompts + turns * (new + prefilled), 1 + self.longest_sequence // size)

    def prompt(self, sequence: int, context: int) -> list[int]:
        """Return the prompt of a sequence that decodes: all but its last token fill blocks, which the cache keeps."""
        return self._tokens(sequence, context // EngineConfig.block_size * EngineConfig.block_size + 1)

    def fresh_prompt(self, turn: int, length: int) -> list[int]:
        """Return a prompt that was never computed before."""
        return self._tokens(-1 - turn, length)

    def _tokens(self, seed: int, length: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(self.config.vocab_size) for _ in range(length)]


@dataclass
class _Sample:
    """One turn of a row."""

    seconds: float
    collective_share: float


class _Setup:
    """An engine, and what was measured with it."""

    def __init__(self, subject: _Subject, tp_size: int, threads: int) -> None:
        self._subject = subject
        self._tp_size, self._threads = tp_size, threads
        self.cores = min(tp_size * threads, host.num_cpus())
        self.costs = ModelCosts.of(subject.config, tp_size, getattr(torch, subject.dtype))
        self._engine = EngineProcess(subject.engine(tp_size), threads)
        self._samples: dict[tuple[str, int, int], list[_Sample]] = {row: [] for row in subject.rows}
        self._rates: list[tuple[float, float]] = []  # of reading and multiplying, beside each turn

    @property
    def name(self) -> str:
        """What reports call it."""
        ranks = "1 rank" if self._tp_size == 1 else f"{self._tp_size} ranks"
        each = " each" if self._tp_size > 1 else ""
        return f"{ranks}, {self._threads} thread{'s' * (self._threads > 1)}{each}"

    def __enter__(self) -> Self:
        self._engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.__exit__(None, None, None)

    def fill_cache(self) -> None:
        """Compute all prompts once; later turns find them in the KV cache, each in memory of its own."""
        subject = self._subject
        prompts = [subject.prompt(index, subject.longest_context) for index in range(subject.most_sequences)]
        self._engine.generate(prompts, max_tokens=1)
        self._engine.take_collective_seconds()

    def measure(self, turn: int) -> None:
        """Measure every row once."""
        for row in self._subject.rows:
            phase, batch, context = row
            if phase == "decode":
                prompts = [self._subject.prompt(index, context) for index in range(batch)]
                arrivals = self._engine.generate(prompts, self._subject.new_tokens)
                seconds = step_seconds(arrivals, batch)
            else:
                arrivals = self._engine.generate([self._subject.fresh_prompt(turn, context)], max_tokens=1)
                seconds = arrivals[-1].seconds
            in_collectives = max(self._engine.take_collective_seconds()) if self._tp_size > 1 else 0.0
            self._samples[row].append(_Sample(seconds, in_collectives / arrivals[-1].seconds))

    def note_limits(self, *measured: "dict[tuple[str, int], float]") -> None:
        """Keep the limits that were measured before and after a turn."""
        read, multiply = (
            statistics.fmean(rates[kind, self.cores] for rates in measured) for kind in (READ, self._subject.dtype)
        )
        self._rates.append((read, multiply))

    def seconds(self, row: tuple[str, int, int]) -> list[float]:
        """Return the seconds of a row's step in each turn."""
        return [sample.seconds for sample in self._samples[row]]

    def roofs(self, row: tuple[str, int, int]) -> list[float]:
        """Return what a row's step must take, in each turn."""
        cost = self._cost(row)
        return [max(cost.read_bytes / read, cost.operations / multiply) for read, multiply in self._rates]

    def _cost(self, row: tuple[str, int, int]) -> StepCost:
        phase, batch, context = row
        if phase == "prefill":
            return self.costs.prefill(context)
        # Of the steps that are counted, the one in the middle.
        first = context // EngineConfig.block_size * EngineConfig.block_size + 1
        return self.costs.decode(batch, first + FIRST_STEPS + self._subject.command.steps / 2)

    def report(self) -> SetupReport:
        """Return what was found."""
        engine = self._engine
        return SetupReport(
            name=self.name,
            tensor_parallel_size=self._tp_size,
            threads=self._threads,
            cores=self.cores,
            rows=tuple(map(self._row, self._subject.rows)),
            memory=tuple(
                rank_memory(pid, engine.memory[rank]["weights_resident"], engine.memory[rank]["kv_cache"])
                for rank, pid in enumerate(engine.pids)
            ),
        )

    def _row(self, row: tuple[str, int, int]) -> Row:
        phase, batch, context = row
        cost, seconds, samples = self._cost(row), self.seconds(row), self._samples[row]
        tokens = context if phase == "prefill" else batch
        return Row(
            phase=phase,
            batch=batch,
            context=context,
            step_seconds=Figure.of(seconds),
            tokens_per_second=Figure.of([tokens / each for each in seconds]),
            cost=cost,
            read_seconds=Figure.of([cost.read_bytes / read for read, _ in self._rates]),
            compute_seconds=Figure.of([cost.operations / multiply for _, multiply in self._rates]),
            roof_share=Figure.of([roof / each for roof, each in zip(self.roofs(row), seconds, strict=True)]),
            collective_share=None if self._tp_size == 1 else Figure.of([item.collective_share for item in samples]),
        )


class _Limits:
    """What the machine allows, measured again and again."""

    def __init__(self, cores: tuple[int, ...], dtype: str) -> None:
        meter = LimitMeter(cores, (dtype,))
        self._ways = {(READ, count): meter.reader(count) for count in cores}
        self._ways |= {(dtype, count): meter.multiplier(dtype, count) for count in cores}
        self._rates: dict[tuple[str, int], list[float]] = {key: [] for key in self._ways}

    def measure(self) -> dict[tuple[str, int], float]:
        """Return the median rate of some tries, by kind and cores."""
        found = {key: statistics.median(way.rate() for _ in range(LIMIT_TRIES)) for key, way in self._ways.items()}
        for key, rate in found.items():
            self._rates[key].append(rate)
        return found

    def report(self) -> tuple[Limit, ...]:
        """Return all that was measured."""
        return tuple(
            Limit(kind=kind, cores=cores, way=self._ways[kind, cores].name, rate=Figure.of(rates))
            for (kind, cores), rates in self._rates.items()
        )


def step_seconds(arrivals: Sequence[Arrival], batch: int) -> float:
    """Return the median time between two steps that each brought a token for every sequence, but for the first."""
    whole = [arrival.seconds for arrival in arrivals if arrival.num_tokens == batch][FIRST_STEPS:]
    return statistics.median(later - earlier for earlier, later in pairwise(whole))


def _ratios(first: _Setup, others: Sequence[_Setup], subject: _Subject) -> Iterator[Ratio]:
    for other, row in product(others, subject.rows):
        speed_ups = [theirs / ours for ours, theirs in zip(first.seconds(row), other.seconds(row), strict=True)]
        roofs = [theirs / ours for ours, theirs in zip(first.roofs(row), other.roofs(row), strict=True)]
        yield Ratio(
            of=first.name,
            over=other.name,
            row=row_name(*row),
            speed_up=Figure.of(speed_ups),
            roof_ratio=Figure.of(roofs),
            share=Figure.of([up / roof for up, roof in zip(speed_ups, roofs, strict=True)]),
        )

"""`ryzanstein bench decode`: steps of a real engine, beside what the machine allows."""

import contextlib
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple, Self

import torch

from engine.bench.decode_costs import ModelCosts, StepCost
from engine.bench.decode_memory import bare_memory, rank_memory
from engine.bench.decode_report import DecodeBenchmark, Ratio, Row, SetupReport, row_name
from engine.bench.engine_process import Arrival, CollectiveSeconds, EngineProcess
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
STEADY = 1.1  # times as much one limit may be as the other, before and after a turn

_Kind = tuple[str, int, int]  # of step: phase, batch, and tokens of context or prompt
_Rates = dict[tuple[str, int], float]  # by what is done and on how many cores


def measure_decode(command: BenchDecodeCommand) -> DecodeBenchmark:
    """Start engines and measure them in turns, with the machine's limits before and after each turn.

    Raises:
        ValueError: naming the file or option, if the model cannot be run so.
        RuntimeError: if an engine ended.
    """
    subject = _Subject.open(command)
    with contextlib.ExitStack() as stack:
        setups = [stack.enter_context(_Setup(subject, *where)) for where in _places(command)]
        meter = _Limits(tuple(sorted({1, *(setup.cores for setup in setups)})), subject.product_dtype)
        for setup in setups:
            setup.fill_cache()
        for turn, row in product(range(command.runs), subject.rows):
            before = meter.measure()
            for index in range(len(setups)):
                setup = setups[(turn + index) % len(setups)]  # what runs first changes
                measured = setup.measure(row, turn)
                after = meter.measure()
                setup.keep(row, measured, before, after)
                before = after
        bare = bare_memory()
        reports = tuple(setup.report() for setup in setups)
    return DecodeBenchmark(
        path=subject.directory,
        dtype=subject.dtype,
        quantization=command.quantization,
        kernels=setups[0].kernels,
        runs=command.runs,
        steps=command.steps,
        setups=reports,
        ratios=tuple(_ratios(setups[0], setups[1:], subject)),
        limits=meter.report(),
        bare_memory=bare,
    )


def _places(command: BenchDecodeCommand) -> list[tuple[int, int, bool]]:
    """Return ranks, threads of each and batch invariance of every setup: what is asked for, then what is beside it."""
    tp_size = command.tensor_parallel_size
    threads = command.threads or place(read_processors(), tp_size, 0, asked_threads()).num_threads
    invariant = command.batch_invariant
    places = [(tp_size, threads, invariant)]
    if invariant:
        places.append((tp_size, threads, False))
    if command.compare:
        places += [(1, threads, invariant), (1, tp_size * threads, invariant)]
    return places


@dataclass(frozen=True)
class _Subject:
    """What is measured, the same on every setup."""

    command: BenchDecodeCommand
    directory: str
    config: ModelConfig
    dtype: str
    rows: tuple[_Kind, ...]

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
    def product_dtype(self) -> str:
        """The type in which matrices are multiplied."""
        return "int8" if self.command.quantization == "int8" else self.dtype

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

    def engine(self, tp_size: int, batch_invariant: bool) -> EngineConfig:
        """Return the options of an engine whose KV cache holds all that is ever computed on it."""
        return EngineConfig(
            model=self.directory,
            tensor_parallel_size=tp_size,
            device="cpu",
            dtype=self.command.dtype,
            quantization=self.command.quantization,
            kernels=self.command.kernels,
            batch_invariant=batch_invariant,
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
        return self._tokens(f"sequence {sequence}", context // EngineConfig.block_size * EngineConfig.block_size + 1)

    def fresh_prompt(self, turn: int, length: int) -> list[int]:
        """Return a prompt that was never computed before."""
        return self._tokens(f"turn {turn}", length)

    def _tokens(self, seed: str, length: int) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(self.config.vocab_size) for _ in range(length)]


class _Measured(NamedTuple):
    """What was measured once of a kind of step."""

    seconds: float
    collectives: CollectiveSeconds  # as shares of the turn, each of the rank with most of it


@dataclass(frozen=True)
class _Turn:
    """What was measured once of a kind of step, and the limits that held: the means of those before and after."""

    seconds: float
    collectives: CollectiveSeconds
    read_rate: float
    multiply_rate: float
    is_steady: bool  # whether the limits before and after are about the same

    def roof(self, cost: StepCost) -> float:
        """Return the seconds that the step must take."""
        return max(cost.read_bytes / self.read_rate, cost.operations / self.multiply_rate)


class _Setup:
    """An engine, and what was measured with it."""

    def __init__(self, subject: _Subject, tp_size: int, threads: int, batch_invariant: bool) -> None:
        self._subject = subject
        self._batch_invariant = batch_invariant
        self._tp_size, self._threads = tp_size, threads
        self.cores = min(tp_size * threads, host.num_cpus())
        self.costs = ModelCosts.of(subject.config, tp_size, getattr(torch, subject.dtype), subject.command.quantization)
        self._engine = EngineProcess(subject.engine(tp_size, batch_invariant), threads)
        self._turns: dict[_Kind, list[_Turn]] = {row: [] for row in subject.rows}

    @property
    def name(self) -> str:
        """What reports call it."""
        ranks = "1 rank" if self._tp_size == 1 else f"{self._tp_size} ranks"
        threads = f"{self._threads} thread{'s' * (self._threads > 1)}{' each' * (self._tp_size > 1)}"
        return f"{ranks}, {threads}{', batch-invariant' * self._batch_invariant}"

    @property
    def kernels(self) -> str:
        """What it computes with: an instruction set, or torch."""
        return self._engine.kernels

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

    def measure(self, row: _Kind, turn: int) -> _Measured:
        """Run steps of a kind for a turn."""
        phase, batch, context = row
        if phase == "decode":
            prompts = [self._subject.prompt(index, context) for index in range(batch)]
            arrivals = self._engine.generate(prompts, self._subject.new_tokens)
            seconds = step_seconds(arrivals, batch)
        else:
            arrivals = self._engine.generate([self._subject.fresh_prompt(turn, context)], max_tokens=1)
            seconds = arrivals[-1].seconds
        if self._tp_size == 1:
            return _Measured(seconds, CollectiveSeconds())
        ranks, whole = self._engine.take_collective_seconds(), arrivals[-1].seconds
        transfer = max(rank.transfer for rank in ranks) / whole
        return _Measured(seconds, CollectiveSeconds(transfer, max(rank.waiting for rank in ranks) / whole))

    def keep(self, row: _Kind, measured: _Measured, before: _Rates, after: _Rates) -> None:
        """Keep what was measured, with the limits before and after."""
        pairs = [(before[kind, self.cores], after[kind, self.cores]) for kind in (READ, self._subject.product_dtype)]
        read_rate, multiply_rate = map(statistics.fmean, pairs)
        is_steady = all(max(pair) <= STEADY * min(pair) for pair in pairs)
        self._turns[row].append(_Turn(*measured, read_rate, multiply_rate, is_steady))

    def turns(self, row: _Kind) -> list[_Turn]:
        """Return all turns of a kind of step, in the order in which they were measured."""
        return self._turns[row]

    def roof(self, row: _Kind, turn: _Turn) -> float:
        """Return the seconds that a step of a kind had to take in a turn."""
        return turn.roof(self._cost(row))

    def _cost(self, row: _Kind) -> StepCost:
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
            batch_invariant=self._batch_invariant,
            cores=self.cores,
            rows=tuple(map(self._row, self._subject.rows)),
            memory=tuple(
                rank_memory(pid, engine.memory[rank]["weights_resident"], engine.memory[rank]["kv_cache"])
                for rank, pid in enumerate(engine.pids)
            ),
        )

    def _row(self, row: _Kind) -> Row:
        phase, batch, context = row
        cost, all_turns = self._cost(row), self._turns[row]
        turns = [turn for turn in all_turns if turn.is_steady] or all_turns
        tokens = context if phase == "prefill" else batch
        return Row(
            phase=phase,
            batch=batch,
            context=context,
            num_steady=sum(turn.is_steady for turn in all_turns),
            step_seconds=Figure.of([turn.seconds for turn in turns]),
            tokens_per_second=Figure.of([tokens / turn.seconds for turn in turns]),
            cost=cost,
            read_seconds=Figure.of([cost.read_bytes / turn.read_rate for turn in turns]),
            compute_seconds=Figure.of([cost.operations / turn.multiply_rate for turn in turns]),
            roof_share=Figure.of([turn.roof(cost) / turn.seconds for turn in turns]),
            transfer_share=Figure.of([turn.collectives.transfer for turn in turns]) if self._tp_size > 1 else None,
            waiting_share=Figure.of([turn.collectives.waiting for turn in turns]) if self._tp_size > 1 else None,
        )


class _Limits:
    """What the machine allows, measured again and again."""

    def __init__(self, cores: tuple[int, ...], dtype: str) -> None:
        meter = LimitMeter(cores, (dtype,))
        self._ways = {(READ, count): meter.reader(count) for count in cores}
        self._ways |= {(dtype, count): meter.multiplier(dtype, count) for count in cores}
        self._rates: dict[tuple[str, int], list[float]] = {key: [] for key in self._ways}

    def measure(self) -> _Rates:
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
    """Return the mean time between steps that each brought a token for every sequence, without the first of them.

    A median of single times would not do: where this process has to wait for a core, several arrive at once.
    """
    whole = [arrival.seconds for arrival in arrivals if arrival.num_tokens == batch][FIRST_STEPS:]
    return (whole[-1] - whole[0]) / (len(whole) - 1)


def _ratios(first: _Setup, others: Sequence[_Setup], subject: _Subject) -> Iterator[Ratio]:
    for other, row in product(others, subject.rows):
        pairs = list(zip(first.turns(row), other.turns(row), strict=True))
        pairs = [pair for pair in pairs if pair[0].is_steady and pair[1].is_steady] or pairs
        speed_ups = [theirs.seconds / ours.seconds for ours, theirs in pairs]
        roofs = [other.roof(row, theirs) / first.roof(row, ours) for ours, theirs in pairs]
        yield Ratio(
            of=first.name,
            over=other.name,
            row=row_name(*row),
            speed_up=Figure.of(speed_ups),
            roof_ratio=Figure.of(roofs),
            share=Figure.of([up / roof for up, roof in zip(speed_ups, roofs, strict=True)]),
        )

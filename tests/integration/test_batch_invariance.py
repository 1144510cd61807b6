"""A row's result is the same bits alone, in any batch and chunks, computed again, and behind a cached prefix."""

import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.attention.backends import attention_backend
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.parallel.base import use_kernels
from engine.protocol.config import EngineConfig
from engine.protocol.messages import Request, SamplingParams, ScheduledRow, ScheduledStep, TokenLogprobs
from engine.protocol.model_config import ModelConfig
from engine.worker import kv_tensors
from engine.worker.model_runner import ModelRunner
from tests.checkpoints import random_llama
from tests.computing import make_kernels
from tests.distributed import run_on_ranks
from tests.engine_process import EngineFailedError, EngineProcess
from tests.kernels import KERNELS_VARIABLE

CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCAB_SIZE = 499
BLOCK_SIZE = 8
NUM_BLOCKS = 64
COMMON = 48  # tokens that `a` and `d` begin with: whole blocks
LENGTHS = {"a": 69, "b": 100, "c": 20, "d": 64, "e": 50}
PROMPT = 61  # of a; the other eight tokens come one by one
SEEDS = range(2)  # of random schedules

Bits = dict[tuple[str, int], Tensor]  # by text and position: the logits after it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sizes that no vector length divides, rows longer than a tile, and biases."""
    shape = {"hidden_size": 264, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 36}
    shape |= {"intermediate_size": 518, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}
    return random_llama(tmp_path_factory.mktemp("llama"), 0, vocab_size=VOCAB_SIZE, **shape)


@dataclass
class Text:
    """A sequence under way."""

    token_ids: list[int]
    block_ids: list[int]
    num_computed: int = 0
    num_blocks: int = 0  # handed out
    num_known: int = 0  # tokens handed out


def draw_texts() -> dict[str, list[int]]:
    draw = random.Random(VOCAB_SIZE)
    texts = {name: [draw.randrange(VOCAB_SIZE) for _ in range(length)] for name, length in LENGTHS.items()}
    texts["d"][:COMMON] = texts["a"][:COMMON]
    return texts


@dataclass
class Schedule:
    """Runs steps over the texts, and keeps the logits after each row's last token."""

    runner: ModelRunner
    texts: dict[str, Text] = field(default_factory=dict)
    found: Bits = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(range(NUM_BLOCKS))
        random.Random(1).shuffle(self._free)
        for name in LENGTHS:
            self.restart(name)

    def restart(self, name: str, behind: str = "") -> None:
        """Compute a text again in other blocks, from the beginning or behind the blocks that another begins with."""
        shared = self.texts[behind].block_ids[: COMMON // BLOCK_SIZE] if behind else []
        num_own = -(-LENGTHS[name] // BLOCK_SIZE) - len(shared)
        own = [self._free.pop() for _ in range(num_own)]
        given_up = self.texts[name].block_ids if name in self.texts else []
        self.texts[name] = Text(draw_texts()[name], shared + own, num_computed=COMMON if behind else 0)
        held = {block for text in self.texts.values() for block in text.block_ids}
        self._free[:0] = [block for block in given_up if block not in held]

    def step(self, **num_tokens: int) -> None:
        """Compute the next tokens of these texts, in this order."""
        rows = [self._row(name, count) for name, count in num_tokens.items()]
        logits = self.runner.run(ScheduledStep(epoch=1, step=0, rows=rows, finished=[])).logits
        if logits is not None:
            self.found |= {
                (name, self.texts[name].num_computed - 1): row for name, row in zip(num_tokens, logits, strict=True)
            }

    def decode(self, name: str, count: int) -> None:
        """Compute tokens one by one, with nothing beside them."""
        for _ in range(count):
            self.step(**{name: 1})

    def _row(self, name: str, count: int) -> ScheduledRow:
        text = self.texts[name]
        start, stop = text.num_computed, text.num_computed + count
        assert stop <= len(text.token_ids)
        num_blocks = -(-stop // BLOCK_SIZE)
        row = ScheduledRow(
            request_id=name,
            is_new=text.num_known == 0,
            new_token_ids=text.token_ids[text.num_known :],
            new_block_ids=text.block_ids[text.num_blocks : num_blocks],
            num_computed_tokens=start,
            num_scheduled_tokens=count,
            samples=True,
        )
        text.num_computed, text.num_blocks, text.num_known = stop, num_blocks, len(text.token_ids)
        return row


def alone(run: Schedule) -> None:
    run.step(a=PROMPT)
    run.decode("a", 8)


def once_more(run: Schedule) -> None:
    alone(run)
    run.restart("a")
    alone(run)


def chunked(run: Schedule) -> None:
    for count in (1, 2, 3, 13, 17, 25):
        run.step(a=count)
    run.decode("a", 8)


def all_but_the_last_at_once(run: Schedule) -> None:
    run.step(a=PROMPT + 7)
    run.decode("a", 1)


def crowded(run: Schedule) -> None:
    run.step(b=47, a=PROMPT, c=12, d=64, e=42)  # 226 tokens
    for count in (1, 2, 3, 4):
        run.step(c=1, a=1, b=count, e=1)
    for count in (20, 10, 12, 1):
        run.step(b=count, a=1, c=1)


def preempted(run: Schedule) -> None:
    run.step(a=PROMPT, b=40)
    run.step(a=1, b=1)
    run.step(a=1, b=1)
    run.restart("a")
    run.step(b=30)
    run.step(b=1, a=PROMPT + 2)
    run.step(a=1, b=1)
    run.decode("a", 5)


def behind_a_cached_prefix(run: Schedule) -> None:
    run.step(d=30, b=5)
    run.step(b=1, d=34)
    run.restart("a", behind="d")
    run.step(a=PROMPT - COMMON, b=1)
    run.decode("a", 8)


def at_random(seed: int) -> Callable[[Schedule], None]:
    """Any rows in any order and chunks; now and then a text is computed again, also behind another's prefix."""

    def walk(run: Schedule) -> None:
        draw = random.Random(seed)
        for _ in range(40):
            names = draw.sample(sorted(LENGTHS), draw.randint(1, len(LENGTHS)))
            left = {name: LENGTHS[name] - run.texts[name].num_computed for name in names}
            for name in [name for name, count in left.items() if count == 0 or draw.random() < 0.05]:
                behind = {"a": "d", "d": "a"}.get(name, "")
                can_share = bool(behind) and run.texts[behind].num_computed >= COMMON and draw.random() < 0.5
                run.restart(name, behind if can_share else "")
                left[name] = LENGTHS[name] - run.texts[name].num_computed
            run.step(**{name: 1 if draw.random() < 0.5 else draw.randint(1, count) for name, count in left.items()})

    return walk


SCHEDULES: dict[str, Callable[[Schedule], None]] = {
    "alone": alone,
    "once more": once_more,
    "chunked": chunked,
    "all but the last at once": all_but_the_last_at_once,
    "crowded": crowded,
    "preempted": preempted,
    "behind a cached prefix": behind_a_cached_prefix,
} | {f"random schedule {seed}": at_random(seed) for seed in SEEDS}


def token_by_token(run: Schedule) -> None:
    """Compute each text alone, so that there is a result after every token."""
    for name, length in LENGTHS.items():
        run.decode(name, length)


def bits(
    group: CommunicationHandler, directory: Path, kernels: str, dtype: str, quantization: str = "none"
) -> dict[str, Bits]:
    """Return what each schedule found, on rank 0, with two threads; and what one thread finds token by token."""
    alone = run_schedule(token_by_token, make_runner(group, directory, kernels, dtype, quantization, num_threads=1))
    runner = make_runner(group, directory, kernels, dtype, quantization, num_threads=2)
    found = {name: run_schedule(schedule, runner) for name, schedule in SCHEDULES.items()}
    return {"token by token": alone, **found}


def run_schedule(schedule: Callable[[Schedule], None], runner: ModelRunner) -> Bits:
    run = Schedule(runner)
    schedule(run)
    return run.found


def make_runner(
    group: CommunicationHandler, directory: Path, kernels: str, dtype: str, quantization: str, num_threads: int
) -> ModelRunner:
    config = ModelConfig.from_directory(directory)
    model = build_model(config, group, device=CPU, dtype=DTYPES[dtype], quantization=quantization)
    ModelDistributor(group).load_model(model, directory)
    computing = make_kernels(kernels, DTYPES[dtype], num_threads, is_batch_invariant=True)
    use_kernels(model, computing)
    kv_caches = kv_tensors.allocate(
        config,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.local_kv_heads(group.world_size),
        dtype=DTYPES[dtype],
        device=CPU,
    )
    for cache in kv_caches:  # what was never written must not matter
        cache.key.fill_(torch.nan)
        cache.value.fill_(torch.nan)
    attention = attention_backend(computing, kv_caches)
    return ModelRunner(model, attention, group, vocab_size=VOCAB_SIZE, device=CPU, note_progress=lambda: None)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_the_same_bits_whatever_was_computed_when_and_beside_what(
    dtype: str, tp_size: int, each_instruction_set: str, checkpoint: Path
) -> None:
    check_bits(run_on_ranks(bits, tp_size, checkpoint, each_instruction_set, dtype)[0])


@pytest.mark.parametrize(("dtype", "tp_size"), [("float32", 1), pytest.param("bfloat16", 2, marks=pytest.mark.slow)])
def test_so_they_are_with_int8_matrices(dtype: str, tp_size: int, each_instruction_set: str, checkpoint: Path) -> None:
    check_bits(run_on_ranks(bits, tp_size, checkpoint, each_instruction_set, dtype, "int8")[0])


def check_bits(found: dict[str, Bits]) -> None:
    expected = found.pop("token by token")
    assert len(expected) == sum(LENGTHS.values())
    assert all(logits.isfinite().all() and logits.std() > 0 for logits in expected.values())
    wrong = {
        schedule: [place for place, logits in rows.items() if not torch.equal(logits, expected[place])]
        for schedule, rows in found.items()
    }
    assert {schedule: places for schedule, places in wrong.items() if places} == {}
    assert all(("a", LENGTHS["a"] - 1) in rows for name, rows in found.items() if not name.startswith("random"))


NUM_REQUESTS, NUM_NEW_TOKENS, CONTEXT = 6, 24, 160


def requests() -> list[Request]:
    """Return prompts of any length, of which every other begins alike, some greedy and some drawn."""
    draw = random.Random(2)
    common = [draw.randrange(VOCAB_SIZE) for _ in range(COMMON)]
    prompts = [
        common * (index % 2) + [draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 80))]
        for index in range(NUM_REQUESTS)
    ]
    return [
        Request(
            str(index),
            prompt,
            SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.9 * (index % 3), seed=index, logprobs=5),
        )
        for index, prompt in enumerate(prompts)
    ]


def engine_config(directory: Path, dtype: str, tp_size: int, **options: object) -> EngineConfig:
    return EngineConfig(
        model=str(directory),
        dtype=dtype,
        tensor_parallel_size=tp_size,
        device="cpu",
        max_model_len=CONTEXT,
        block_size=BLOCK_SIZE,
        batch_invariant=True,
        **options,  # type: ignore[arg-type]
    )


Results = dict[str, list[TokenLogprobs]]  # by request: what was chosen, and how likely it and others were


def results_of(engine: EngineProcess, batch: list[Request]) -> Results:
    """Run requests together."""
    engine.submit(batch)
    found: Results = {request.request_id: [] for request in batch}
    unfinished = set(found)
    while unfinished:
        for output in engine.receive():
            found[output.request_id] += output.logprobs
            if output.finish_reason is not None:
                unfinished.discard(output.request_id)
    return found


@pytest.mark.skipif(os.environ.get(KERNELS_VARIABLE) == "torch", reason="--batch-invariant is for the C++ kernels")
@pytest.mark.parametrize(("dtype", "tp_size"), [("float32", 1), ("bfloat16", 2)])
def test_an_engines_results_are_the_same_bits_alone_and_crowded_preempted_and_cached(
    dtype: str, tp_size: int, checkpoint: Path
) -> None:
    batch = requests()
    with EngineProcess(
        engine_config(checkpoint, dtype, tp_size, num_kv_blocks=64, enable_prefix_caching=False)
    ) as engine:
        alone = {name: found for request in batch for name, found in results_of(engine, [request]).items()}
        engine.wait_for_report()
    assert engine.preemptions == 0
    few = CONTEXT // BLOCK_SIZE
    with EngineProcess(
        engine_config(checkpoint, dtype, tp_size, num_kv_blocks=few, max_num_batched_tokens=37)
    ) as engine:
        crowded = results_of(engine, batch)
        engine.wait_for_report()
        again = results_of(engine, batch)
        engine.wait_for_report()
    assert engine.preemptions > 0
    assert sum(report.scheduler.prefix_cache_hits for report in engine.reports) > 0
    assert {len(found) for found in alone.values()} == {NUM_NEW_TOKENS}
    assert crowded == alone
    assert again == alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "torch"}, "--batch-invariant needs the C++ kernels"),
        ({"dtype": "float16"}, "--batch-invariant is kept in float32 and bfloat16, not float16"),
    ],
)
def test_an_engine_that_cannot_keep_it_does_not_start(options: dict[str, str], message: str, checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), device="cpu", batch_invariant=True, **options)  # type: ignore[arg-type]
    with pytest.raises(EngineFailedError, match=re.escape(message)) as failure, EngineProcess(config):
        pass
    assert failure.value.status.is_user_error

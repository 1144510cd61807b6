"""What a rank remembers between steps: the logits of any schedule are those of the whole texts."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.checkpoint.huggingface import load_weights
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.messages import ScheduledRow, ScheduledStep
from engine.protocol.model_config import ModelConfig
from engine.worker import kv_tensors
from engine.worker.model_runner import ModelRunner, RunnerOutput
from tests.checkpoints import random_llama
from tests.oracle import Reference

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit
BLOCK_SIZE = 4
NUM_BLOCKS = 24
VOCAB_SIZE = 101


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"), 0, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture
def runner(checkpoint: Path) -> ModelRunner:
    config = ModelConfig.from_directory(checkpoint)
    group = CommunicationHandler(CPU)
    model = build_model(config, group, device=CPU, dtype=torch.float32)
    load_weights(model, checkpoint, 0, 1)
    kv_caches = kv_tensors.allocate(
        config,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_key_value_heads,
        dtype=torch.float32,
        device=CPU,
    )
    return ModelRunner(model, kv_caches, group, block_size=BLOCK_SIZE, vocab_size=VOCAB_SIZE, device=CPU)


@dataclass
class Sequence:
    """A text whose first `prompt_length` tokens are there from the start; the others come one by one."""

    request_id: str
    token_ids: list[int]
    prompt_length: int
    block_ids: list[int]  # as many as the whole text takes
    num_computed: int = 0
    num_blocks: int = 0  # handed out

    def row(self, num_tokens: int) -> ScheduledRow:
        """Schedule the next `num_tokens`, with as many new blocks as they need."""
        start, stop = self.num_computed, self.num_computed + num_tokens
        known, num_blocks = (max(start, self.prompt_length) if start else 0), -(-stop // BLOCK_SIZE)
        row = ScheduledRow(
            request_id=self.request_id,
            is_new=start == 0,
            new_token_ids=self.token_ids[known : max(stop, self.prompt_length)],
            new_block_ids=self.block_ids[self.num_blocks : num_blocks],
            num_computed_tokens=start,
            num_scheduled_tokens=num_tokens,
            samples=stop >= self.prompt_length,
        )
        self.num_computed, self.num_blocks = stop, num_blocks
        return row

    def preempt(self, block_ids: list[int]) -> None:
        """Start over in other blocks; what is there from the start is now all but the tokens to come."""
        self.prompt_length = self.num_computed + 1  # the token that was sampled last
        self.block_ids, self.num_computed, self.num_blocks = block_ids, 0, 0

    @property
    def computed(self) -> list[int]:
        return self.token_ids[: self.num_computed]


def draw_sequences(prompt_lengths: Iterable[int], num_blocks_each: int = 6) -> list[Sequence]:
    """Return sequences a, b, c, …, each six blocks long, whose blocks are all over the cache."""
    draw = random.Random(1)
    blocks = draw.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    return [
        Sequence(
            request_id="abcd"[i],
            token_ids=[draw.randrange(VOCAB_SIZE) for _ in range(num_blocks_each * BLOCK_SIZE)],
            prompt_length=prompt_length,
            block_ids=blocks[i * num_blocks_each : (i + 1) * num_blocks_each],
        )
        for i, prompt_length in enumerate(prompt_lengths)
    ]


def step(*rows: ScheduledRow, finished: Iterable[str] = ()) -> ScheduledStep:
    return ScheduledStep(epoch=1, step=0, rows=list(rows), finished=list(finished))


def check(output: RunnerOutput, reference: Reference, *texts: list[int]) -> None:
    """Check that there is a row for each text: the reference's logits after its last token."""
    logits = output.logits
    assert logits is not None
    assert logits.dtype == torch.float32
    expected = torch.stack([reference.logits(text)[-1] for text in texts])
    assert logits.shape == expected.shape
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"off by {error:.1e} of the largest"


def test_chunks_and_decodes_in_one_step_give_the_logits_of_whole_texts(
    runner: ModelRunner, reference: Reference
) -> None:
    a, b, c = draw_sequences((13, 3, 9))
    check(runner.run(step(a.row(5), b.row(3))), reference, b.computed)
    check(runner.run(step(b.row(1), a.row(7), c.row(2))), reference, b.computed)
    check(runner.run(step(b.row(1), a.row(1), c.row(7))), reference, b.computed, a.computed, c.computed)
    for _ in range(5):
        check(runner.run(step(c.row(1), b.row(1), a.row(1))), reference, c.computed, b.computed, a.computed)


def test_only_sampling_rows_come_back_in_batch_order(runner: ModelRunner, reference: Reference) -> None:
    a, b, c, d = draw_sequences((2, 9, 5, 8))
    output = runner.run(step(d.row(7), c.row(5), b.row(4), a.row(2)))
    check(output, reference, c.computed, a.computed)


def test_there_are_no_logits_when_no_row_samples(runner: ModelRunner, reference: Reference) -> None:
    a, b = draw_sequences((9, 6))
    assert runner.run(step(a.row(5), b.row(5))).logits is None
    check(runner.run(step(a.row(4), b.row(1))), reference, a.computed, b.computed)


def test_a_finished_sequence_is_forgotten(runner: ModelRunner) -> None:
    a, b = draw_sequences((5, 5))
    runner.run(step(a.row(5)))
    runner.run(step(b.row(5), finished=["a"]))
    with pytest.raises(KeyError, match="a"):
        runner.run(step(a.row(1)))


def test_a_sequence_that_was_never_computed_may_finish(runner: ModelRunner, reference: Reference) -> None:
    [a] = draw_sequences((5,))
    check(runner.run(step(a.row(5), finished=["aborted while it waited"])), reference, a.computed)


def test_a_finished_sequences_id_may_come_back_as_new_in_the_same_step(
    runner: ModelRunner, reference: Reference
) -> None:
    a, b = draw_sequences((7, 5))
    runner.run(step(a.row(7)))
    b.request_id = "a"
    check(runner.run(step(b.row(5), finished=["a"])), reference, b.computed)
    check(runner.run(step(b.row(1))), reference, b.computed)


def test_a_preempted_sequence_comes_back_whole_in_other_blocks(runner: ModelRunner, reference: Reference) -> None:
    a, b, c = draw_sequences((7, 5, 1))
    runner.run(step(a.row(7), b.row(5)))
    check(runner.run(step(a.row(1), b.row(1))), reference, a.computed, b.computed)
    b.block_ids[2:] = a.block_ids[:4]
    a.preempt(c.block_ids)
    check(runner.run(step(b.row(4))), reference, b.computed)  # into a block that was a's
    check(runner.run(step(a.row(6), b.row(1))), reference, b.computed)
    check(runner.run(step(a.row(3), b.row(1))), reference, a.computed, b.computed)
    check(runner.run(step(a.row(1))), reference, a.computed)

"""What a rank remembers between steps: the logits of any schedule are those of the whole texts."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.attention.backends import attention_backend
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.parallel.base import use_kernels
from engine.protocol.messages import PromptLogprobs, ScheduledRow, ScheduledStep, TokenLogprobs
from engine.protocol.model_config import ModelConfig
from engine.worker import kv_tensors, model_runner
from engine.worker.model_runner import ModelRunner, RunnerOutput
from tests.checkpoints import random_llama
from tests.computing import make_kernels
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
def runner(checkpoint: Path, each_kernels: str) -> ModelRunner:
    config = ModelConfig.from_directory(checkpoint)
    group = CommunicationHandler(CPU)
    model = build_model(config, group, device=CPU, dtype=torch.float32)
    ModelDistributor(group).load_model(model, checkpoint)
    kernels = make_kernels(each_kernels, torch.float32)
    use_kernels(model, kernels)
    kv_caches = kv_tensors.allocate(
        config,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=config.num_key_value_heads,
        dtype=torch.float32,
        device=CPU,
    )
    return ModelRunner(
        model,
        attention_backend(kernels, kv_caches),
        group,
        vocab_size=VOCAB_SIZE,
        device=CPU,
        note_progress=lambda: None,
    )


@dataclass
class Sequence:
    """A text whose first `prompt_length` tokens are there from the start; the others come one by one."""

    request_id: str
    token_ids: list[int]
    prompt_length: int
    block_ids: list[int]  # as many as the whole text takes
    num_computed: int = 0
    num_blocks: int = 0  # handed out

    def row(self, num_tokens: int, prompt_logprobs: PromptLogprobs | None = None) -> ScheduledRow:
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
            prompt_logprobs=prompt_logprobs,
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


def check_prompt_logprobs(
    found: list[TokenLogprobs], reference: Reference, sequence: Sequence, wanted: PromptLogprobs
) -> None:
    """Check that there is an entry for each position asked for: the reference's for the token that follows it."""
    logits = reference.logits(sequence.token_ids[: wanted.stop])
    tolerance = TOLERANCE * logits.abs().max().item()
    expected = logits.log_softmax(1)
    assert len(found) == wanted.stop - wanted.start
    for position, entry in zip(range(wanted.start, wanted.stop), found, strict=True):
        assert entry.token_id == sequence.token_ids[position + 1]
        assert entry.logprob == pytest.approx(expected[position, entry.token_id].item(), abs=tolerance)
        best = expected[position].topk(wanted.num_top)
        assert entry.top_token_ids == best.indices.tolist()
        assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=tolerance)


def test_prompt_logprobs_come_for_the_positions_asked_for_chunk_by_chunk(
    runner: ModelRunner, reference: Reference
) -> None:
    a, b, c = draw_sequences((13, 3, 9))
    asked = PromptLogprobs(0, 5, 3), PromptLogprobs(5, 12, 3), PromptLogprobs(1, 2, 7)
    output = runner.run(step(b.row(3), a.row(5, asked[0])))
    assert list(output.prompt_logprobs) == ["a"]
    check_prompt_logprobs(output.prompt_logprobs["a"], reference, a, asked[0])
    output = runner.run(step(c.row(4, asked[2]), b.row(1), a.row(8, asked[1])))
    assert list(output.prompt_logprobs) == ["c", "a"]
    check_prompt_logprobs(output.prompt_logprobs["a"], reference, a, asked[1])
    check_prompt_logprobs(output.prompt_logprobs["c"], reference, c, asked[2])
    check(output, reference, b.computed, a.computed)


def test_prompt_logprobs_need_no_row_that_samples(runner: ModelRunner, reference: Reference) -> None:
    [a] = draw_sequences((9,))
    wanted = PromptLogprobs(2, 5, 1)
    output = runner.run(step(a.row(5, wanted)))
    assert output.logits is None
    check_prompt_logprobs(output.prompt_logprobs["a"], reference, a, wanted)


def test_prompt_logprobs_are_the_same_from_logits_of_a_few_positions_at_a_time(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of a whole prompt would take gigabytes: they are made and summed up in pieces."""
    whole, pieces = (draw_sequences((20,))[0].row(20, PromptLogprobs(0, 19, 4)) for _ in range(2))
    expected = runner.run(step(whole)).prompt_logprobs["a"]
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS_SIZE", 3 * VOCAB_SIZE)
    found = runner.run(step(pieces)).prompt_logprobs["a"]
    assert [entry.top_token_ids for entry in found] == [entry.top_token_ids for entry in expected]
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in expected], abs=1e-5)


def test_a_row_that_does_not_ask_has_no_prompt_logprobs(runner: ModelRunner) -> None:
    a, b = draw_sequences((5, 5))
    assert runner.run(step(a.row(5), b.row(5))).prompt_logprobs == {}

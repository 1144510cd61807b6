"""Log-probabilities from real ranks: any sharding gives one shard's, and a real engine's are those of transformers."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from engine.communication.handler import CommunicationHandler
from engine.protocol.config import EngineConfig
from engine.protocol.messages import FinishReason, Request, SamplingParams, TokenLogprobs
from engine.protocol.model_config import ModelConfig
from engine.sampling.logprobs import LogprobQuery, compute_logprobs
from tests.checkpoints import random_llama
from tests.distributed import run_on_ranks
from tests.engine_process import EngineProcess
from tests.oracle import Reference

Tell = Callable[[str], None]

TOLERANCE = 1e-4  # of the largest logit
NUM_NEW_TOKENS = 24
BLOCK_SIZE = 4
CONTEXT = 160
PROMPT_LENGTHS = (1, 2, 17, 36, 37, 38, 90, 120)


# --- shards ----------------------------------------------------------------------------------------------------------


def random_logits(num_rows: int, vocab_size: int) -> Tensor:
    """Return logits of which many are equal."""
    return (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * 8).round() / 2


def compute_on_shards(group: CommunicationHandler, vocab_size: int, queries: list[LogprobQuery]) -> list[TokenLogprobs]:
    """Cut the logits as the LM head is cut, with padding that would win if it counted."""
    logits = random_logits(6, vocab_size)
    padding = torch.full((6, -vocab_size % group.world_size), 100.0)
    shards = group.split(torch.cat((logits, padding), dim=1), dim=1)
    return compute_logprobs(shards[group.rank].contiguous(), queries, group, vocab_size=vocab_size)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("vocab_size", [5, 101, 1009])  # of 5 tokens on 4 ranks, the last rank has padding alone
def test_shards_give_what_one_shard_gives(vocab_size: int, tp_size: int) -> None:
    queries = [LogprobQuery(row, (7 * row + step) % vocab_size, 9 * step) for row in range(6) for step in range(5)]
    whole = compute_on_shards(CommunicationHandler(torch.device("cpu")), vocab_size, queries)
    on_rank_0, *on_others = run_on_ranks(compute_on_shards, tp_size, vocab_size, queries)
    assert on_others == [[]] * (tp_size - 1)
    for sharded, expected in zip(on_rank_0, whole, strict=True):
        assert (sharded.token_id, sharded.rank) == (expected.token_id, expected.rank)
        assert sharded.top_token_ids == expected.top_token_ids
        assert sharded.logprob == pytest.approx(expected.logprob, abs=1e-6)
        assert sharded.top_logprobs == pytest.approx(expected.top_logprobs, abs=1e-6)


# --- a real engine ---------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came for a request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass
class Comparison:
    """What was held against the reference."""

    count: int = 0
    near_ties: int = 0  # places where two tokens, all but equal, stand in the other order
    worst: float = 0.0  # error, as a share of the largest logit

    def check(self, found: TokenLogprobs, logits: Tensor, token_id: int, num_top: int) -> None:
        """Check a token's log-probability and those of the likeliest against the reference's logits `[vocab_size]`."""
        tolerance = TOLERANCE * logits.abs().max().item()
        expected = logits.double().log_softmax(0)
        assert found.token_id == token_id
        assert len(found.top_token_ids) == len(found.top_logprobs) == num_top
        ids = torch.tensor([token_id, *found.top_token_ids])
        errors = (torch.tensor([found.logprob, *found.top_logprobs]) - expected[ids]).abs()
        self.worst = max(self.worst, errors.max().item() / tolerance * TOLERANCE)
        assert errors.max() <= tolerance
        best = expected.topk(num_top)
        assert len(set(found.top_token_ids)) == num_top
        assert ((expected[found.top_token_ids] - best.values).abs() <= 2 * tolerance).all(), "not the likeliest tokens"
        surely, perhaps = (
            int((expected > expected[token_id] + play).sum()) for play in (2 * tolerance, -2 * tolerance)
        )
        assert surely <= found.rank - 1 <= perhaps
        self.near_ties += sum(a != b for a, b in zip(found.top_token_ids, best.indices.tolist(), strict=True))
        self.count += 1 + num_top


def draw_requests(vocab_size: int) -> list[Request]:
    """Return prompts that ask for logprobs of the prompt, of the output, of both and of none; some with options."""
    draw = random.Random(vocab_size)
    options = SamplingParams(
        max_tokens=NUM_NEW_TOKENS, temperature=0.8, top_k=50, repetition_penalty=1.2, logit_bias={5: 3.0}
    )
    greedy = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0)
    counts = [(5, 3), (0, 0), (None, 7), (20, None), (1, 20), (None, None)]
    requests = []
    for index, length in enumerate(PROMPT_LENGTHS * 2):
        logprobs, prompt_logprobs = counts[index % len(counts)]
        base = (greedy, options)[index // len(PROMPT_LENGTHS)]
        sampling = replace(base, seed=index, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        requests.append(Request(str(index), [draw.randrange(vocab_size) for _ in range(length)], sampling))
    return requests


def answers_of(engine: EngineProcess, requests: list[Request]) -> dict[str, Answer]:
    engine.submit(requests)
    answers = {request.request_id: Answer() for request in requests}
    unfinished = set(answers)
    while unfinished:
        for output in engine.receive():
            assert output.finish_reason is not FinishReason.ERROR, output.error
            answer = answers[output.request_id]
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs
            answer.prompt_logprobs += output.prompt_logprobs
            if output.finish_reason is not None:
                unfinished.discard(output.request_id)
    return answers


def check_answer(request: Request, answer: Answer, reference: Reference, comparison: Comparison) -> None:
    prompt, sampling = request.prompt_token_ids, request.sampling
    text = prompt + answer.token_ids
    assert len(answer.token_ids) == NUM_NEW_TOKENS
    logits = reference.logits(text[:-1])
    first_output = len(prompt) - 1
    for found, num_top, positions in (
        (answer.prompt_logprobs, sampling.prompt_logprobs, range(first_output)),
        (answer.logprobs, sampling.logprobs, range(first_output, len(text) - 1)),
    ):
        assert len(found) == (0 if num_top is None else len(positions))
        for position, entry in zip(positions, found, strict=False):
            comparison.check(entry, logits[position], text[position + 1], num_top or 0)


@pytest.mark.parametrize(("seed", "tp_size"), [(0, 1), (0, 2), (0, 4), (3, 4)])  # untied and tied embeddings
def test_logprobs_of_prompt_and_output_are_those_of_transformers(
    seed: int, tp_size: int, tmp_path: Path, device: str, tell: Tell
) -> None:
    """Chunked prompts, preempted sequences, and requests of every kind in one batch."""
    directory = random_llama(tmp_path, seed)
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    config = EngineConfig(
        model=str(directory),
        tensor_parallel_size=tp_size,
        device=device,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_batched_tokens=37,
        num_kv_blocks=2 * CONTEXT // BLOCK_SIZE,  # two full contexts for 16 sequences: preemption is certain
        block_size=BLOCK_SIZE,
    )
    requests = draw_requests(vocab_size)
    with EngineProcess(config) as engine:
        answers = answers_of(engine, requests)
        engine.wait_for_report()
    reference, comparison = Reference(directory), Comparison()
    for request in requests:
        check_answer(request, answers[request.request_id], reference, comparison)
    assert engine.preemptions > 0
    tell(
        f"logprobs, seed {seed}, tp {tp_size}: {comparison.count} values, the worst off by {comparison.worst:.1e} of "
        f"the largest logit, {comparison.near_ties} near-ties in another order, {engine.preemptions} preemptions"
    )


def test_logprobs_do_not_change_what_is_sampled(tmp_path: Path, device: str) -> None:
    directory = random_llama(tmp_path, 0)
    requests = draw_requests(ModelConfig.from_directory(directory).vocab_size)
    config = EngineConfig(
        model=str(directory), device=device, dtype="float32", max_model_len=CONTEXT, num_kv_blocks=200
    )
    plain = [
        Request(f"plain {request.request_id}", request.prompt_token_ids, replace(request.sampling, logprobs=None))
        for request in requests
    ]
    with EngineProcess(config) as engine:
        texts = engine.generate(requests + plain)
    for request in requests:
        assert texts[request.request_id] == texts[f"plain {request.request_id}"]

"""Sequences that share KV blocks get the tokens that they would get without sharing, from a real engine."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.protocol.config import EngineConfig
from engine.protocol.messages import Request, SamplingParams
from engine.protocol.model_config import ModelConfig
from tests.checkpoints import random_llama
from tests.engine_process import EngineProcess
from tests.oracle import Comparison, Reference

PROMPT_LENGTH = 133  # eight full blocks of 16, and a tail
NUM_NEW_TOKENS = 32
NUM_CHOICES = 4


def requests(prompt: list[int], name: str) -> list[Request]:
    """Return the choices of one API request."""
    sampling = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0)
    return [Request(f"{name}-{choice}", prompt, sampling) for choice in range(NUM_CHOICES)]


def check_tokens_and_count_hits(config: EngineConfig, tell: Callable[[str], None]) -> int:
    """Check the tokens of all choices of a prompt, asked for twice; return how many of its tokens were found."""
    vocab_size = ModelConfig.from_directory(Path(config.model)).vocab_size
    prompt = [random.Random(5).randrange(vocab_size) for _ in range(PROMPT_LENGTH)]
    with EngineProcess(config) as engine:
        outputs = engine.generate(requests(prompt, "first")) | engine.generate(requests(prompt, "again"))
        engine.wait_for_report()
    reference, comparison = Reference(Path(config.model)), Comparison()
    for tokens in outputs.values():
        assert len(tokens) == NUM_NEW_TOKENS
        reference.check_greedy(prompt, tokens, comparison)
    assert sum(report.scheduler.integrity_checks for report in engine.reports) > 0
    hits = sum(report.scheduler.prefix_cache_hits for report in engine.reports)
    tell(f"{comparison.tokens} tokens, {comparison.near_ties} near-ties, {hits} prompt tokens found in the KV cache")
    return hits


@pytest.mark.parametrize(("tp_size", "budget"), [(1, 2048), (2, 2048), (2, 37)])  # all choices in one step, or chunks
def test_choices_and_a_repeated_prompt_share_blocks_and_give_the_greedy_tokens_of_transformers(
    tp_size: int, budget: int, tmp_path: Path, device: str, tell: Callable[[str], None]
) -> None:
    config = EngineConfig(
        model=str(random_llama(tmp_path, 0)),
        tensor_parallel_size=tp_size,
        device=device,
        dtype="float32",
        max_num_batched_tokens=budget,
    )
    assert check_tokens_and_count_hits(config, tell) == (2 * NUM_CHOICES - 1) * 128


def test_without_prefix_caching_the_tokens_are_the_same_and_nothing_is_found(
    tmp_path: Path, device: str, tell: Callable[[str], None]
) -> None:
    config = EngineConfig(
        model=str(random_llama(tmp_path, 0)), device=device, dtype="float32", enable_prefix_caching=False
    )
    assert check_tokens_and_count_hits(config, tell) == 0

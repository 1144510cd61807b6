"""Token for token what transformers computes, at every way to split the model, with chunking and preemption."""

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

NUM_PROMPTS = 24
NUM_NEW_TOKENS = 64
BLOCK_SIZE = 16
CONTEXT = 288  # 200 + 64, in whole blocks
SEEDS = range(6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Reference]]:
    made: dict[int, tuple[Path, Reference]] = {}

    def make(seed: int) -> tuple[Path, Reference]:
        if seed not in made:
            directory = random_llama(tmp_path_factory.mktemp(f"llama{seed}"), seed)
            made[seed] = directory, Reference(directory)
        return made[seed]

    return make


def prompts(seed: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [1, 200, *(draw.randint(1, 200) for _ in range(NUM_PROMPTS - 2))]
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_tokens_are_those_of_transformers(
    seed: int, tp_size: int, checkpoint: Callable[[int], tuple[Path, Reference]], device: str
) -> None:
    directory, reference = checkpoint(seed)
    config = ModelConfig.from_directory(directory)
    try:
        config.check_tensor_parallel_size(tp_size)
    except ValueError as error:
        pytest.skip(str(error))
    engine_config = EngineConfig(
        model=str(directory),
        tensor_parallel_size=tp_size,
        device=device,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_batched_tokens=37,  # chunks every longer prompt, at borders that are not the blocks'
        max_num_seqs=NUM_PROMPTS,
        num_kv_blocks=4 * CONTEXT // BLOCK_SIZE,  # four full contexts for 24 sequences: preemption is certain
        block_size=BLOCK_SIZE,
    )
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0))
        for i, prompt in enumerate(prompts(seed, config.vocab_size))
    ]
    with EngineProcess(engine_config) as engine:
        outputs = engine.generate(requests)
        report = engine.wait_for_report()
    comparison = Comparison()
    for request in requests:
        assert len(outputs[request.request_id]) == NUM_NEW_TOKENS
        reference.check_greedy(request.prompt_token_ids, outputs[request.request_id], comparison)
    print(
        f"seed {seed} tp {tp_size}: {comparison.tokens} tokens, {comparison.near_ties} near-ties, "
        f"{engine.preemptions} preemptions, {config.num_attention_heads}/{config.num_key_value_heads} heads, "
        f"vocabulary {config.vocab_size}"
    )
    assert engine.preemptions > 0
    assert report.scheduler.num_free_kv_blocks == report.scheduler.num_kv_blocks

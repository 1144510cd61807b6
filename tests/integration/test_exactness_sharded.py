"""Token for token what transformers computes, from checkpoints sharded for N ranks and served by M."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.protocol.config import EngineConfig
from engine.protocol.messages import Request, SamplingParams
from tests.checkpoints import random_llama
from tests.engine_process import EngineProcess
from tests.integration.test_exactness import check_greedy_tokens, prompts
from tests.oracle import Comparison, Reference
from tests.service_process import ROOT

Tell = Callable[[str], None]
Sharded = Callable[[int, int], tuple[Path, Reference]]

SEED, SIZES = 1, (1, 2, 4)  # four query and two KV heads, which four ranks hold twice; tied embeddings
THOROUGH = {1: (1, 2, 4), 4: (1, 2, 3, 4)}  # sizes by seed; of the second's twelve heads each has its own KV head
NUM_PROMPTS, NUM_NEW_TOKENS, CONTEXT = 4, 12, 224


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """A checkpoint of a seed, sharded by the command for so many ranks."""
    references: dict[int, tuple[Path, Reference]] = {}
    made: dict[tuple[int, int], Path] = {}

    def make(seed: int, tp_size: int) -> tuple[Path, Reference]:
        if seed not in references:
            source = random_llama(tmp_path_factory.mktemp(f"llama{seed}") / "hf", seed)
            references[seed] = source, Reference(source)
        source, reference = references[seed]
        if (seed, tp_size) not in made:
            made[seed, tp_size] = source.parent / f"tp{tp_size}"
            command = [sys.executable, "-P", "-m", "server", "checkpoint", "shard", str(source)]
            options = [str(made[seed, tp_size]), "--tensor-parallel-size", str(tp_size)]
            subprocess.run([*command, *options], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return made[seed, tp_size], reference

    return make


@pytest.mark.parametrize("loaded_by", SIZES)
@pytest.mark.parametrize("saved_by", SIZES)
def test_a_few_greedy_tokens_are_those_of_transformers(
    saved_by: int, loaded_by: int, sharded: Sharded, device: str
) -> None:
    directory, reference = sharded(SEED, saved_by)
    config = EngineConfig(
        model=str(directory),
        tensor_parallel_size=loaded_by,
        device=device,
        dtype="float32",
        max_model_len=CONTEXT,
        num_kv_blocks=64,
        mmap=(saved_by + loaded_by) % 3 != 0,  # some of them without
    )
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0))
        for i, prompt in enumerate(prompts(257)[:NUM_PROMPTS])
    ]
    with EngineProcess(config) as engine:
        outputs = engine.generate(requests)
    comparison = Comparison()
    for request in requests:
        assert len(outputs[request.request_id]) == NUM_NEW_TOKENS
        reference.check_greedy(request.prompt_token_ids, outputs[request.request_id], comparison)
    assert comparison.tokens == NUM_PROMPTS * NUM_NEW_TOKENS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "saved_by", "loaded_by"),
    [(seed, saved, loaded) for seed, sizes in THOROUGH.items() for saved in sizes for loaded in sizes],
)
def test_greedy_tokens_are_those_of_transformers_with_chunking_and_preemption(
    seed: int, saved_by: int, loaded_by: int, sharded: Sharded, device: str, tell: Tell
) -> None:
    directory, reference = sharded(seed, saved_by)
    tell(f"seed {seed}, sharded for {saved_by}, " + check_greedy_tokens(directory, reference, loaded_by, device))

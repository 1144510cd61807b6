"""Token for token what transformers computes, at every way to split the model, with chunking and preemption."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from engine.protocol.config import EngineConfig
from engine.protocol.messages import Request, SamplingParams
from engine.protocol.model_config import ModelConfig
from tests.checkpoints import random_llama, random_mistral, random_qwen2
from tests.engine_process import EngineProcess
from tests.oracle import Comparison, Reference

Tell = Callable[[str], None]

NUM_PROMPTS = 24
NUM_NEW_TOKENS = 64
BLOCK_SIZE = 16
CONTEXT = 288  # 200 + 64, in whole blocks
# Two checkpoints have tied embeddings and others, plain rotary positions and llama3's; the slow ones all other kinds.
SEEDS = (0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3, 4, 5)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Reference]]:
    made: dict[int, tuple[Path, Reference]] = {}

    def make(seed: int) -> tuple[Path, Reference]:
        if seed not in made:
            directory = random_llama(tmp_path_factory.mktemp(f"llama{seed}"), seed)
            made[seed] = directory, Reference(directory)
        return made[seed]

    return make


def prompts(vocab_size: int) -> list[list[int]]:
    draw = random.Random(vocab_size)
    lengths = [1, 200, *(draw.randint(1, 200) for _ in range(NUM_PROMPTS - 2))]
    return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


def publish(directory: Path) -> None:
    """Rewrite a checkpoint as published models have it: the older spelling of config.json, and several weight files."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_greedy_tokens_are_those_of_transformers(
    seed: int, tp_size: int, checkpoint: Callable[[int], tuple[Path, Reference]], device: str, tell: Tell
) -> None:
    directory, reference = checkpoint(seed)
    tell(f"seed {seed}, " + check_greedy_tokens(directory, reference, tp_size, device))


def test_greedy_tokens_are_those_of_transformers_on_everything_that_the_machine_computes_with(
    each_kernels: str, checkpoint: Callable[[int], tuple[Path, Reference]], tell: Tell
) -> None:
    counted = check_greedy_tokens(*checkpoint(0), 2, "cpu", kernels=each_kernels, num_prompts=8, num_new_tokens=32)
    tell(f"{each_kernels}, {counted}")


@pytest.mark.parametrize("seed", [0, 1])  # llama3 and default rotary positions
def test_greedy_tokens_are_those_of_transformers_for_a_checkpoint_as_published(
    seed: int, tmp_path: Path, device: str, tell: Tell
) -> None:
    directory = random_llama(tmp_path, seed)
    publish(directory)
    assert len(list(directory.glob("*.safetensors"))) > 1
    tell(f"as published, seed {seed}, " + check_greedy_tokens(directory, Reference(directory), 2, device))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_greedy_tokens_of_a_qwen2_are_those_of_transformers(
    tp_size: int, tmp_path: Path, device: str, tell: Tell
) -> None:
    directory = random_qwen2(tmp_path, 1)
    tell("Qwen2, " + check_greedy_tokens(directory, Reference(directory), tp_size, device))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_greedy_tokens_of_a_mistral_are_those_of_transformers_within_its_window(
    tp_size: int, tmp_path: Path, device: str, tell: Tell
) -> None:
    directory = random_mistral(tmp_path, 1, sliding_window=CONTEXT)
    tell("Mistral, " + check_greedy_tokens(directory, Reference(directory), tp_size, device))


def check_greedy_tokens(
    directory: Path,
    reference: Reference,
    tp_size: int,
    device: str,
    *,
    kernels: str = "auto",
    num_prompts: int = NUM_PROMPTS,
    num_new_tokens: int = NUM_NEW_TOKENS,
) -> str:
    """Check the tokens of so many prompts, and return what was counted."""
    config = ModelConfig.from_directory(directory)
    try:
        config.check_tensor_parallel_size(tp_size)
    except ValueError as error:
        pytest.skip(str(error))
    engine_config = EngineConfig(
        model=str(directory),
        tensor_parallel_size=tp_size,
        device=device,
        kernels=kernels,
        dtype="float32",
        max_model_len=CONTEXT,
        max_num_batched_tokens=37,  # chunks every longer prompt, at borders that are not the blocks'
        max_num_seqs=NUM_PROMPTS,
        num_kv_blocks=max(1, num_prompts // 6) * CONTEXT // BLOCK_SIZE,  # one context for six sequences: preemption
        block_size=BLOCK_SIZE,
    )
    requests = [
        Request(str(i), prompt, SamplingParams(max_tokens=num_new_tokens, temperature=0.0))
        for i, prompt in enumerate(prompts(config.vocab_size)[:num_prompts])
    ]
    with EngineProcess(engine_config) as engine:
        outputs = engine.generate(requests)
        report = engine.wait_for_report()
    comparison = Comparison()
    for request in requests:
        assert len(outputs[request.request_id]) == num_new_tokens
        reference.check_greedy(request.prompt_token_ids, outputs[request.request_id], comparison)
    assert engine.preemptions > 0
    assert report.scheduler.num_free_kv_blocks == report.scheduler.num_kv_blocks
    return (
        f"tp {tp_size}: {comparison.tokens} tokens, {comparison.near_ties} near-ties, "
        f"{engine.preemptions} preemptions, {config.num_attention_heads}/{config.num_key_value_heads} heads, "
        f"vocabulary {config.vocab_size}"
    )

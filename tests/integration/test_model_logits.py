"""Logits of random checkpoints are transformers', however the model is split and its sequences are chunked."""

from array import array
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.attention.backends import attention_backend
from engine.attention.base import AttentionMetadata, KVCache
from engine.attention.dense import DenseCausalAttention
from engine.attention.rotary import inverse_frequencies
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import MODEL_CLASSES, build_model
from engine.parallel.base import use_kernels
from engine.protocol.model_config import ARCHITECTURES, ModelConfig
from tests.checkpoints import HEADS, random_llama, random_mistral, random_qwen2
from tests.distributed import run_on_ranks
from tests.kernels import usable_kernels

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit
LENGTHS = (1, 70, 33, 16)
BLOCK_SIZE = 16
BLOCKS_EACH = -(-max(LENGTHS) // BLOCK_SIZE)
SPLITS = (0, 13, 69, 70)  # a chunk, a chunk with something before it, and a decode
ODDITIES: dict[str, dict[str, Any]] = {
    "prime hidden size": {"hidden_size": 37, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8},
    "no head_dim": {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": None},
    "all biases": {"attention_bias": True, "mlp_bias": True},
    "vocabulary of 5": {"vocab_size": 5},
    "intermediate size of 1": {"intermediate_size": 1},
}


def token_ids_of(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(vocab_size)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def load(
    group: CommunicationHandler, directory: Path, kernels: Kernels = TORCH_KERNELS
) -> tuple[LlamaForCausalLM, ModelConfig]:
    config = ModelConfig.from_directory(directory)
    model = build_model(config, group, device=CPU, dtype=torch.float32)
    use_kernels(model, kernels)
    ModelDistributor(group).load_model(model, directory)
    return model, config


def kernels_called(name: str) -> Kernels:
    if name == "torch":
        return TORCH_KERNELS
    library = KernelLibrary(name)
    return CPUKernels(library, library.create_pool(2, None, 0.0), torch.float32)


def dense_logits(group: CommunicationHandler, directory: Path) -> Tensor | None:
    """Compute all sequences at once, as in training."""
    model, config = load(group, directory)
    attend = DenseCausalAttention([0, *accumulate(LENGTHS)], config.local_kv_heads(group.world_size))
    token_ids = torch.tensor([token for ids in token_ids_of(config.vocab_size) for token in ids])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.inference_mode():
        logits = group.gather(model.compute_logits(model(token_ids, positions, attend)))
    return None if logits is None else logits[:, : config.vocab_size]


def paged_logits(group: CommunicationHandler, directory: Path, kernels_name: str) -> Tensor | None:
    """Compute all sequences together in the steps that `SPLITS` cuts them into, over a paged cache."""
    kernels = kernels_called(kernels_name)
    model, config = load(group, directory, kernels)
    num_kv_heads = max(1, config.num_key_value_heads // group.world_size)
    shape = (len(LENGTHS) * BLOCKS_EACH, BLOCK_SIZE, num_kv_heads, config.head_dim)
    caches = [KVCache(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
    sequences = [torch.tensor(ids) for ids in token_ids_of(config.vocab_size)]
    found: list[list[Tensor]] = [[] for _ in LENGTHS]
    for start, stop in pairwise(SPLITS):
        chunks = [(i, start, min(stop, length)) for i, length in enumerate(LENGTHS) if start < length]
        token_ids = torch.cat([sequences[i][first:last] for i, first, last in chunks])
        positions = torch.cat([torch.arange(first, last) for _, first, last in chunks])
        metadata = metadata_of(chunks)
        with torch.inference_mode():
            hidden = model(token_ids, positions, attention_backend(kernels, caches)(metadata))
            logits = group.gather(model.compute_logits(hidden))
        for (i, _, _), (first, last) in zip(chunks, pairwise(metadata.cu_seqlens_q), strict=True):
            if logits is not None:
                found[i].append(logits[first:last, : config.vocab_size])
    return None if group.rank else torch.cat([part for parts in found for part in parts])


def all_logits(group: CommunicationHandler, directory: Path) -> dict[str, Tensor]:
    """Return the logits as training has them, and those over a paged cache by what computes; nothing on other ranks."""
    found = {name: paged_logits(group, directory, name) for name in usable_kernels()}
    return {name: x for name, x in {"dense": dense_logits(group, directory), **found}.items() if x is not None}


def metadata_of(chunks: list[tuple[int, int, int]]) -> AttentionMetadata:
    """Describe a step of (sequence, start, stop); each sequence has `BLOCKS_EACH` blocks, in falling order."""
    return AttentionMetadata(
        cu_seqlens_q=[0, *accumulate(last - first for _, first, last in chunks)],
        seq_lens=[last for _, _, last in chunks],
        block_tables=[array("i", range((i + 1) * BLOCKS_EACH - 1, i * BLOCKS_EACH - 1, -1)) for i, _, _ in chunks],
    )


@torch.inference_mode()
def reference_logits(directory: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in token_ids_of(model.config.vocab_size)])


def valid_sizes(directory: Path) -> list[int]:
    config = ModelConfig.from_directory(directory)
    sizes = []
    for tp_size in range(1, 5):
        try:
            config.check_tensor_parallel_size(tp_size)
        except ValueError:
            continue
        sizes.append(tp_size)
    return sizes


def check(directory: Path) -> None:
    expected = reference_logits(directory)
    for tp_size in valid_sizes(directory):
        found = run_on_ranks(all_logits, tp_size, directory)[0]
        assert found.keys() == {"dense", *usable_kernels()}
        for name, ours in found.items():
            assert ours.shape == expected.shape
            error = (ours - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE, f"{name} at tp {tp_size}: off by {error:.1e}"


@pytest.mark.parametrize("seed", range(100, 112))
def test_logits_of_random_checkpoints_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    check(random_llama(tmp_path, seed))


@pytest.mark.parametrize("seed", [0, 1])  # 12/4 and 4/2 heads: 1, 2 and 4 ranks, of which two may hold one KV head
def test_logits_of_random_qwen2_checkpoints_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    check(random_qwen2(tmp_path, seed))


@pytest.mark.parametrize("window", [None, max(LENGTHS)])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_of_random_mistral_checkpoints_are_those_of_transformers_up_to_a_whole_window(
    seed: int, window: int | None, tmp_path: Path
) -> None:
    check(random_mistral(tmp_path, seed, sliding_window=window))


@pytest.mark.parametrize("oddity", ODDITIES)
def test_logits_of_odd_checkpoints_are_those_of_transformers(oddity: str, tmp_path: Path) -> None:
    check(random_llama(tmp_path, 1, **ODDITIES[oddity]))


def test_every_tensor_parallel_size_up_to_4_is_covered(tmp_path: Path) -> None:
    sizes = [valid_sizes(random_llama(tmp_path / str(seed), seed)) for seed in range(100, 100 + len(HEADS))]
    assert {tp_size for valid in sizes for tp_size in valid} == {1, 2, 3, 4}


@pytest.mark.parametrize("seed", range(3))
def test_rotary_frequencies_are_bit_for_bit_those_of_transformers(seed: int, tmp_path: Path) -> None:
    directory = random_llama(tmp_path, seed, head_dim=64)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).model.rotary_emb.inv_freq
    assert torch.equal(inverse_frequencies(64, ModelConfig.from_directory(directory).rope), theirs)


def test_each_architecture_that_config_json_may_name_has_a_class() -> None:
    assert tuple(MODEL_CLASSES) == ARCHITECTURES

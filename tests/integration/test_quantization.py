"""`--quantization int8`: the same matrices from any checkpoint on any number of ranks, and almost the same text."""

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from engine.attention.dense import DenseCausalAttention
from engine.checkpoint.convert import shard
from engine.checkpoint.export import export
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.verify import verify
from engine.communication.handler import CommunicationHandler
from engine.kernels.base import Kernels
from engine.kernels.cpu_kernels import CPUKernels
from engine.kernels.library import KernelLibrary
from engine.kernels.torch_kernels import TORCH_KERNELS
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import build_model
from engine.parallel.base import split_evenly, use_kernels
from engine.parallel.linear import ColumnParallelLinear
from engine.parallel.quantization import MOST_FEATURES, quantize_layers
from engine.protocol.commands import ExportCommand, ShardCommand
from engine.protocol.config import EMBEDDED_MODEL
from engine.protocol.model_config import ModelConfig
from tests.checkpoints import random_llama, random_qwen2
from tests.distributed import run_on_ranks
from tests.kernels import usable_kernels

CPU = torch.device("cpu")
DOCS = Path(__file__).parents[2] / "docs"
SEQUENCE_LENGTH, NUM_SEQUENCES = 128, 24
MOST_LOSS = 0.01  # of perplexity


def no_progress(_total: int) -> Callable[[int], None]:
    return lambda _done: None


def kernels_named(name: str, dtype: torch.dtype, *, is_batch_invariant: bool = False) -> Kernels:
    if name == "torch":
        return TORCH_KERNELS
    library = KernelLibrary(name)
    return CPUKernels(library, library.create_pool(2, None, 1e-4), dtype, is_batch_invariant=is_batch_invariant)


def load(
    group: CommunicationHandler,
    directory: Path,
    *,
    kernels: Kernels = TORCH_KERNELS,
    dtype: torch.dtype = torch.float32,
    quantization: str = "int8",
) -> LlamaForCausalLM:
    config = ModelConfig.from_directory(directory)
    model = build_model(config, group, device=CPU, dtype=dtype, quantization=quantization)
    use_kernels(model, kernels)
    ModelDistributor(group).load_model(model, directory)
    return model


def logits_of(group: CommunicationHandler, directory: Path) -> Tensor | None:
    """Return the logits of some token ids, on rank 0."""
    model, config = load(group, directory), ModelConfig.from_directory(directory)
    token_ids = torch.arange(40) * 7 % config.vocab_size
    attend = DenseCausalAttention([0, 40], config.local_kv_heads(group.world_size))
    with torch.inference_mode():
        logits = group.gather(model.compute_logits(model(token_ids, torch.arange(40), attend)))
    return None if logits is None else logits[:, : config.vocab_size]


def split(source: Path, destination: Path, tp_size: int, quantization: str) -> Path:
    command = ShardCommand(
        source=str(source),
        destination=str(destination),
        tensor_parallel_size=tp_size,
        quantization=quantization,
        progress=False,
    )
    shard(command, no_progress)
    return destination


# --- quality ---------------------------------------------------------------------------------------------------------


def held_out_text() -> Tensor:
    """Return token ids of this project's own pages, `[NUM_SEQUENCES, SEQUENCE_LENGTH]`."""
    text = "\n".join((DOCS / name).read_text() for name in ("architecture.md", "development.md"))
    ids = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json")).encode(text).ids
    return torch.tensor(ids[: NUM_SEQUENCES * SEQUENCE_LENGTH]).view(NUM_SEQUENCES, SEQUENCE_LENGTH)


def perplexity(kernels: Kernels, quantization: str) -> float:
    group = CommunicationHandler(CPU)
    model = load(group, EMBEDDED_MODEL, kernels=kernels, dtype=torch.bfloat16, quantization=quantization)
    config, token_ids = ModelConfig.from_directory(EMBEDDED_MODEL), held_out_text()
    bounds = [0, *accumulate([SEQUENCE_LENGTH] * NUM_SEQUENCES)]
    positions = torch.arange(SEQUENCE_LENGTH).repeat(NUM_SEQUENCES)
    with torch.inference_mode():
        hidden = model(token_ids.flatten(), positions, DenseCausalAttention(bounds, config.num_key_value_heads))
        logprobs = model.compute_logits(hidden).log_softmax(-1).view(NUM_SEQUENCES, SEQUENCE_LENGTH, -1)
    targets = token_ids[:, 1:].unsqueeze(-1)
    return math.exp(-float(logprobs[:, :-1].gather(-1, targets).mean()))


@pytest.mark.parametrize(
    ("name", "is_batch_invariant"),
    [
        pytest.param(name, invariant, marks=[pytest.mark.slow] * (place > 0))  # all but what is taken by default
        for place, name in enumerate(usable_kernels())
        for invariant in (False, True)
        if name != "torch" or not invariant
    ],
)
def test_perplexity_of_the_embedded_model_is_within_a_hundredth(name: str, is_batch_invariant: bool) -> None:
    kernels = kernels_named(name, torch.bfloat16, is_batch_invariant=is_batch_invariant)
    plain, quantized = perplexity(kernels, "none"), perplexity(kernels, "int8")
    assert plain < 1000  # it has learned something: otherwise nothing could be lost
    assert quantized < plain * (1 + MOST_LOSS)


# --- any checkpoint, any number of ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [random_llama, random_qwen2])
@pytest.mark.parametrize("is_tied", [False, True])
def test_every_number_of_ranks_has_the_same_matrices(make: Callable[..., Path], is_tied: bool, tmp_path: Path) -> None:
    directory = make(tmp_path / "model", seed=0, tie_word_embeddings=is_tied)
    expected = logits_of(CommunicationHandler(CPU), directory)
    assert expected is not None
    for tp_size in (2, 4):
        found = run_on_ranks(logits_of, tp_size, directory)[0]
        assert found is not None
        assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_int8_is_close_to_what_it_was_made_of(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1)
    group = CommunicationHandler(CPU)
    plain = load(group, directory, quantization="none").state_dict()
    quantized = load(group, directory).state_dict()
    for name, weight in plain.items():
        matrix = quantized[name].float()
        scale = quantized.get(f"{name}_scale")
        if scale is not None:
            assert quantized[name].dtype == torch.int8
            matrix = matrix * scale.unsqueeze(1)
        assert (matrix - weight).abs().max() <= weight.abs().max() / 127 * 0.51 * (scale is not None)
    assert len(quantized) > len(plain)


@pytest.mark.parametrize("written_by", [1, 2, 4])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_what_any_number_of_ranks_has_written_gives_the_same_bits_as_the_source(
    written_by: int, quantization: str, tmp_path: Path
) -> None:
    source = random_llama(tmp_path / "model", seed=0, tie_word_embeddings=True)
    written = split(source, tmp_path / "split", written_by, quantization)
    group = CommunicationHandler(CPU)
    expected, found = load(group, source).state_dict(), load(group, written).state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_int8_checkpoint_is_mapped_and_verified_and_split_again(tmp_path: Path) -> None:
    source = random_llama(tmp_path / "model", seed=0)
    written = split(source, tmp_path / "split", 2, "int8")
    verdict = verify(written, no_progress)
    assert (verdict.problems, verdict.notes) == (
        [],
        [f"{written} has no tokenizer.json, without which it cannot be served"],
    )
    assert CheckpointMetadata.read(written).dtype == "int8"
    again = split(written, tmp_path / "again", 1, "int8")
    group = CommunicationHandler(CPU)
    config = ModelConfig.from_directory(source)
    model = build_model(config, group, device=CPU, dtype=torch.float32, quantization="int8")
    report = ModelDistributor(group).load_model(model, again)
    assert report.memory.num_bytes > 0
    expected = load(group, source).state_dict()
    assert all(torch.equal(values, expected[name]) for name, values in model.state_dict().items())


def test_int8_matrices_are_refused_where_others_are_wanted(tmp_path: Path) -> None:
    source = random_llama(tmp_path / "model", seed=0)
    written = split(source, tmp_path / "split", 1, "int8")
    readers = "serve, doctor, bench decode and checkpoint shard"
    told = f"its matrices are int8, which only {readers} read, with --quantization int8"
    with pytest.raises(ValueError, match=told):
        load(CommunicationHandler(CPU), written, quantization="none")
    with pytest.raises(ValueError, match=told):
        split(written, tmp_path / "again", 1, "none")
    with pytest.raises(ValueError, match=told):
        export(ExportCommand(source=str(written), destination=str(tmp_path / "exported")), no_progress)


def test_a_matrix_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=0)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"up_proj\.weight is missing"):
        load(CommunicationHandler(CPU), directory)


def test_a_row_that_is_too_long_for_32_bit_sums_is_refused() -> None:
    layer = ColumnParallelLinear(
        MOST_FEATURES + 1,
        [split_evenly(4, 1)],
        CommunicationHandler(CPU),
        device=torch.device("meta"),
        dtype=torch.float32,
    )
    with pytest.raises(ValueError, match="--quantization int8"):
        quantize_layers(layer)

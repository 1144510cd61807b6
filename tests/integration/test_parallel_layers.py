"""Each parallel layer computes, differentiates and learns what one rank does, in float64."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.attention.dense import DenseCausalAttention
from engine.attention.rotary import RotaryEmbedding
from engine.communication.handler import CommunicationHandler
from engine.models.llama import LlamaForCausalLM
from engine.parallel.attention import ParallelAttention
from engine.parallel.base import ShardSpec, iterate_sharded_parameters, split_evenly
from engine.parallel.block import TensorParallelTransformerBlock
from engine.parallel.collectives import gather_from_group, scatter_to_group
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.parallel.mlp import ParallelMLP
from engine.protocol.model_config import ModelConfig, RopeConfig
from tests.distributed import run_on_ranks

CPU = torch.device("cpu")
FLOAT64 = torch.float64
NUM_TOKENS = 12
SEQUENCES = (0, 5, 12)
LEARNING_RATE = 0.05

# A layer's use: from (layer, its group, inputs) to the rank's share of the loss. Shares add up to one rank's loss,
# unless every rank computes all of it.
Build = Callable[[CommunicationHandler], nn.Module]
Loss = Callable[[nn.Module, CommunicationHandler, Tensor], Tensor]


def config_of(heads: tuple[int, int], *, bias: bool, tied: bool = False) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=29,
        hidden_size=13,
        intermediate_size=11,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=6,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=tied,
        dtype="float32",
    )


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def weighted(y: Tensor, rows: slice = slice(None)) -> Tensor:
    """A loss to which each element of y counts differently; `rows` are those of the whole that y holds."""
    weights = noise(77, NUM_TOKENS, y.shape[1])[rows]
    return (y * weights).sum() + (y * weights).pow(2).sum() / 2


def shard_of(tensor: Tensor, whole_spec: ShardSpec, spec: ShardSpec, group: CommunicationHandler) -> Tensor:
    """Cut what one rank holds as `whole_spec` says into what `group`'s rank holds as `spec` says."""
    if spec.dim is None:
        return tensor
    runs = []
    for (_, whole_offset), part in zip(whole_spec.places(), spec.parts, strict=True):
        start, stop = part.bounds(group.rank, group.world_size)
        run = tensor.narrow(spec.dim, whole_offset + start, stop - start)
        padding = list(run.shape)
        padding[spec.dim] = part.local_size - (stop - start)
        runs.append(torch.cat([run, run.new_zeros(padding)], spec.dim))
    return torch.cat(runs, spec.dim)


Pair = tuple[str, nn.Parameter, nn.Parameter, Callable[[Tensor], Tensor]]


def pairs(layer: nn.Module, reference: nn.Module, group: CommunicationHandler) -> Iterator[Pair]:
    """Yield (name, the rank's parameter, one rank's parameter, how to cut the latter)."""
    both = zip(iterate_sharded_parameters(layer), iterate_sharded_parameters(reference), strict=True)
    for (name, ours, spec), (_, whole, whole_spec) in both:

        def cut(tensor: Tensor, whole_spec: ShardSpec = whole_spec, spec: ShardSpec = spec) -> Tensor:
            return shard_of(tensor, whole_spec, spec, group)

        yield name, ours, whole, cut


def close(ours: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert ours is not None, what
    assert expected is not None, what
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}")


def check_training(
    group: CommunicationHandler, build: Build, loss: Loss, x: Tensor, *, loss_is_shared: bool = False
) -> None:
    """Compare output, gradients and two optimiser steps with those of one rank, which this rank computes as well."""
    alone = CommunicationHandler(CPU)
    layer, reference = build(group), build(alone)
    for index, (_, parameter, whole, cut) in enumerate(pairs(layer, reference, group)):
        whole.data.copy_(noise(index, *whole.shape))
        parameter.data.copy_(cut(whole.data))
    optimizers = [torch.optim.Adam(module.parameters(), lr=LEARNING_RATE) for module in (layer, reference)]
    for step in range(2):
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        ours, expected = loss(layer, group, inputs[0]), loss(reference, alone, inputs[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward([ours, expected])
        total = group.all_reduce(ours.detach().clone()) if loss_is_shared else ours.detach()
        close(total, expected.detach(), f"loss of step {step}")
        if x.is_floating_point():
            close(inputs[0].grad, inputs[1].grad, f"gradient of the input in step {step}")
        for name, parameter, whole, cut in pairs(layer, reference, group):
            assert whole.grad is not None
            close(parameter.grad, cut(whole.grad), f"gradient of {name} in step {step}")
        for optimizer in optimizers:
            optimizer.step()
        for name, parameter, whole, cut in pairs(layer, reference, group):
            close(parameter.data, cut(whole.data), f"{name} after step {step}")


# --- linear layers ---------------------------------------------------------------------------------------------------


def check_column(group: CommunicationHandler, out_features: int, bias: bool) -> None:
    def build(group: CommunicationHandler) -> ColumnParallelLinear:
        part = split_evenly(out_features, group.world_size)
        return ColumnParallelLinear(7, [part], group, bias=bias, device=CPU, dtype=FLOAT64)

    def loss(layer: nn.Module, group: CommunicationHandler, x: Tensor) -> Tensor:
        return weighted(gather_from_group(layer(x), group)[:, :out_features])

    check_training(group, build, loss, noise(50, NUM_TOKENS, 7))


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("out_features", [12, 11, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_a_column_parallel_layer_learns_as_one_rank_does(tp_size: int, out_features: int, bias: bool) -> None:
    run_on_ranks(check_column, tp_size, out_features, bias)


def check_row(group: CommunicationHandler, in_features: int, bias: bool, scatters: bool) -> None:
    def build(group: CommunicationHandler) -> RowParallelLinear:
        part = split_evenly(in_features, group.world_size)
        reduce = "reduce_scatter" if scatters else "all_reduce"
        return RowParallelLinear(part, 5, group, bias=bias, reduce=reduce, device=CPU, dtype=FLOAT64)  # type: ignore[arg-type]

    def loss(layer: nn.Module, group: CommunicationHandler, x: Tensor) -> Tensor:
        padding = split_evenly(in_features, group.world_size).padded_size - in_features
        y = layer(scatter_to_group(F.pad(x, (0, padding)), group))
        if not scatters:
            return weighted(y)
        assert len(y) == NUM_TOKENS // group.world_size
        return weighted(y, slice(group.rank * len(y), (group.rank + 1) * len(y)))

    check_training(group, build, loss, noise(50, NUM_TOKENS, in_features), loss_is_shared=scatters)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("in_features", [12, 11])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scatters", [False, True])
def test_a_row_parallel_layer_learns_as_one_rank_does(
    tp_size: int, in_features: int, bias: bool, scatters: bool
) -> None:
    run_on_ranks(check_row, tp_size, in_features, bias, scatters)


def check_bias_is_added_once(group: CommunicationHandler) -> None:
    part = split_evenly(8, group.world_size)
    layer = RowParallelLinear(part, 5, group, bias=True, device=CPU, dtype=FLOAT64)
    assert layer.bias is not None
    with torch.inference_mode():
        layer.weight.zero_()
        layer.bias.copy_(noise(0, 5))
        close(layer(noise(1, 3, part.local_size)), noise(0, 5).expand(3, 5), "bias")


def test_a_row_parallel_bias_is_added_once() -> None:
    run_on_ranks(check_bias_is_added_once, 4)


# --- embedding and LM head -------------------------------------------------------------------------------------------


class Vocabulary(nn.Module):
    """An embedding and a head, alone."""

    def __init__(self, vocab_size: int, group: CommunicationHandler, *, tied: bool) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(vocab_size, 5, group, device=CPU, dtype=FLOAT64)
        self.lm_head = ParallelLMHead(self.embed_tokens, tied=tied)


def check_vocabulary(group: CommunicationHandler, vocab_size: int, tied: bool) -> None:
    def build(group: CommunicationHandler) -> nn.Module:
        return Vocabulary(vocab_size, group, tied=tied)

    def loss(layer: nn.Module, group: CommunicationHandler, token_ids: Tensor) -> Tensor:
        assert isinstance(layer, Vocabulary)
        logits = layer.lm_head(torch.tanh(layer.embed_tokens(token_ids)))
        return F.cross_entropy(gather_from_group(logits, group)[:, :vocab_size], token_ids.roll(1))

    token_ids = torch.arange(NUM_TOKENS) * 7 % vocab_size
    token_ids[0] = vocab_size - 1
    check_training(group, build, loss, token_ids)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("vocab_size", [24, 13, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_learn_as_one_rank_does(tp_size: int, vocab_size: int, tied: bool) -> None:
    run_on_ranks(check_vocabulary, tp_size, vocab_size, tied)


# --- attention, MLP, block and model ---------------------------------------------------------------------------------

POSITIONS = torch.tensor([*range(5), *range(7)])
# (query heads, KV heads, ranks): KV heads spread, and replicated over 2, 3 and 4 ranks.
HEADS = [(4, 4, 2), (4, 2, 2), (4, 1, 2), (6, 3, 3), (6, 1, 3), (4, 4, 4), (8, 2, 4), (4, 1, 4)]


def dense_attention(config: ModelConfig, group: CommunicationHandler) -> DenseCausalAttention:
    return DenseCausalAttention(SEQUENCES, config.local_kv_heads(group.world_size))


def check_attention(group: CommunicationHandler, heads: tuple[int, int], bias: bool) -> None:
    config = config_of(heads, bias=bias)
    rotary = RotaryEmbedding(config.head_dim, config.rope, device=CPU, dtype=FLOAT64)

    def build(group: CommunicationHandler) -> ParallelAttention:
        return ParallelAttention(config, 0, group, device=CPU, dtype=FLOAT64)

    def loss(layer: nn.Module, group: CommunicationHandler, x: Tensor) -> Tensor:
        return weighted(layer(x, rotary(POSITIONS), dense_attention(config, group)))

    check_training(group, build, loss, noise(50, NUM_TOKENS, config.hidden_size) / 3)


@pytest.mark.parametrize(("query_heads", "kv_heads", "tp_size"), HEADS)
@pytest.mark.parametrize("bias", [False, True])
def test_attention_learns_as_one_rank_does(query_heads: int, kv_heads: int, tp_size: int, bias: bool) -> None:
    run_on_ranks(check_attention, tp_size, (query_heads, kv_heads), bias)


def check_mlp(group: CommunicationHandler, bias: bool) -> None:
    config = config_of((4, 4), bias=bias)

    def build(group: CommunicationHandler) -> ParallelMLP:
        return ParallelMLP(config, group, device=CPU, dtype=FLOAT64)

    def loss(layer: nn.Module, _group: CommunicationHandler, x: Tensor) -> Tensor:
        return weighted(layer(x))

    check_training(group, build, loss, noise(50, NUM_TOKENS, config.hidden_size) / 3)


@pytest.mark.parametrize("tp_size", [2, 3, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_of_prime_size_learns_as_one_rank_does(tp_size: int, bias: bool) -> None:
    run_on_ranks(check_mlp, tp_size, bias)


def check_block(group: CommunicationHandler, heads: tuple[int, int], bias: bool) -> None:
    config = config_of(heads, bias=bias)
    rotary = RotaryEmbedding(config.head_dim, config.rope, device=CPU, dtype=FLOAT64)

    def build(group: CommunicationHandler) -> TensorParallelTransformerBlock:
        return TensorParallelTransformerBlock(config, 0, group, device=CPU, dtype=FLOAT64)

    def loss(layer: nn.Module, group: CommunicationHandler, x: Tensor) -> Tensor:
        y, residual = layer(x / 2, x / 2, rotary(POSITIONS), dense_attention(config, group))
        return weighted((y + residual) / 10)

    check_training(group, build, loss, noise(50, NUM_TOKENS, config.hidden_size))


@pytest.mark.parametrize(("query_heads", "kv_heads", "tp_size"), HEADS)
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_learns_as_one_rank_does(query_heads: int, kv_heads: int, tp_size: int, bias: bool) -> None:
    run_on_ranks(check_block, tp_size, (query_heads, kv_heads), bias)


def check_model(group: CommunicationHandler, heads: tuple[int, int], tied: bool) -> None:
    config = config_of(heads, bias=False, tied=tied)

    def build(group: CommunicationHandler) -> LlamaForCausalLM:
        return LlamaForCausalLM(config, group, device=CPU, dtype=FLOAT64)

    def loss(model: nn.Module, group: CommunicationHandler, token_ids: Tensor) -> Tensor:
        assert isinstance(model, LlamaForCausalLM)
        hidden = model(token_ids, POSITIONS, dense_attention(config, group))
        logits = gather_from_group(model.compute_logits(hidden), group)[:, : config.vocab_size]
        return F.cross_entropy(logits, token_ids.roll(-1))

    check_training(group, build, loss, torch.arange(NUM_TOKENS) * 7 % config.vocab_size)


@pytest.mark.parametrize(("query_heads", "kv_heads", "tp_size"), [(4, 2, 2), (6, 1, 3), (4, 2, 4)])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_learns_as_one_rank_does(query_heads: int, kv_heads: int, tp_size: int, tied: bool) -> None:
    run_on_ranks(check_model, tp_size, (query_heads, kv_heads), tied)


# --- what layers declare ---------------------------------------------------------------------------------------------


def names_of(config: ModelConfig) -> list[str]:
    model = LlamaForCausalLM(config, CommunicationHandler(CPU), device=CPU, dtype=FLOAT64)
    return [name for name, _, _ in iterate_sharded_parameters(model)]


def test_parameters_are_named_as_in_the_checkpoint() -> None:
    names = names_of(config_of((4, 2), bias=True))
    first_layer = [name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")]
    assert first_layer == [
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        "self_attn.qkv_proj.bias",
        "self_attn.o_proj.weight",
        "self_attn.o_proj.bias",
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        "mlp.gate_up_proj.bias",
        "mlp.down_proj.weight",
        "mlp.down_proj.bias",
    ]
    others = [name for name in names if not name.startswith("model.layers.")]
    assert others == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_a_tied_head_has_no_parameter_of_its_own() -> None:
    assert "lm_head.weight" not in names_of(config_of((4, 2), bias=False, tied=True))


def test_a_parameter_without_a_shard_spec_is_named() -> None:
    model = LlamaForCausalLM(config_of((4, 2), bias=False), CommunicationHandler(CPU), device=CPU, dtype=FLOAT64)
    model.register_parameter("extra", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match="parameter extra declares no ShardSpec"):
        list(iterate_sharded_parameters(model))


def check_heads_are_refused(group: CommunicationHandler) -> None:
    with pytest.raises(ValueError, match="--tensor-parallel-size 2 does not divide the model's 3 attention heads"):
        ParallelAttention(config_of((3, 3), bias=False), 0, group, device=CPU, dtype=FLOAT64)


def test_heads_that_cannot_be_spread_are_refused() -> None:
    run_on_ranks(check_heads_are_refused, 2)

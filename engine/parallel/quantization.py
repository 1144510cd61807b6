"""int8 weights: the matrices of a model as int8 rows, each with a float32 scale."""

import torch
from torch import nn

from engine.parallel.base import ShardSpec
from engine.parallel.embedding import ParallelLMHead, VocabParallelEmbedding
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear

MOST_FEATURES = 2**17  # of a row: the C++ kernels' 32-bit sums of more could overflow

Matrix = ColumnParallelLinear | RowParallelLinear | ParallelLMHead


def quantize_layers(model: nn.Module) -> None:
    """Let all linear layers and the LM head hold int8 matrices W_i = `weight_scale[i] * weight[i]`, without values.

    An embedding that is tied to the LM head reads the same rows; one that is not stays as it is. A row's scale is that
    of all its columns, on whichever ranks they are: so every number of ranks has the same matrix.

    Args:
        model: one rank's, before it is loaded.

    Raises:
        ValueError: when a row is too long.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, Matrix | VocabParallelEmbedding)]
    quantized = {id(layer.weight): _quantized(layer) for layer in layers if isinstance(layer, Matrix)}
    for layer in layers:
        if id(layer.weight) in quantized:
            layer.weight, layer.weight_scale, layer.shard_specs["weight_scale"] = quantized[id(layer.weight)]


def _quantized(layer: Matrix) -> tuple[nn.Parameter, nn.Parameter, ShardSpec]:
    """Return what takes the place of a layer's matrix: int8 rows, their scales, and how the scales are cut."""
    shape, device, spec = layer.weight.shape, layer.weight.device, layer.shard_specs["weight"]
    if shape[1] > MOST_FEATURES:
        raise ValueError(f"--quantization int8: rows of {shape[1]} weights are longer than {MOST_FEATURES}")
    rows = nn.Parameter(torch.empty(shape, device=device, dtype=torch.int8), requires_grad=False)
    scales = nn.Parameter(torch.empty(shape[0], device=device, dtype=torch.float32), requires_grad=False)
    return rows, scales, spec if spec.dim == 0 else ShardSpec()

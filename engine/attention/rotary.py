"""Rotary position embedding (Su et al., 2021, arXiv 2104.09864), in the half-split layout of Hugging Face's Llamas."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from engine.protocol.model_config import RopeConfig


class Rotation(NamedTuple):
    """The angles of a step's tokens: cosine and sine, each `[num_tokens, 1, head_dim]`, broadcast over the heads."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding:
    """Turns positions into rotations. Angles are computed in float32, whatever the model's type.

    Args:
        head_dim: width of a head; even.
        config: the base, and how it is stretched.
        device: where positions lie.
        dtype: of the rotations returned.
    """

    def __init__(self, head_dim: int, config: RopeConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self._frequencies = inverse_frequencies(head_dim, config).repeat(2).to(device)
        self._dtype = dtype

    def __call__(self, positions: Tensor) -> Rotation:
        """Return the rotations of `positions` `[num_tokens]`."""
        angles = positions[:, None, None].float() * self._frequencies
        return Rotation(angles.cos().to(self._dtype), angles.sin().to(self._dtype))


def inverse_frequencies(head_dim: int, config: RopeConfig) -> Tensor:
    """Return radians a position for each pair of features, `[head_dim / 2]` float32, fastest first.

    `linear` divides all by `factor`. `llama3` leaves waves that turn often within the original context, divides those
    that do not by `factor`, and blends in between (Llama 3.1's `apply_scaling`).
    """
    frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "llama3":
        return _blend_by_wavelength(frequencies, config)
    return frequencies


def _blend_by_wavelength(frequencies: Tensor, config: RopeConfig) -> Tensor:
    context, low, high = config.original_max_position_embeddings, config.low_freq_factor, config.high_freq_factor
    turns = context / (2 * math.pi / frequencies)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.factor + kept * frequencies


class RotatedHeads(NamedTuple):
    """What attention is computed from: `[num_tokens, n, head_dim]` each, with n heads, and twice n KV heads."""

    query: Tensor
    key: Tensor
    value: Tensor


def rotate_heads(heads: Tensor, rotation: Rotation, num_kv_heads: int) -> RotatedHeads:
    """Cut `heads`, see `engine.attention.base.Attention`, and rotate what has to be rotated."""
    query, key, value = torch.split(heads, [heads.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return RotatedHeads(rotate(query, rotation), rotate(key, rotation), value)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate feature i of each head `[num_tokens, num_heads, head_dim]` against feature i + head_dim / 2."""
    first, second = x.chunk(2, -1)
    return x * rotation.cos + torch.cat((-second, first), -1) * rotation.sin

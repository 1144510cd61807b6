"""Random checkpoints of each architecture: real Hugging Face directories, written by transformers."""

import math
import random
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# (query heads, KV heads): between them every kind of sharing, and every tensor-parallel size up to 4.
HEADS = ((12, 4), (4, 2), (6, 3), (4, 1), (12, 12), (8, 2), (6, 1), (3, 3))
MAX_POSITIONS = 512


def random_llama(directory: Path, seed: int, **overrides: Any) -> Path:
    """Write a small float32 Llama whose shape and weights follow from `seed`, and return its directory.

    Sizes are odd or prime where they may be. Eight consecutive seeds cover all of `HEADS`, three all rope types, two
    tied and untied embeddings; biases, sizes and the number of layers are drawn. The logits depend strongly on the
    whole context, so greedy texts vary.

    Args:
        directory: made if it is not there.
        seed: of shape and weights.
        overrides: fields of LlamaConfig that are not to be drawn.
    """
    return _write(LlamaForCausalLM(LlamaConfig(**{**_draw_shape(seed), **overrides})), directory, seed)


def random_mistral(directory: Path, seed: int, **overrides: Any) -> Path:
    """Write a Mistral as `random_llama` writes a Llama, without a sliding window and without biases.

    `attention_bias` and `mlp_bias` are in its `config.json`, where Mistral has no use for them.
    """
    shape = {**_draw_shape(seed), "sliding_window": None}
    return _write(MistralForCausalLM(MistralConfig(**{**shape, **overrides})), directory, seed)


def random_qwen2(directory: Path, seed: int, **overrides: Any) -> Path:
    """Write a Qwen2 as `random_llama` writes a Llama, with biases of q, k and v.

    `attention_bias` and `mlp_bias` are in its `config.json`, where Qwen2 has no use for them.
    """
    return _write(Qwen2ForCausalLM(Qwen2Config(**{**_draw_shape(seed), **overrides})), directory, seed)


def _write(model: PreTrainedModel, directory: Path, seed: int) -> Path:
    _draw_weights(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    return directory


def _draw_shape(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    heads, kv_heads = HEADS[seed % len(HEADS)]
    return {
        "vocab_size": draw.choice((101, 257, 499, 1009)),
        "hidden_size": heads * draw.choice((3, 7, 11)),
        "intermediate_size": draw.choice((37, 61, 97, 131)),
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw.choice((4, 6, 10, 16)),
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": draw.choice((1e-5, 1e-6)),
        "rope_parameters": _draw_rope(seed),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tie_word_embeddings": seed % 2 == 1,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _draw_rope(seed: int) -> dict[str, Any]:
    default = {"rope_type": "default", "rope_theta": 10000.0}
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return (llama3, default, linear)[seed % 3]


def _draw_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw weights of a scale at which each layer changes the residual stream more than the token before did."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.3 * noise + (1 if "norm" in name else 0))
            elif "embed_tokens" in name:
                parameter.copy_(noise / math.sqrt(parameter.shape[1]))
            else:
                parameter.copy_(2 * noise / math.sqrt(parameter.shape[1]))

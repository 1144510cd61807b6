"""Shapes of well-known models, as `config.json` has them: for checkpoints of random weights, and for arithmetic."""

from typing import Any

from engine.protocol.model_config import ModelConfig


def _llama(
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    intermediate_size: int,
    vocab_size: int,
    tie_word_embeddings: bool = False,
    max_position_embeddings: int = 4096,
    rope_theta: float = 10000.0,
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tie_word_embeddings,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def raw_configs() -> dict[str, dict[str, Any]]:
    """Return what `config.json` holds, by the shape's name; all are bfloat16."""
    return {
        "1b": _llama(
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            vocab_size=128256,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            rope_theta=500000.0,
        ),
        "7b": _llama(
            hidden_size=4096,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            intermediate_size=11008,
            vocab_size=32000,
        ),
        "13b": _llama(
            hidden_size=5120,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=40,
            head_dim=128,
            intermediate_size=13824,
            vocab_size=32000,
        ),
        "70b": _llama(
            hidden_size=8192,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=28672,
            vocab_size=32000,
        ),
    }


def shape(name: str) -> ModelConfig:
    """Return one of them as the layers take it."""
    return ModelConfig.from_object(raw_configs()[name], f"shape {name}")

"""A small model's configuration, for tests that need no checkpoint."""

from typing import Any

from engine.protocol.model_config import ModelConfig, RopeConfig


def model_config(**fields: Any) -> ModelConfig:
    """Return the configuration of a small Llama, with these fields instead of its own."""
    own: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope": RopeConfig(),
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return ModelConfig(**{**own, **fields})

"""What `config.json` says of a model, read without torch, in the spelling of published models and of transformers 5."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.protocol.model_directory import read_model_config

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")  # that engine.models computes
# What transformers takes where config.json leaves a field out.
MAX_POSITIONS = {"LlamaForCausalLM": 2048, "MistralForCausalLM": 131072, "Qwen2ForCausalLM": 32768}
MISTRAL_SLIDING_WINDOW = 4096
# Rope types of `rope_scaling` / `rope_parameters` that the engine computes.
ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SIZE = 2**31 - 1  # of any one dimension; beyond it a file is broken or hostile
LARGEST_NUMBER = 1e30  # of any number that is no size; keeps infinity, and arithmetic that ends in it, out
MOST_RANKS = 1024  # of which possible numbers are listed


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions: the base `theta` and how it is stretched."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position_embeddings: int = 8192  # llama3


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one model."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    dtype: str  # of the checkpoint: one of DTYPES
    sliding_window: int | None = None  # how many tokens attention sees, if not all

    @property
    def longest_context(self) -> int:
        """How many tokens are computed exactly: as many as there are positions, or as fit into one sliding window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    @classmethod
    def from_directory(cls, model: str | Path) -> "ModelConfig":
        """Read the configuration of the model in a directory: `config.json`, or what stands for it in `metadata.json`.

        Raises:
            ValueError: naming the file, or the field in it, that cannot be used.
        """
        raw, source = read_model_config(Path(model))
        return cls.from_object(raw, source)

    @classmethod
    def from_object(cls, raw: dict[str, Any], source: str) -> "ModelConfig":
        """Take what a `config.json` holds; errors say that it stands in `source`.

        Raises:
            ValueError: naming the field that cannot be used.
        """
        return _parse(raw, source)

    @property
    def tensor_parallel_sizes(self) -> list[int]:
        """The numbers of ranks that the model can be split over."""
        return [n for n in range(1, min(self.num_attention_heads, MOST_RANKS) + 1) if self._splits_over(n)]

    def check_tensor_parallel_size(self, tp_size: int) -> None:
        """Raise ValueError if the model cannot be split over `tp_size` ranks."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self._splits_over(tp_size):
            return
        possible = ", ".join(map(str, self.tensor_parallel_sizes))
        if heads % tp_size:
            problem = f"does not divide the model's {heads} attention heads"
        else:
            problem = f"and the model's {kv_heads} key-value heads: one must divide the other"
        raise ValueError(f"--tensor-parallel-size {tp_size} {problem}; possible: {possible}")

    def local_kv_heads(self, tp_size: int) -> int:
        """Return how many key-value heads each of `tp_size` ranks holds: its share, or one that several ranks hold."""
        return max(1, self.num_key_value_heads // tp_size)

    def check_max_model_len(self, max_model_len: int | None) -> None:
        """Raise ValueError if that is more than the model's longest context; None is whatever that is."""
        longest = self.longest_context
        if max_model_len is not None and max_model_len > longest:
            bound = "max_position_embeddings" if longest == self.max_position_embeddings else "sliding_window"
            raise ValueError(f"--max-model-len {max_model_len} is more than the model's {bound}, {longest}")

    def _splits_over(self, tp_size: int) -> bool:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        return heads % tp_size == 0 and (kv_heads % tp_size == 0 or tp_size % kv_heads == 0)


class _Fields:
    """Reads typed fields of one JSON object and names them in errors."""

    def __init__(self, raw: dict[str, Any], path: str, prefix: str = "") -> None:
        self._raw, self._path, self._prefix = raw, path, prefix

    def error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self._path}: {self._prefix}{name} {problem}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._raw.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST_SIZE:
            raise self.error(name, f"must be a whole number from 1 to {LARGEST_SIZE}, not {value!r}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._raw.get(name)
        value = default if value is None else value
        if value is None:
            raise self.error(name, "is missing")
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= LARGEST_NUMBER:
            raise self.error(name, f"must be a positive number, not {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._raw.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {value!r}")
        return value


def _parse(raw: dict[str, Any], path: str) -> ModelConfig:
    get = _Fields(raw, path)
    architecture = _parse_architecture(raw, get)
    _refuse_what_is_not_computed(raw, get)
    hidden_size = get.integer("hidden_size")
    heads = get.integer("num_attention_heads")
    kv_heads = get.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise get.error("num_key_value_heads", f"({kv_heads}) does not divide num_attention_heads ({heads})")
    max_positions = get.integer("max_position_embeddings", MAX_POSITIONS[architecture])
    qkv_bias, o_bias, mlp_bias = _parse_biases(architecture, get)
    return ModelConfig(
        architecture=architecture,
        vocab_size=get.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=get.integer("intermediate_size"),
        num_hidden_layers=get.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_parse_head_dim(raw, get, hidden_size, heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=get.number("rms_norm_eps", 1e-6),
        rope=_parse_rope(raw, path, max_positions),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        tie_word_embeddings=get.flag("tie_word_embeddings", False),
        dtype=_parse_dtype(raw, get),
        sliding_window=_parse_sliding_window(architecture, raw, get),
    )


def _parse_architecture(raw: dict[str, Any], get: _Fields) -> str:
    names = raw.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise get.error("architectures", "must be a list with the model class's name")
    if names[0] not in ARCHITECTURES:
        raise get.error("architectures", f"names {names[0]}, which is not known; known: {', '.join(ARCHITECTURES)}")
    return names[0]


def _refuse_what_is_not_computed(raw: dict[str, Any], get: _Fields) -> None:
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise get.error("hidden_act", f"is {raw['hidden_act']!r}; only silu is computed")
    if raw.get("quantization_config"):
        raise get.error("quantization_config", "is set; quantized checkpoints are not read")
    if get.flag("use_sliding_window", False):
        raise get.error("use_sliding_window", "is true; sliding windows are not computed")


def _parse_biases(architecture: str, get: _Fields) -> tuple[bool, bool, bool]:
    """Whether q, k and v, the attention's output, and the MLP have biases. Only Llama's config.json chooses."""
    if architecture == "LlamaForCausalLM":
        attention_bias = get.flag("attention_bias", False)
        return attention_bias, attention_bias, get.flag("mlp_bias", False)
    return architecture == "Qwen2ForCausalLM", False, False


def _parse_sliding_window(architecture: str, raw: dict[str, Any], get: _Fields) -> int | None:
    """Mistral's window; null is none. Qwen2 has one only with `use_sliding_window`, Llama never."""
    if architecture != "MistralForCausalLM" or raw.get("sliding_window", MISTRAL_SLIDING_WINDOW) is None:
        return None
    return get.integer("sliding_window", MISTRAL_SLIDING_WINDOW)


def _parse_head_dim(raw: dict[str, Any], get: _Fields, hidden_size: int, heads: int) -> int:
    if raw.get("head_dim") is None and hidden_size % heads:
        raise get.error("hidden_size", f"({hidden_size}) is no multiple of num_attention_heads ({heads})")
    head_dim = get.integer("head_dim", hidden_size // heads)
    if head_dim % 2:
        raise get.error("head_dim", f"must be even for rotary positions, not {head_dim}")
    return head_dim


def _parse_dtype(raw: dict[str, Any], get: _Fields) -> str:
    """`dtype` (transformers 5) or `torch_dtype` (published models); float32 where neither is written."""
    name = "dtype" if raw.get("dtype") is not None else "torch_dtype"
    value = raw.get(name) or "float32"
    value = value.removeprefix("torch.") if isinstance(value, str) else value
    if value not in DTYPES:
        raise get.error(name, f"must be one of {', '.join(DTYPES)}, not {value!r}")
    return str(value)


def _parse_rope(raw: dict[str, Any], path: str, max_positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (published models).

    What each field falls back to, and which of two spellings wins, is what transformers does.
    """
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    section = raw.get(name) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{path}: {name} must be an object, not {section!r}")
    model, get = _Fields(raw, path), _Fields(section, path, f"{name}.")
    rope_type = section.get("rope_type", section.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise get.error("rope_type", f"is {rope_type!r}; known: {', '.join(ROPE_TYPES)}")
    theta = get.number("rope_theta", model.number("rope_theta", 10000.0))
    for fields in (model, get):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor", "is set; only whole heads are rotated")
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(theta=theta, rope_type="linear", factor=get.number("factor"))
    return _parse_llama3(model, get, theta, max_positions)


def _parse_llama3(model: _Fields, get: _Fields, theta: float, max_positions: int) -> RopeConfig:
    low, high = get.number("low_freq_factor"), get.number("high_freq_factor")
    if high <= low:
        raise get.error("high_freq_factor", f"({high}) must be larger than low_freq_factor ({low})")
    original = get.integer("original_max_position_embeddings", max_positions)
    return RopeConfig(
        theta=theta,
        rope_type="llama3",
        factor=get.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=model.integer("original_max_position_embeddings", original),
    )

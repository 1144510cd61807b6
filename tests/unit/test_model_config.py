"""config.json: read as transformers reads it, in old and new spelling, and refused where it cannot be right."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from engine.protocol.model_config import ModelConfig, RopeConfig

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA3_FIELDS = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 4096,
}
LLAMA3 = {"rope_type": "llama3", **LLAMA3_FIELDS}
# What files of published models and of transformers 5 add to the minimum.
SPELLINGS: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "Llama 2": {"rope_scaling": None, "torch_dtype": "float16", "rms_norm_eps": 1e-05, "max_position_embeddings": 4096},
    "Llama 3.1": {"rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16", "num_key_value_heads": 4},
    "Llama 3.2": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "tie_word_embeddings": True, "head_dim": 32},
    "linear, first spelling": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 20000},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4}, "max_position_embeddings": 16384},
    "transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "bfloat16"},
    "transformers 5, Llama 3": {"rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "dtype": "float32"},
    "transformers 5, linear": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}},
    "theta beside rope_parameters": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 30000.0},
    "both spellings of the rope": {
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"},
        "rope_scaling": LLAMA3,
    },
    "no original length": {
        "rope_scaling": {name: value for name, value in LLAMA3.items() if not name.startswith("original")},
        "max_position_embeddings": 1234,
    },
    "nulls": {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None, "quantization_config": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "more heads than hidden_size has room for": {"head_dim": 10, "num_key_value_heads": 1},
}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
# What files of other architectures add to the minimum.
OTHERS: dict[str, dict[str, Any]] = {
    "Mistral, nothing more": MISTRAL,
    "Mistral 7B 0.1": {**MISTRAL, "sliding_window": 4096, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05},
    "Mistral 7B 0.3": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6, "torch_dtype": "bfloat16"},
    "Qwen2, nothing more": QWEN2,
    "Qwen2.5": {**QWEN2, "use_sliding_window": False, "sliding_window": 131072, "rope_theta": 1e6, "dtype": "bfloat16"},
    "Qwen2, tied": {**QWEN2, "tie_word_embeddings": True, "max_position_embeddings": 131072, "sliding_window": None},
}
READ_ALIKE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def write(directory: Path, config: object) -> Path:
    path = directory / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def read(directory: Path, **fields: Any) -> ModelConfig:
    write(directory, {**MINIMAL, **fields})
    return ModelConfig.from_directory(directory)


def error_of(directory: Path, **fields: Any) -> str:
    """Return the error's text after the file's name."""
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read(directory, **fields)
    message, prefix = str(caught.value), f"{directory / 'config.json'}: "
    assert message.startswith(prefix)
    assert "\n" not in message
    return message.removeprefix(prefix)


def rope_of(reference: PreTrainedConfig) -> RopeConfig:
    fields = dict(reference.rope_parameters or {})
    for derived in ("type", "rope_type", "rope_theta"):
        fields.pop(derived, None)
    parameters = reference.rope_parameters
    assert parameters is not None
    return RopeConfig(theta=parameters["rope_theta"], rope_type=parameters["rope_type"], **fields)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_transformers_reads_it(tmp_path: Path, spelling: str) -> None:
    ours = read(tmp_path, **SPELLINGS[spelling])
    reference = LlamaConfig.from_pretrained(tmp_path)
    for name in (*READ_ALIKE, "head_dim", "mlp_bias"):
        assert getattr(ours, name) == getattr(reference, name), name
    assert ours.qkv_bias == ours.o_bias == reference.attention_bias
    assert ours.sliding_window is None
    assert ours.dtype == str(reference.dtype or "float32").removeprefix("torch.")
    assert ours.rope == rope_of(reference)
    assert ours.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize("file", OTHERS)
def test_files_of_other_architectures_are_read_as_transformers_reads_them(tmp_path: Path, file: str) -> None:
    ours = read(tmp_path, **OTHERS[file])
    reference = AutoConfig.from_pretrained(tmp_path)
    for name in (*READ_ALIKE, "sliding_window"):
        assert getattr(ours, name) == getattr(reference, name), name
    assert ours.head_dim == 8
    assert ours.dtype == str(reference.dtype or "float32").removeprefix("torch.")
    assert ours.rope == rope_of(reference)


@pytest.mark.parametrize(("family", "qkv_bias"), [(MISTRAL, False), (QWEN2, True)])
@pytest.mark.parametrize("written", [False, True])
def test_biases_of_other_architectures_are_not_config_jsons_to_choose(
    tmp_path: Path, family: dict[str, Any], qkv_bias: bool, written: bool
) -> None:
    config = read(tmp_path, **family, attention_bias=written, mlp_bias=written)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == (qkv_bias, False, False)


def test_llama_has_no_sliding_window_whatever_its_file_says(tmp_path: Path) -> None:
    assert read(tmp_path, sliding_window=4096, use_sliding_window=False) == read(tmp_path)


def test_what_transformers_writes_is_read_back(tmp_path: Path) -> None:
    reference = LlamaConfig(**{**MINIMAL, "rope_parameters": {"rope_theta": 5e5, **LLAMA3}, "dtype": "bfloat16"})
    reference.save_pretrained(tmp_path)
    ours = ModelConfig.from_directory(tmp_path)
    assert ours.rope == RopeConfig(theta=5e5, rope_type="llama3", **LLAMA3_FIELDS)  # type: ignore[arg-type]
    assert ours.dtype == "bfloat16"
    assert ours.head_dim == 8


def test_a_null_switch_is_off(tmp_path: Path) -> None:
    config = read(tmp_path, attention_bias=None, mlp_bias=None, tie_word_embeddings=None)
    assert not config.qkv_bias
    assert not config.o_bias
    assert not config.mlp_bias
    assert not config.tie_word_embeddings


def test_fields_that_the_engine_does_not_know_are_passed_over(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=[1, 2], use_cache=True, pretraining_tp=1) == read(tmp_path)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_path_that_is_no_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: .*nowhere is not a directory"):
        ModelConfig.from_directory(tmp_path / "nowhere")


def test_a_directory_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: .* has no config\.json"):
        ModelConfig.from_directory(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["", "{", '{"vocab_size": }', "\x00", "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"]
)
def test_a_file_that_is_no_json_is_named(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="cannot be read as JSON") as caught:
        ModelConfig.from_directory(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"text"'])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, text)
    with pytest.raises(ValueError, match=r"config\.json: holds no JSON object"):
        ModelConfig.from_directory(tmp_path)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, True, False, "64", [64], 2**31, 10**300])
def test_a_size_that_is_no_positive_whole_number_is_refused(tmp_path: Path, field: str, value: object) -> None:
    assert error_of(tmp_path, **{field: value}).startswith(f"{field} must be a whole number from 1 to 2147483647, not ")


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"])
def test_other_whole_numbers_are_checked_alike(tmp_path: Path, field: str) -> None:
    assert error_of(tmp_path, **{field: 0}) == f"{field} must be a whole number from 1 to 2147483647, not 0"


@pytest.mark.parametrize("field", [name for name in MINIMAL if name not in ("architectures", "model_type")])
def test_a_missing_size_is_named(tmp_path: Path, field: str) -> None:
    assert error_of(tmp_path, **{field: None}) == f"{field} is missing"


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [0, -1e-6, float("nan"), float("inf"), 10**400, True, "1e-6", []])
def test_a_number_that_is_not_positive_and_finite_is_refused(tmp_path: Path, field: str, value: object) -> None:
    assert error_of(tmp_path, **{field: value}).startswith(f"{field} must be a positive number, not ")


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "tie_word_embeddings"])
@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_a_switch_that_is_no_boolean_is_refused(tmp_path: Path, field: str, value: object) -> None:
    assert error_of(tmp_path, **{field: value}) == f"{field} must be true or false, not {value!r}"


def test_an_unknown_architecture_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    assert (
        error_of(tmp_path, architectures=["NobodyForCausalLM"])
        == "architectures names NobodyForCausalLM, which is not known; "
        "known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM"
    )


@pytest.mark.parametrize("value", [None, [], "LlamaForCausalLM", [3], {}])
def test_architectures_must_name_a_class(tmp_path: Path, value: object) -> None:
    assert error_of(tmp_path, architectures=value) == "architectures must be a list with the model class's name"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only silu is computed"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set; quantized checkpoints are not read"),
        ({**QWEN2, "use_sliding_window": True}, "use_sliding_window is true; sliding windows are not computed"),
        ({**QWEN2, "use_sliding_window": 1}, "use_sliding_window must be true or false, not 1"),
        ({**MISTRAL, "sliding_window": 0}, "sliding_window must be a whole number from 1 to 2147483647, not 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads (3) does not divide num_attention_heads (8)"),
        ({"num_key_value_heads": 16}, "num_key_value_heads (16) does not divide num_attention_heads (8)"),
        ({"hidden_size": 65}, "hidden_size (65) is no multiple of num_attention_heads (8)"),
        ({"hidden_size": 72}, "head_dim must be even for rotary positions, not 9"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, not 7"),
        ({"torch_dtype": "int8"}, "torch_dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ({"dtype": ["bfloat16"]}, "dtype must be one of float32, bfloat16, float16, not ['bfloat16']"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object, not [1]"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.rope_type is 'yarn'; known: default, linear, llama3"),
        ({"rope_parameters": {"rope_type": {}}}, "rope_parameters.rope_type is {}; known: default, linear, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor must be a positive number, not 0"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta must be a positive number, not -1"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "rope_scaling.low_freq_factor is missing"),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}},
            "rope_scaling.high_freq_factor (1.0) must be larger than low_freq_factor (1.0)",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is set; only whole heads are rotated"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "rope_parameters.partial_rotary_factor is set; only whole heads are rotated",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    assert error_of(tmp_path, **fields) == message


# --- context ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "longest", "bound"),
    [
        (None, 100, "max_position_embeddings"),
        (99, 99, "sliding_window"),
        (100, 100, "max_position_embeddings"),
        (101, 100, "max_position_embeddings"),
    ],
)
def test_a_context_ends_where_the_positions_or_the_sliding_window_do(
    tmp_path: Path, window: int | None, longest: int, bound: str
) -> None:
    config = read(tmp_path, **MISTRAL, max_position_embeddings=100, sliding_window=window)
    assert config.longest_context == longest
    config.check_max_model_len(None)
    config.check_max_model_len(longest)
    with pytest.raises(ValueError, match=f" {longest + 1} is more than the model's {bound}, {longest}$"):
        config.check_max_model_len(longest + 1)


# --- tensor parallelism ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "kv_heads", "possible"),
    [(8, 8, (1, 2, 4, 8)), (8, 2, (1, 2, 4, 8)), (8, 1, (1, 2, 4, 8)), (12, 4, (1, 2, 4, 12)), (6, 3, (1, 3, 6))],
)
def test_ranks_must_divide_the_heads_and_divide_or_be_divided_by_the_kv_heads(
    tmp_path: Path, heads: int, kv_heads: int, possible: tuple[int, ...]
) -> None:
    config = read(tmp_path, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=8)
    for size in range(1, 2 * heads + 1):
        if size in possible:
            config.check_tensor_parallel_size(size)
        else:
            with pytest.raises(ValueError, match=rf"^--tensor-parallel-size {size} .*possible: ") as caught:
                config.check_tensor_parallel_size(size)
            assert str(caught.value).endswith(f"possible: {', '.join(map(str, possible))}")


def test_the_reason_why_ranks_do_not_fit_is_given(tmp_path: Path) -> None:
    config = read(tmp_path, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    with pytest.raises(ValueError, match="5 does not divide the model's 12 attention heads"):
        config.check_tensor_parallel_size(5)
    with pytest.raises(ValueError, match="3 and the model's 4 key-value heads: one must divide the other"):
        config.check_tensor_parallel_size(3)

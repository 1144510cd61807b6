"""Loading a Hugging Face directory into the shards of every rank, and every way in which a directory can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.checkpoint.distributor import WeightDistributor
from engine.checkpoint.fingerprint import fingerprint
from engine.checkpoint.huggingface import INDEX_FILE, SINGLE_FILE, HuggingFaceFiles
from engine.checkpoint.problems import header_problems, value_problems
from engine.checkpoint.staging import Stager
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.parallel.base import ShardSpec, TensorParallelLayer, split_evenly
from engine.protocol.model_config import ModelConfig
from tests.checkpoints import random_llama

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"


def load(model: nn.Module, directory: Path, rank: int, size: int) -> int:
    """Fill a rank's model and return the bytes that were read."""
    with HuggingFaceFiles(directory) as files:
        WeightDistributor(rank, size, Stager(CPU)).fill(model, files)
        return files.bytes_read


def rank_of(rank: int, size: int) -> CommunicationHandler:
    return CommunicationHandler.place(rank, size, CPU)


def empty_shard(directory: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A rank's model in which every number that loading does not write is NaN."""
    model = build_model(ModelConfig.from_directory(directory), rank_of(rank, size), device=CPU, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


def loaded_shard(
    directory: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    model = empty_shard(directory, rank, size, dtype)
    assert problems_of(directory, dtype) == []
    load(model, directory, rank, size)
    return {name: parameter.data for name, parameter in model.named_parameters()}


def padded_run(tensor: Tensor, dim: int, rank: int, num_runs: int) -> Tensor:
    """Run `rank` of `num_runs` equal ones along `dim`, zero-padded; by slicing, not by what the engine declares."""
    length = -(-tensor.shape[dim] // num_runs)
    shape = list(tensor.shape)
    shape[dim] = length * num_runs
    padded = torch.zeros(shape)
    padded.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return padded.narrow(dim, rank * length, length)


def expected_shard(tensors: dict[str, Tensor], rank: int, size: int, kv_heads: int) -> dict[str, Tensor]:
    """What a rank must hold, written down name by name."""

    def columns(name: str) -> Tensor:
        return padded_run(tensors[name], 0, rank, size)

    def kv_columns(name: str) -> Tensor:
        runs = min(kv_heads, size)
        return padded_run(tensors[name], 0, rank * runs // size, runs)

    shard: dict[str, Tensor] = {
        name: columns(name) for name in ("model.embed_tokens.weight", "lm_head.weight") if name in tensors
    }
    shard["model.norm.weight"] = tensors["model.norm.weight"]
    for layer in ("model.layers.0", "model.layers.1"):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shard[f"{layer}.{norm}.weight"] = tensors[f"{layer}.{norm}.weight"]
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        for kind in ("weight", "bias"):
            kv = [kv_columns(f"{attention}.{part}.{kind}") for part in ("k_proj", "v_proj")]
            shard[f"{attention}.qkv_proj.{kind}"] = torch.cat([columns(f"{attention}.q_proj.{kind}"), *kv])
            gate_up = [columns(f"{mlp}.{part}.{kind}") for part in ("gate_proj", "up_proj")]
            shard[f"{mlp}.gate_up_proj.{kind}"] = torch.cat(gate_up)
        shard[f"{attention}.o_proj.weight"] = padded_run(tensors[f"{attention}.o_proj.weight"], 1, rank, size)
        shard[f"{mlp}.down_proj.weight"] = padded_run(tensors[f"{mlp}.down_proj.weight"], 1, rank, size)
        for name in (f"{attention}.o_proj.bias", f"{mlp}.down_proj.bias"):
            shard[name] = tensors[name]
    return shard


def assert_same(shard: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert shard.keys() == expected.keys()
    for name, tensor in shard.items():
        assert torch.equal(tensor, expected[name]), name


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE_FILE)


def split_into_files(directory: Path, num_files: int) -> dict[str, str]:
    """Turn a single-file checkpoint into a sharded one with its tensors dealt out in turn; return the weight map."""
    tensors = load_file(directory / SINGLE_FILE)
    (directory / SINGLE_FILE).unlink()
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    weight_map = {name: files[i % num_files] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, directory / file)
    write_index(directory, {"metadata": {}, "weight_map": weight_map})
    return weight_map


def write_index(directory: Path, index: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps(index))


def error_of(directory: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load(empty_shard(directory, rank, size, dtype), directory, rank, size)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in problems_of(directory, dtype)  # told beforehand, too
    return str(caught.value)


def problems_of(directory: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    """Return what is wrong with a directory, found without loading it."""
    config = ModelConfig.from_directory(directory)
    model = build_model(config, rank_of(0, 1), device=torch.device("meta"), dtype=dtype)
    try:
        with HuggingFaceFiles(directory) as files:
            return list(header_problems(model, files)) or list(value_problems(model, files))
    except ValueError as error:
        return [str(error)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return random_llama(tmp_path / "model", seed=1, **SHAPE)


# --- what is loaded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_rank_holds_its_runs_replicas_and_padding(directory: Path, size: int) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    for rank in range(size):
        assert_same(loaded_shard(directory, rank, size), expected_shard(tensors, rank, size, kv_heads=2))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_sharded_checkpoint_loads_as_the_single_file_does(directory: Path, size: int) -> None:
    single = [loaded_shard(directory, rank, size) for rank in range(size)]
    split_into_files(directory, 3)
    for rank in range(size):
        assert_same(loaded_shard(directory, rank, size), single[rank])


def test_sizes_that_leave_ranks_without_any_rows_load(tmp_path: Path) -> None:
    """Nine rows over eight ranks are two each: ranks 5 to 7 hold nothing but padding."""
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "vocab_size": 9, "intermediate_size": 9})
    tensors = load_file(directory / SINGLE_FILE)
    for rank in range(8):
        assert_same(loaded_shard(directory, rank, 8), expected_shard(tensors, rank, 8, kv_heads=2))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_take_the_type_of_the_parameter(directory: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    rewrite(directory, lambda tensors: tensors.update({name: t.to(stored) for name, t in tensors.items()}))
    source = load_file(directory / SINGLE_FILE)["model.norm.weight"]
    norm = loaded_shard(directory, 1, 2, wanted)["model.norm.weight"]
    assert norm.dtype == wanted
    assert torch.equal(norm, source.to(wanted))


def test_the_single_file_wins_over_an_index(directory: Path) -> None:
    before = loaded_shard(directory)
    write_index(directory, {"weight_map": {"model.norm.weight": "elsewhere.safetensors"}})
    assert_same(loaded_shard(directory), before)


def test_tied_embeddings_load_once_and_stay_tied(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "tie_word_embeddings": True})
    tensors = load_file(directory / SINGLE_FILE)
    assert "lm_head.weight" not in tensors
    model = empty_shard(directory, 1, 2)
    load(model, directory, 1, 2)
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    expected = padded_run(tensors["model.embed_tokens.weight"], 0, 1, 2)
    assert torch.equal(model.get_parameter("lm_head.weight").data, expected)


def test_a_tied_head_may_be_stored_too_or_alone(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "tie_word_embeddings": True})
    before = loaded_shard(directory, 1, 2)
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert_same(loaded_shard(directory, 1, 2), before)
    rewrite(directory, lambda t: t.pop("model.embed_tokens.weight"))
    assert_same(loaded_shard(directory, 1, 2), before)


def test_names_may_lack_the_prefix_of_a_model_with_a_head(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "tie_word_embeddings": True})
    before = loaded_shard(directory, 1, 2)
    tensors = {name.removeprefix("model."): t for name, t in load_file(directory / SINGLE_FILE).items()}
    save_file(tensors, directory / SINGLE_FILE)
    assert_same(loaded_shard(directory, 1, 2), before)


def test_rotary_frequencies_in_the_file_are_passed_over(directory: Path) -> None:
    before = loaded_shard(directory)
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    assert_same(loaded_shard(directory), before)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_rank_reads_as_many_bytes_as_its_shard_has_without_padding(directory: Path, size: int) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    for rank in range(size):
        bytes_read = load(empty_shard(directory, rank, size), directory, rank, size)
        ones = {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
        used = sum(int(t.sum()) for t in expected_shard(ones, rank, size, kv_heads=2).values())
        assert bytes_read == 4 * used


def test_tied_embeddings_are_read_once(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "tie_word_embeddings": True})
    stored = load_file(directory / SINGLE_FILE)
    assert load(empty_shard(directory), directory, 0, 1) == sum(tensor.nbytes for tensor in stored.values())


class Rows(TensorParallelLayer):
    """A float16 matrix, cut by rows."""

    def __init__(self, group: CommunicationHandler, rows: int, columns: int) -> None:
        super().__init__(group)
        part = split_evenly(rows, group.world_size)
        self.shard_specs["weight"] = ShardSpec(0, (part,))
        self.weight = nn.Parameter(torch.empty(part.local_size, columns, dtype=torch.float16))


def test_the_other_ranks_rows_never_come_into_memory(tmp_path: Path) -> None:
    """Of a 512 MiB file, which is one hole on the disk, a rank of 64 brings in less than a quarter."""
    rows, columns, size = 1 << 16, 1 << 12, 64
    nbytes = rows * columns * 2
    header = json.dumps({"weight": {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, nbytes]}}).encode()
    with (tmp_path / SINGLE_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)
    layer = Rows(rank_of(40, size), rows, columns)
    before = resident_bytes()
    load(layer, tmp_path, 40, size)
    assert peak_resident_bytes() - before < nbytes // 4
    assert int(layer.weight.count_nonzero()) == 0


def resident_bytes() -> int:
    """Resident memory now; the peak starts anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_resident_bytes() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / SINGLE_FILE).rename(directory / "pytorch_model.bin")
    assert error_of(directory) == f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; no other weights are read"


def test_a_missing_tensor_is_named(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop(Q_PROJ))
    assert error_of(directory) == f"{directory / SINGLE_FILE}: tensor {Q_PROJ} is missing"


def test_a_missing_head_of_an_untied_model_is_named(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert error_of(directory) == f"{directory / SINGLE_FILE}: tensor lm_head.weight is missing"


@pytest.mark.parametrize("shape", [(48, 23), (47, 24), (48, 24, 1), (48 * 24,), (24, 48)])
def test_a_wrong_shape_is_named_with_both_shapes(directory: Path, shape: tuple[int, ...]) -> None:
    rewrite(directory, lambda tensors: tensors.update({Q_PROJ: torch.zeros(shape)}))
    assert error_of(directory, 1, 2) == (
        f"{directory / SINGLE_FILE}: tensor {Q_PROJ} has shape {list(shape)}, but config.json asks for [48, 24]"
    )


def test_a_wrong_shape_is_found_by_ranks_that_hold_none_of_it(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "intermediate_size": 9})
    rewrite(directory, lambda tensors: tensors.update({DOWN_PROJ: torch.zeros(24, 10)}))
    for rank in range(8):
        assert f"tensor {DOWN_PROJ} has shape [24, 10]" in error_of(directory, rank, 8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_a_type_that_is_not_read_is_named(directory: Path, dtype: torch.dtype) -> None:
    rewrite(directory, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    message = error_of(directory)
    assert message.startswith(f"{directory / SINGLE_FILE}: tensor {Q_PROJ} is of type ")
    assert message.endswith("; read are F32, BF16, F16")


def test_values_that_float16_cannot_hold_are_refused(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors[Q_PROJ].view(-1)[-1].fill_(1e5))
    assert f"tensor {Q_PROJ} has values that float16 cannot hold" in error_of(directory, dtype=torch.float16)
    assert loaded_shard(directory, dtype=torch.bfloat16)


def test_a_tensor_that_the_model_has_no_place_for_is_refused(directory: Path) -> None:
    extra = {"model.layers.0.self_attn.q_norm.weight": torch.ones(6), "model.layers.2.mlp.x": torch.ones(1)}
    rewrite(directory, lambda tensors: tensors.update(extra))
    assert error_of(directory) == (
        f"{directory / SINGLE_FILE}: the model that config.json describes has no place for "
        "tensor model.layers.0.self_attn.q_norm.weight, nor has it for 1 more"
    )


def test_a_tied_head_with_values_of_its_own_is_refused(tmp_path: Path) -> None:
    directory = random_llama(tmp_path / "model", seed=1, **{**SHAPE, "tie_word_embeddings": True})
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert "tensor lm_head.weight differs from model.embed_tokens.weight" in error_of(directory, 1, 2)


@pytest.mark.parametrize("length", [0, 5, 8, 100, -1, -400])
def test_a_truncated_file_is_refused(directory: Path, length: int) -> None:
    path = directory / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:length])
    assert error_of(directory).startswith(f"{path}: is no whole safetensors file (")


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(directory: Path, content: bytes) -> None:
    (directory / SINGLE_FILE).write_bytes(content)
    assert error_of(directory).startswith(f"{directory / SINGLE_FILE}: is no whole safetensors file (")


def test_a_truncated_file_of_several_is_named(directory: Path) -> None:
    file = directory / split_into_files(directory, 3)[Q_PROJ]
    file.write_bytes(file.read_bytes()[:-1])
    assert error_of(directory).startswith(f"{file}: is no whole safetensors file (")


def test_an_index_that_names_a_missing_file_is_refused(directory: Path) -> None:
    file = directory / split_into_files(directory, 3)[Q_PROJ]
    file.unlink()
    message = error_of(directory)
    assert message.startswith(f"{directory / INDEX_FILE}: ")
    assert message.endswith(f" is in {file.name}, but {directory} has no such file")


def test_an_index_that_names_the_wrong_file_for_a_tensor_is_refused(directory: Path) -> None:
    weight_map = split_into_files(directory, 2)
    right = weight_map[Q_PROJ]
    wrong = next(file for file in weight_map.values() if file != right)
    write_index(directory, {"weight_map": {**weight_map, Q_PROJ: wrong}})
    assert error_of(directory) == f"{directory / wrong}: has no tensor {Q_PROJ}, which {INDEX_FILE} says it has"


def test_a_tensor_missing_from_a_sharded_checkpoint_is_named(directory: Path) -> None:
    weight_map = split_into_files(directory, 2)
    file = directory / weight_map.pop(Q_PROJ)
    tensors = load_file(file)
    del tensors[Q_PROJ]
    save_file(tensors, file)
    write_index(directory, {"weight_map": weight_map})
    assert error_of(directory) == f"{directory / INDEX_FILE}: tensor {Q_PROJ} is missing"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3, None])
def test_an_index_may_only_name_files_beside_it(directory: Path, name: object) -> None:
    write_index(directory, {"weight_map": {Q_PROJ: name}})
    (directory / SINGLE_FILE).rename(directory.parent / "outside.safetensors")
    message = error_of(directory)
    assert message.startswith(f"{directory / INDEX_FILE}: {Q_PROJ} ")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\x00"])
def test_an_index_without_a_weight_map_is_refused(directory: Path, content: str) -> None:
    (directory / SINGLE_FILE).unlink()
    (directory / INDEX_FILE).write_text(content)
    assert error_of(directory).startswith(f"{directory / INDEX_FILE}: ")


# --- the fingerprint -------------------------------------------------------------------------------------------------


def fingerprint_of(directory: Path, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> str:
    model = empty_shard(directory, rank, size, dtype)
    load(model, directory, rank, size)
    return fingerprint(model, directory, ModelConfig.from_directory(directory))


@pytest.mark.parametrize("size", [2, 8])
def test_ranks_of_the_same_files_have_the_same_fingerprint(directory: Path, size: int) -> None:
    assert len({fingerprint_of(directory, rank, size) for rank in range(size)}) == 1


def test_ranks_of_the_same_sharded_files_have_the_same_fingerprint(directory: Path) -> None:
    split_into_files(directory, 3)
    assert fingerprint_of(directory, 0, 2) == fingerprint_of(directory, 1, 2)


def change_norm(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors["model.norm.weight"][0].add_(1e-3))


def change_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 3e-5}))


def change_stored_type(directory: Path) -> None:
    rewrite(directory, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].bfloat16()}))


def change_metadata(directory: Path) -> None:
    save_file(load_file(directory / SINGLE_FILE), directory / SINGLE_FILE, metadata={"step": "2000"})


def change_number_of_files(directory: Path) -> None:
    split_into_files(directory, 2)


@pytest.mark.parametrize(
    "change", [change_norm, change_config, change_stored_type, change_metadata, change_number_of_files]
)
def test_the_fingerprint_tells_models_apart(directory: Path, change: Callable[[Path], None]) -> None:
    before = fingerprint_of(directory, 0, 2)
    change(directory)
    assert fingerprint_of(directory, 0, 2) != before


def test_the_fingerprint_tells_types_of_the_loaded_weights_apart(directory: Path) -> None:
    assert fingerprint_of(directory) != fingerprint_of(directory, dtype=torch.bfloat16)

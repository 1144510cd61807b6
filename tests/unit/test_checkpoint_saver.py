"""What the saver writes, and what it refuses, on one rank without a process group."""

import logging
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.checkpoint.checksum import file_checksum
from engine.checkpoint.file_lock import DirectoryLock
from engine.checkpoint.layout import lay_out
from engine.checkpoint.metadata import NO_CHECKPOINT, CheckpointMetadata
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.rank_writer import RankWriter, savable_targets
from engine.checkpoint.saver import CheckpointSaver
from engine.checkpoint.tensor_file import TensorFile
from engine.checkpoint.tensor_header import ALIGNMENT, TORCH_DTYPES, is_filler
from engine.communication.handler import CommunicationHandler
from engine.parallel.base import split_evenly
from engine.parallel.linear import ColumnParallelLinear
from engine.protocol.model_directory import find_model_directory, steps_in

CPU = torch.device("cpu")
METADATA = CheckpointMetadata(model_name="mine", config={"architectures": ["Mine"], "nested": {"a": [1, None]}})


class Mixed(nn.Module):
    """A plain module with tensors of many kinds: tied, scalar, empty, of odd sizes, not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.low = nn.Parameter(torch.randn(5, 3).bfloat16())
        self.turned = nn.Parameter(torch.randn(4, 6).T)
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("unsaved", torch.zeros(3), persistent=False)


def saver_of(directory: Path, **options: Any) -> CheckpointSaver:
    return CheckpointSaver(directory, CommunicationHandler(CPU), **options)


def save(directory: Path, model: nn.Module, step: int = 1, **options: Any) -> Path:
    return saver_of(directory, **options).save_checkpoint(model, METADATA, step)


def constant(value: float) -> nn.Module:
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def value_in(directory: Path) -> float:
    model = nn.Linear(3, 2)
    ModelDistributor(CommunicationHandler(CPU)).load_model(model, directory)
    (value,) = {float(each) for parameter in model.parameters() for each in parameter.detach().flatten()}
    return value


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_the_file_holds_exactly_the_models_tensors_and_fillers(tmp_path: Path) -> None:
    model = Mixed()
    path = save(tmp_path, model)
    stored = load_file(path / "weights_rank0.safetensors")
    own = {name: tensor for name, tensor in stored.items() if not is_filler(name)}
    expected = model.state_dict()
    del expected["head.weight"]  # tied, and so stored once
    assert own.keys() == expected.keys()
    for name, tensor in expected.items():
        assert own[name].dtype == tensor.dtype
        assert torch.equal(own[name], tensor), name
    with safe_open(path / "weights_rank0.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", **CheckpointMetadata.read(path).file_texts(0, 0)}


def test_every_tensor_lies_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    path = save(tmp_path, Mixed())
    file = TensorFile(path / "weights_rank0.safetensors")
    assert {place.start % ALIGNMENT for name, place in file.places.items() if not is_filler(name)} == {0}
    file.close()


def test_the_metadata_says_what_is_there(tmp_path: Path) -> None:
    path = save(tmp_path, Mixed(), step=12)
    metadata = CheckpointMetadata.read(path)
    assert path == tmp_path / "model-step-12"
    assert (metadata.model_name, metadata.config, metadata.step) == ("mine", METADATA.config, 12)
    assert (metadata.tp_size, metadata.dtype) == (1, "float32")
    assert metadata.model_size == 7 * 3 + 4 * 3 + 1 + 5 * 3 + 4 * 6 + 3
    (file,) = metadata.files
    assert file.size == (path / file.name).stat().st_size
    assert file.xxh3_128 == file_checksum(path / file.name)
    assert {tensor.dim for tensor in metadata.tensors} == {None}


def test_the_type_is_that_of_most_floating_numbers(tmp_path: Path) -> None:
    model = nn.Linear(3, 2).bfloat16()
    model.register_buffer("counts", torch.zeros(100, dtype=torch.int64))
    model.register_buffer("scales", torch.zeros(5))
    assert CheckpointMetadata.read(save(tmp_path, model)).dtype == "bfloat16"


def test_what_has_no_floating_numbers_has_no_type(tmp_path: Path) -> None:
    model = nn.Module()
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int32))
    assert CheckpointMetadata.read(save(tmp_path, model)).dtype == ""


def test_a_model_without_tensors_is_saved(tmp_path: Path) -> None:
    path = save(tmp_path, nn.Module())
    assert CheckpointMetadata.read(path).model_size == 0
    assert load_file(path / "weights_rank0.safetensors") == {}


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_every_type_is_saved_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Module()
    numbers = torch.arange(96, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.tensor([True, False])
    model.register_buffer("numbers", numbers)
    stored = load_file(save(tmp_path, model) / "weights_rank0.safetensors")["numbers"]
    assert stored.dtype == dtype
    assert torch.equal(stored.view(torch.uint8), numbers.view(torch.uint8))


def test_large_models_are_cut_into_files(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(5)))
    path = save(tmp_path, model, max_file_size=2500)
    names = [f"weights_rank0-{index:05}-of-00003.safetensors" for index in (1, 2, 3)]
    assert names_in(path) == ["metadata.json", *names]
    stored = {name: tensor for file in names for name, tensor in load_file(path / file).items()}
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())
    again = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(5)))
    ModelDistributor(CommunicationHandler(CPU)).load_model(again, path)
    assert torch.equal(again.state_dict()["4.weight"], model.state_dict()["4.weight"])


def test_what_is_saved_loads(tmp_path: Path) -> None:
    save(tmp_path, model := Mixed())
    again = Mixed()
    ModelDistributor(CommunicationHandler(CPU)).load_model(again, tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_models_text_files_come_along(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "other"):
        (texts / name).write_text(name)
    path = save(tmp_path / "checkpoints", constant(1), tokenizer_files=texts)
    copied = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names_in(path) == sorted([*copied, "metadata.json", "weights_rank0.safetensors"])
    assert [(path / name).read_text() for name in copied] == copied


def test_tokenizer_files_that_are_no_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer_files: .*/none is not a directory$"):
        save(tmp_path, constant(1), tokenizer_files=tmp_path / "none")
    assert names_in(tmp_path) == []


def test_the_directory_is_made_where_there_is_none(tmp_path: Path) -> None:
    assert value_in(save(tmp_path / "a/b", constant(3))) == 3


def test_a_relative_directory_stays_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(Path("checkpoints"), constant(3)) == Path("checkpoints/model-step-1")
    assert value_in(Path("checkpoints")) == 3


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, constant(1), max_file_size=1)
    assert value_in(save(tmp_path, constant(2))) == 2
    assert names_in(tmp_path) == ["model-step-1"]
    assert names_in(tmp_path / "model-step-1") == ["metadata.json", "weights_rank0.safetensors"]


def test_the_latest_step_is_found(tmp_path: Path) -> None:
    for step in (9, 10, 2):
        save(tmp_path, constant(step), step)
    assert value_in(find_model_directory(tmp_path)) == 10


def test_only_the_last_steps_are_kept(tmp_path: Path) -> None:
    kept = []
    for step in (5, 10, 15, 20):
        save(tmp_path, constant(step), step, keep_last=2)
        kept.append(steps_in(tmp_path))
    assert kept == [[5], [5, 10], [10, 15], [15, 20]]
    assert names_in(tmp_path) == ["model-step-15", "model-step-20"]


def test_the_step_just_written_is_kept_where_others_have_higher_numbers(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, constant(step), step)
    save(tmp_path, constant(150), 150, keep_last=2)
    assert steps_in(tmp_path) == [150, 300]
    save(tmp_path, constant(160), 160, keep_last=1)
    assert steps_in(tmp_path) == [160]


def test_what_is_no_checkpoint_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "model-step-1").mkdir()
    (tmp_path / "model-step-1/notes.txt").touch()
    (tmp_path / "mine").mkdir()
    save(tmp_path, constant(2), 2, keep_last=1)
    assert names_in(tmp_path) == ["mine", "model-step-1", "model-step-2"]


def test_an_old_step_that_cannot_be_removed_is_only_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stuck = tmp_path / f"model-step-1{'0' * 234}"  # too long for a longer name beside it
    stuck.mkdir()
    (stuck / "metadata.json").touch()
    with caplog.at_level(logging.WARNING):
        save(tmp_path, constant(2), 2, keep_last=1)
    assert value_in(tmp_path / "model-step-2") == 2
    assert stuck.is_dir()
    assert caplog.messages[0].endswith("old steps cannot be removed: File name too long")


def test_padding_is_written_as_zeros_and_the_model_is_left_alone(tmp_path: Path) -> None:
    group = CommunicationHandler.place(1, 2, CPU)
    layer = ColumnParallelLinear(3, [split_evenly(5, 2)], group, device=CPU, dtype=torch.float32)
    nn.init.ones_(layer.weight)
    targets = savable_targets(layer)
    RankWriter(tmp_path, 1, 2, lambda: None).write(targets, lay_out(targets), NO_CHECKPOINT)
    stored = load_file(tmp_path / "weights_rank1.safetensors")["weight"]
    assert stored.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert bool((layer.weight == 1).all())


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (torch.empty(3, device="meta"), "has no values: it is on the meta device"),
        (torch.zeros(3, dtype=torch.complex64), "is torch.complex64 of layout torch.strided"),
        (torch.eye(3).to_sparse(), "is torch.float32 of layout torch.sparse_coo"),
    ],
)
def test_a_tensor_that_files_cannot_hold_is_named(tmp_path: Path, tensor: Tensor, problem: str) -> None:
    model = constant(1)
    model.register_buffer("odd", tensor)
    with pytest.raises(ValueError, match=f"^tensor odd {problem}"):
        save(tmp_path, model)
    assert names_in(tmp_path) == []


def test_a_lazy_parameter_without_a_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tensor weight is a UninitializedParameter; only plain tensors are saved"):
        save(tmp_path, nn.LazyLinear(3))


def test_extra_state_of_a_module_is_named(tmp_path: Path) -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    with pytest.raises(ValueError, match=r"^tensor _extra_state is state of another kind"):
        save(tmp_path, Stateful(3, 2))


@pytest.mark.parametrize("name", ["__pad_0", "__metadata__"])
def test_a_name_that_the_files_use_themselves_is_refused(tmp_path: Path, name: str) -> None:
    model = nn.Module()
    model.register_parameter(name, nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match=f"^tensor {name} has a name that means something else in the files$"):
        save(tmp_path, model)


def test_a_parameter_without_a_shard_spec_is_named(tmp_path: Path) -> None:
    group = CommunicationHandler(CPU)
    layer = ColumnParallelLinear(3, [split_evenly(4, 1)], group, device=CPU, dtype=torch.float32)
    layer.late = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"^parameter late declares no ShardSpec$"):
        save(tmp_path, layer)


@pytest.mark.parametrize("field", ["config", "extra"])
def test_metadata_that_json_cannot_hold_is_refused(tmp_path: Path, field: str) -> None:
    values: dict[str, Any] = {field: {"dtype": torch.float32}}
    metadata = CheckpointMetadata(model_name="mine", **values)
    with pytest.raises(ValueError, match=r"^metadata: .*dtype"):
        saver_of(tmp_path).save_checkpoint(constant(1), metadata, 1)
    assert names_in(tmp_path) == []


def test_a_negative_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step must not be negative: -1$"):
        save(tmp_path, constant(1), -1)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("option", ["keep_last", "max_file_size"])
def test_options_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"^{option} must be at least 1, not 0$"):
        saver_of(tmp_path, **{option: 0})


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/checkpoints: cannot be written: Not a directory$"):
        save(tmp_path / "file/checkpoints", constant(1))


def test_another_saver_in_the_directory_is_named(tmp_path: Path) -> None:
    save(tmp_path, constant(1))
    with DirectoryLock(tmp_path), pytest.raises(ValueError, match=f"^{tmp_path}: process .* is writing there now$"):
        save(tmp_path, constant(2))
    assert value_in(tmp_path) == 1
    assert names_in(tmp_path) == ["model-step-1"]


def test_a_file_in_the_steps_place_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model-step-1").write_text("mine")
    with pytest.raises(ValueError, match=r"model-step-1: is there already, and is no directory$"):
        save(tmp_path, constant(1))
    assert (tmp_path / "model-step-1").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_named_and_the_old_step_stays(tmp_path: Path) -> None:
    save(tmp_path, constant(1))
    large = nn.Linear(100, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        expected = r"model-step-1/weights_rank0.safetensors: cannot be written: File too large$"
        with pytest.raises(ValueError, match=expected):
            save(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert value_in(tmp_path) == 1
    assert names_in(tmp_path) == ["model-step-1"]


def test_what_killed_savers_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".model-step-3.tmp-1-0123abcd"
    (left / "model-step-3").mkdir(parents=True)
    (left / "lock").touch()
    save(tmp_path, constant(1))
    assert names_in(tmp_path) == ["model-step-1"]


def test_a_readers_files_outlive_their_step(tmp_path: Path) -> None:
    """What is mapped stays as it is when its step is replaced, or removed."""
    model = nn.Linear(3, 2)
    save(tmp_path, constant(1))
    ModelDistributor(CommunicationHandler(CPU)).load_model(model, tmp_path)
    save(tmp_path, constant(2))
    save(tmp_path, constant(3), 2, keep_last=1)
    assert bool((model.weight == 1).all())

"""One call that loads a model on real ranks: any number of them, and one clear error on all for whatever is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from engine.checkpoint.loader import ModelLoadConfig
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.tensor_header import is_filler, make_header
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.protocol.model_directory import METADATA_FILE
from tests.checkpoints import random_llama
from tests.configs import model_config
from tests.distributed import RankFailedError, run_on_ranks
from tests.leftovers import Leftovers
from tests.service_process import ROOT
from tests.sharded_checkpoints import CPU, place, shard, write

CONFIG = model_config(vocab_size=101, hidden_size=24, intermediate_size=37, num_hidden_layers=2, qkv_bias=True)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
QKV_PROJ = "model.layers.0.self_attn.qkv_proj.weight"
NORM = "model.norm.weight"
SOON = 5.0
SERVICE_SECONDS = 120.0
Ending = tuple[str, str]


def make(group: CommunicationHandler) -> nn.Module:
    """A model whose numbers say which of the whole tensor they are."""
    model = build_model(CONFIG, group, device=CPU, dtype=torch.float32)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.fill_(number + 0.5)
    return model


def checksum_of(model: nn.Module) -> float:
    return sum(float(parameter.detach().double().sum()) * (i + 1) for i, parameter in enumerate(model.parameters()))


def load(group: CommunicationHandler, /, path: Path | dict[int, Path], **options: Any) -> tuple[str, str, float, float]:
    """Load, and return the error's class and text, the seconds it took, and a sum of what was loaded."""
    model = build_model(CONFIG, group, device=CPU, dtype=torch.float32)
    config = ModelLoadConfig(checkpoint_dir="", tp_size=group.world_size, **options)
    own_path = path[group.rank] if isinstance(path, dict) else path
    began = time.monotonic()
    try:
        ModelDistributor(group, config).load_model(model, own_path)
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - began, 0.0
    return "", "", time.monotonic() - began, checksum_of(model)


def load_twice(group: CommunicationHandler, /, path: Path | dict[int, Path], good: Path, **options: Any) -> Ending:
    """Load what cannot be loaded, and then, in the same group, what can."""
    kind, text, seconds, _ = load(group, path, **options)
    assert seconds < SOON
    assert load(group, good)[:2] == ("", "")
    return kind, text


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(make, tmp_path_factory.mktemp("good") / "checkpoint", 2)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write(make, tmp_path / "checkpoint", 2)


def error_of(directory: Path, good: Path, **options: Any) -> str:
    """Return the one line that both ranks end with."""
    first, second = run_on_ranks(load_twice, 2, directory, good, **options)
    assert first == second
    assert first[0] == "ValueError"
    assert "\n" not in first[1]
    return first[1]


# --- what is right ----------------------------------------------------------------------------------------------------


def test_all_sizes_load_the_same_model(tmp_path: Path) -> None:
    directories = {size: write(make, tmp_path / str(size), size) for size in (1, 2, 4)}
    for size in (1, 2, 4):
        expected = checksum_of(make(place(0, size)))  # rank 0 has no padding, where there is any
        for saved_by, directory in directories.items():
            kind, text, _, total = run_on_ranks(load, size, directory)[0]
            assert (kind, text, total) == ("", "", expected), (saved_by, size)


def load_by_parts(group: CommunicationHandler, parent: Path, step: int | None) -> str:
    model = build_model(CONFIG, group, device=CPU, dtype=torch.float32)
    config = ModelLoadConfig(checkpoint_dir="", tp_size=group.world_size, step=step)
    return ModelDistributor(group, config).load_model(model, parent).directory.name


def test_a_directory_of_steps_gives_the_latest_or_the_one_asked_for(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        write(make, tmp_path / f"model-step-{step}", 2, step=step)
    assert run_on_ranks(load_by_parts, 2, tmp_path, None) == ["model-step-100"] * 2
    assert run_on_ranks(load_by_parts, 2, tmp_path, 20) == ["model-step-20"] * 2
    with pytest.raises(RankFailedError, match=r"has no checkpoint of step 7; it has 5, 20, 100"):
        run_on_ranks(load_by_parts, 2, tmp_path, 7)


def test_a_directory_whose_name_is_no_utf8_or_has_a_newline_loads(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"two\nlines"):
        directory = write(make, tmp_path / os.fsdecode(name), 2)
        assert [ending[:2] for ending in run_on_ranks(load, 2, directory)] == [("", "")] * 2


def test_a_loader_of_another_size_than_its_group_is_refused(good: Path) -> None:
    config = ModelLoadConfig(checkpoint_dir=good, tp_size=2)
    with pytest.raises(ValueError, match="tp_size is 2, but the group has 1 ranks"):
        ModelDistributor(place(0, 1), config).load_model(make(place(0, 1)), good)


# --- what is wrong with the files -------------------------------------------------------------------------------------


def second_file(directory: Path) -> Path:
    return directory / "weights_rank1.safetensors"


def change_file(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the tensors of a file, without fillers."""
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(path).items() if not is_filler(name)}
    change(tensors)
    save_file(tensors, path, texts)


def change_metadata(directory: Path, change: Callable[[dict[str, Any]], object], *, fix_size: bool = False) -> None:
    path = directory / METADATA_FILE
    content = json.loads(path.read_text())
    if fix_size:
        content["files"][1]["size"] = second_file(directory).stat().st_size
    change(content)
    path.write_text(json.dumps(content))


def tensor_entry(content: dict[str, Any], name: str) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for entry in content["tensors"] if entry["name"] == name)
    return entry


def test_a_truncated_file_is_named(directory: Path, good: Path) -> None:
    size = second_file(directory).stat().st_size
    os.truncate(second_file(directory), size - 1)
    error = error_of(directory, good)
    assert error.startswith(f"{second_file(directory)}: is no whole safetensors file")
    assert f"it has {size - 1} bytes" in error


def test_a_flipped_byte_is_found_where_checksums_are_verified(directory: Path, good: Path) -> None:
    content = bytearray(second_file(directory).read_bytes())
    content[-1] ^= 1
    second_file(directory).write_bytes(content)
    assert [ending[:2] for ending in run_on_ranks(load, 2, directory)] == [("", "")] * 2
    error = error_of(directory, good, verify_checksums=True)
    assert re.fullmatch(
        rf"{second_file(directory)}: has checksum \w{{32}}, but metadata.json says \w{{32}}: its bytes have changed",
        error,
    )


def test_a_missing_file_is_named(directory: Path, good: Path) -> None:
    second_file(directory).unlink()
    expected = f"{second_file(directory)}: is missing; metadata.json names it as a file of rank 1"
    assert error_of(directory, good) == expected
    assert error_of(directory, good, verify_checksums=True) == expected


def test_a_tensor_that_only_the_metadata_lacks_is_named(directory: Path, good: Path) -> None:
    change_metadata(directory, lambda content: content["tensors"].remove(tensor_entry(content, QKV_PROJ)))
    told = f": tensor {QKV_PROJ} is not in metadata.json"
    names = [f"{directory}/weights_rank{rank}.safetensors" for rank in range(2)]  # of whichever rank is first
    assert error_of(directory, good) in [name + told for name in names]


def test_a_tensor_that_the_checkpoint_lacks_is_named(directory: Path, good: Path) -> None:
    for path in directory.glob("*.safetensors"):
        change_file(path, lambda tensors: tensors.pop(QKV_PROJ))

    def remove(content: dict[str, Any]) -> None:
        content["tensors"].remove(tensor_entry(content, QKV_PROJ))
        for file in content["files"]:
            file["size"] = (directory / file["name"]).stat().st_size

    change_metadata(directory, remove)
    assert error_of(directory, good) == f"{directory / METADATA_FILE}: tensor {Q_PROJ} is missing"


def test_a_tensor_that_is_missing_in_a_file_is_named(directory: Path, good: Path) -> None:
    change_file(second_file(directory), lambda tensors: tensors.pop(NORM))
    change_metadata(directory, lambda _: None, fix_size=True)
    assert error_of(directory, good) == f"{second_file(directory)}: tensor {NORM} is missing"


def test_a_tensor_too_many_in_the_metadata_is_named(directory: Path, good: Path) -> None:
    extra = {"name": "model.extra", "dtype": "F32", "shape": [3]}
    change_metadata(directory, lambda content: content["tensors"].append(extra))
    error = error_of(directory, good)
    assert error.endswith("the model has no place for tensor model.extra")
    assert error.startswith(f"{directory}/weights_rank")


def test_a_tensor_too_many_in_a_file_is_named(directory: Path, good: Path) -> None:
    change_file(second_file(directory), lambda tensors: tensors.update(extra=torch.ones(3)))
    change_metadata(directory, lambda _: None, fix_size=True)
    assert error_of(directory, good) == f"{second_file(directory)}: tensor extra is not in metadata.json"


def test_a_wrong_shape_in_a_file_is_named(directory: Path, good: Path) -> None:
    change_file(second_file(directory), lambda tensors: tensors.update({NORM: torch.ones(25)}))
    change_metadata(directory, lambda _: None, fix_size=True)
    expected = f"{second_file(directory)}: tensor {NORM} has shape [25], but metadata.json says [24]"
    assert error_of(directory, good) == expected


def test_a_shape_that_is_not_the_models_is_named(tmp_path: Path, good: Path) -> None:
    def make_other(group: CommunicationHandler) -> nn.Module:
        config = model_config(**{**vars(CONFIG), "intermediate_size": 38})
        return build_model(config, group, device=CPU, dtype=torch.float32)

    error = error_of(write(make_other, tmp_path / "other", 2), good)
    assert error.startswith(f"{tmp_path}/other/weights_rank")
    assert error.endswith("gate_proj.weight has shape [38, 24], but config.json asks for [37, 24]")


def test_a_wrong_type_in_a_file_is_named(directory: Path, good: Path) -> None:
    change_file(second_file(directory), lambda tensors: tensors.update({NORM: torch.ones(24).bfloat16()}))
    change_metadata(directory, lambda _: None, fix_size=True)
    expected = f"{second_file(directory)}: tensor {NORM} is of type BF16, but metadata.json says F32"
    assert error_of(directory, good) == expected


def test_a_type_that_is_not_read_is_named(directory: Path, good: Path) -> None:
    for path in sorted(directory.glob("*.safetensors")):
        change_file(path, lambda tensors: tensors.update({NORM: torch.ones(24).to(torch.float8_e4m3fn)}))

    def say_so(content: dict[str, Any]) -> None:
        tensor_entry(content, NORM)["dtype"] = "F8_E4M3"
        for file in content["files"]:
            file["size"] = (directory / file["name"]).stat().st_size

    change_metadata(directory, say_so)
    error = error_of(directory, good)
    assert error.endswith(f"tensor {NORM} is of type F8_E4M3; read are F32, BF16, F16")
    assert error.startswith(f"{directory}/weights_rank")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.update(format_version=2), "format_version 2 is newer than 1, the newest that is known here"),
        (lambda c: c["tensors"][0].update(layout="amx_tiles"), "has layout 'amx_tiles'; known: row_major"),
        (lambda c: c["tensors"][0].update(dtype="F4"), "is of type 'F4'; known: "),
        (lambda c: c.update(tp_size=3), "files: must be the same number for each of 3 ranks"),
        (lambda c: c["tensors"].append(c["tensors"][0]), "is there twice"),
        (lambda c: c["files"][0].update(size="1"), "Expected `int`, got `str`"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(
    change: Callable[[dict[str, Any]], object], problem: str, directory: Path, good: Path
) -> None:
    change_metadata(directory, change)
    error = error_of(directory, good)
    assert error.startswith(f"{directory / METADATA_FILE}: ")
    assert problem in error


def test_metadata_that_is_no_json_is_named(directory: Path, good: Path) -> None:
    (directory / METADATA_FILE).write_bytes(b'{"format_version": 1,')
    assert error_of(directory, good).startswith(f"{directory / METADATA_FILE}: cannot be read as JSON: ")


def test_ranks_that_are_given_different_paths_are_told_so(directory: Path, good: Path) -> None:
    endings = run_on_ranks(load_twice, 2, {0: good, 1: directory}, good)
    expected = f"path: rank 1 is to load {directory}, step None, and rank 0 {good}, step None"
    assert endings == [("ValueError", expected)] * 2


# --- failures in the middle -------------------------------------------------------------------------------------------

NUM_ROWS = 1 << 20


class Wide(nn.Module):
    """256 MiB, which a checkpoint has as a hole on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(NUM_ROWS, 64))


def write_sparse(directory: Path) -> Path:
    """Write a checkpoint of `Wide` for a single rank."""
    write(lambda _: nn.Linear(1, 1, bias=False), directory, 1)
    path = directory / "weights_rank0.safetensors"
    num_bytes = NUM_ROWS * 64 * 4
    header, _ = make_header(
        [("weight", "F32", (NUM_ROWS, 64))], CheckpointMetadata.read(directory).file_texts(rank=0, index=0)
    )
    path.write_bytes(header)
    os.truncate(path, len(header) + num_bytes)

    def describe(content: dict[str, Any]) -> None:
        content["tensors"][0]["shape"] = [NUM_ROWS, 64]
        content["files"][0]["size"] = path.stat().st_size

    change_metadata_of_one(directory, describe)
    return directory


def change_metadata_of_one(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((directory / METADATA_FILE).read_text())
    change(content)
    (directory / METADATA_FILE).write_text(json.dumps(content))


def load_slowly(group: CommunicationHandler, directory: Path, use_memory_map: bool) -> tuple[str, str, float]:
    """Rank 1 fails after half a second; the others would take a minute."""
    began = time.monotonic()

    def dawdle(done: int, _: int) -> None:
        if group.rank == 1 and time.monotonic() > began + 0.5:
            raise OSError(28, f"no room after {done >> 30} GiB")
        time.sleep(0.3 if group.rank == 1 else 2.0)

    config = ModelLoadConfig(checkpoint_dir="", tp_size=group.world_size, use_memory_map=use_memory_map)
    try:
        ModelDistributor(group, config, dawdle).load_model(Wide(), directory)
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - began
    raise AssertionError("all was loaded")


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_ranks_in_the_middle_of_a_long_load_end_soon_after_one_has_failed(use_memory_map: bool, tmp_path: Path) -> None:
    directory = write_sparse(tmp_path / "wide")
    for kind, text, seconds in run_on_ranks(load_slowly, 3, directory, use_memory_map):
        assert (kind, text) == ("RuntimeError", "OSError: [Errno 28] no room after 0 GiB")
        assert seconds < 1.0 + SOON


# --- under torchrun ---------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, torch, torch.distributed as dist
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from tests.integration.test_model_distributor import CONFIG, CPU, build_model, checksum_of

torch.set_num_threads(1)
dist.init_process_group("gloo")
group = CommunicationHandler(CPU, dist.group.WORLD)
model = build_model(CONFIG, group, device=CPU, dtype=torch.float32)
if sys.argv[2] == "die" and group.rank == 1:
    ModelDistributor(group, progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL)).load_model(model, sys.argv[1])
try:
    ModelDistributor(group).load_model(model, sys.argv[1])
except Exception as error:
    print(f"rank {group.rank}: {type(error).__name__}: {error}", flush=True)
else:
    print(f"rank {group.rank}: {checksum_of(model)}", flush=True)
if sys.argv[2] == "quit":
    sys.exit()  # at once, and without leaving the group
"""


def torchrun(directory: Path, what: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with Leftovers() as leftovers:
        script = leftovers.folder / "script.py"
        script.write_text(SCRIPT)
        process = subprocess.Popen(
            [*command, str(script), str(directory), what],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=SERVICE_SECONDS)
        finally:
            if process.poll() is None:  # its ranks would outlive it
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
    return process.returncode, sorted(line for line in output.splitlines() if line.startswith("rank "))


def test_a_script_under_torchrun_loads_and_may_end_at_once(good: Path) -> None:
    expected = [checksum_of(make(place(0, 2)))]
    code, lines = torchrun(good, "quit")
    assert code == 0
    assert lines[0] == f"rank 0: {expected[0]}"
    assert lines[1].startswith("rank 1: ")
    assert len(lines) == 2


def test_under_torchrun_too_a_death_is_named(good: Path) -> None:
    code, lines = torchrun(good, "die")
    assert code != 0
    assert lines in (["rank 0: RuntimeError: rank 1 died"], [])  # torchrun itself ends what remains


# --- in a service -----------------------------------------------------------------------------------------------------


def test_a_service_whose_checkpoint_is_torn_ends_with_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    directory = shard(random_llama(tmp_path / "hf", 1, vocab_size=4096), tmp_path / "ck", 2)
    for path in (ROOT / "engine/embedded/model").glob("tokenizer*.json"):
        shutil.copy(path, directory)
    os.truncate(second_file(directory), second_file(directory).stat().st_size - 1)
    with Leftovers() as leftovers:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "server", "serve", str(directory), "-tp", "2", "--port", "0"],
            cwd=ROOT,
            env={**os.environ, **leftovers.environment},
            capture_output=True,
            text=True,
            timeout=SERVICE_SECONDS,
            check=False,
        )
        leftovers.check([])
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if "whole safetensors" in line]
    assert len(lines) == 1
    assert str(second_file(directory)) in lines[0]

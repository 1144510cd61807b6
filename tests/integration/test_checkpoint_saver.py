"""Saving on real ranks: what each writes, and one error for all when one cannot."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from engine.checkpoint.convert import shard
from engine.checkpoint.integrity import checksum_problem
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.saver import CheckpointSaver
from engine.checkpoint.targets import targets_of
from engine.checkpoint.tensor_file import TensorFile
from engine.checkpoint.tensor_header import ALIGNMENT, is_filler
from engine.communication.handler import CommunicationHandler
from engine.models.llama import LlamaForCausalLM
from engine.models.registry import build_model
from engine.parallel.base import split_evenly
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.protocol.commands import SMALLEST_FILE, ShardCommand
from engine.protocol.model_config import ModelConfig, RopeConfig
from engine.protocol.model_directory import find_model_directory, read_model_config, steps_in
from tests.checkpoints import random_llama
from tests.disks import mounted_disk
from tests.distributed import run_on_ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
METADATA = CheckpointMetadata(model_name="mine")
SECONDS = 5.0  # within which a failure is everyone's
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=29,
    hidden_size=13,
    intermediate_size=11,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
    qkv_bias=True,
    o_bias=True,
    mlp_bias=False,
    tie_word_embeddings=True,
    dtype="float32",
)


def filled(group: CommunicationHandler, seed: int = 0) -> LlamaForCausalLM:
    """Return a rank's part of a model whose values follow from names, indices and `seed` alone; padding is zero."""
    model = build_model(CONFIG, group, device=CPU, dtype=torch.float32)
    for target in targets_of(model):
        for piece in target.pieces(group.rank, group.world_size):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {piece.sources[0]}".encode()))
            piece.run.copy_(piece.wanted.of(torch.randn(piece.wanted.global_shape, generator=generator)))
            piece.padding.zero_()
    return model


def is_same(model: nn.Module, other: nn.Module) -> bool:
    pairs = zip(targets_of(model), targets_of(other), strict=True)
    return all(torch.equal(a.tensor, b.tensor) for a, b in pairs)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def save_filled(group: CommunicationHandler, directory: Path, steps: tuple[int, ...] = (1,)) -> list[Path]:
    saver = CheckpointSaver(directory, group, keep_last=2)
    return [saver.save_checkpoint(filled(group, step), METADATA, step) for step in steps]


def load_is_same(group: CommunicationHandler, directory: Path, seed: int) -> bool:
    model = build_model(CONFIG, group, device=CPU, dtype=torch.float32)
    ModelDistributor(group).load_model(model, directory)
    return is_same(model, filled(group, seed))


# --- what is written -------------------------------------------------------------------------------------------------


def stored_is_own(group: CommunicationHandler, directory: Path) -> None:
    """Check that the rank's file holds exactly the rank's tensors, and fillers."""
    model = filled(group, 1)
    path = directory / f"model-step-1/weights_rank{group.rank}.safetensors"
    stored = {name: tensor for name, tensor in load_file(path).items() if not is_filler(name)}
    targets = {target.name: target.tensor for target in targets_of(model)}
    assert stored.keys() == targets.keys()
    assert [name for name in targets if not torch.equal(stored[name], targets[name])] == []
    with_places = TensorFile(path)
    assert {place.start % ALIGNMENT for name, place in with_places.places.items() if not is_filler(name)} == {0}
    with_places.close()


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_each_rank_writes_exactly_its_part(tmp_path: Path, tp_size: int) -> None:
    run_on_ranks(save_filled, tp_size, tmp_path)
    run_on_ranks(stored_is_own, tp_size, tmp_path)
    assert names_in(tmp_path) == ["model-step-1"]


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_metadata_is_that_of_all_ranks(tmp_path: Path, tp_size: int) -> None:
    run_on_ranks(save_filled, tp_size, tmp_path)
    directory = tmp_path / "model-step-1"
    metadata = CheckpointMetadata.read(directory)
    whole = filled(CommunicationHandler(CPU))
    assert metadata.tp_size == tp_size
    assert metadata.model_size == sum(parameter.numel() for parameter in whole.parameters())
    assert [(file.rank, checksum_problem(directory, file)) for file in metadata.files] == [
        (rank, "") for rank in range(tp_size)
    ]


@pytest.mark.parametrize(("tp_size", "other"), [(2, 2), (4, 1), (1, 4), (4, 2)])
def test_what_some_ranks_save_others_load(tmp_path: Path, tp_size: int, other: int) -> None:
    run_on_ranks(save_filled, tp_size, tmp_path)
    assert run_on_ranks(load_is_same, other, tmp_path, 1) == [True] * other


def save_stored(group: CommunicationHandler, source: Path, directory: Path) -> None:
    content, origin = read_model_config(source)
    model = build_model(ModelConfig.from_object(content, origin), group, device=CPU, dtype=torch.float32)
    ModelDistributor(group).load_model(model, source)
    metadata = CheckpointMetadata(model_name=source.name, config=content)
    CheckpointSaver(directory, group, max_file_size=SMALLEST_FILE).save_checkpoint(model, metadata, 0)


@pytest.mark.parametrize("tp_size", [1, 4])
def test_what_is_saved_is_what_the_shard_command_writes(tmp_path: Path, tp_size: int) -> None:
    source = random_llama(tmp_path / "model", 1, hidden_size=16, vocab_size=80_001)  # 1.3 MB of them on each of four
    run_on_ranks(save_stored, tp_size, source, tmp_path / "saved")
    command = ShardCommand(
        source=str(source),
        destination=str(tmp_path / "sharded"),
        tensor_parallel_size=tp_size,
        max_file_size=SMALLEST_FILE,
        progress=False,
    )
    metadata = shard(command, lambda _: lambda _: None)
    saved = tmp_path / "saved/model-step-0"
    assert CheckpointMetadata.read(saved) == metadata
    assert len(metadata.files) > tp_size
    for file in metadata.files:
        assert (saved / file.name).read_bytes() == (tmp_path / "sharded" / file.name).read_bytes()


def test_steps_come_and_go(tmp_path: Path) -> None:
    run_on_ranks(save_filled, 2, tmp_path, (1, 2, 3, 3))
    assert names_in(tmp_path) == ["model-step-2", "model-step-3"]
    assert run_on_ranks(load_is_same, 2, tmp_path, 3) == [True] * 2


# --- training --------------------------------------------------------------------------------------------------------


def train(group: CommunicationHandler, directory: Path, steps: int, every: int) -> list[list[Tensor]]:
    """Train two parallel layers, saving now and then; return the parameters of the steps that were saved."""
    size = group.world_size
    torch.manual_seed(0)
    up = ColumnParallelLinear(6, [split_evenly(7, size)], group, bias=True, device=CPU, dtype=torch.float32)
    down = RowParallelLinear(split_evenly(7, size), 3, group, bias=True, device=CPU, dtype=torch.float32)
    model = nn.Sequential(up, nn.Tanh(), down)
    for target in targets_of(model):
        for piece in target.pieces(group.rank, size):
            piece.run.copy_(piece.wanted.of(torch.randn(piece.wanted.global_shape)))
            piece.padding.zero_()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    saver = CheckpointSaver(directory, group, keep_last=2)
    saved = []
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        (model(torch.randn(8, 6)) - 1).pow(2).mean().backward()
        optimiser.step()
        if step % every == 0:
            saver.save_checkpoint(model, METADATA, step)
            saved.append([parameter.detach().clone() for parameter in model.parameters()])
    return saved


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_training_loop_saves_what_it_has_come_to(tmp_path: Path, tp_size: int) -> None:
    saved = run_on_ranks(train, tp_size, tmp_path, 9, 3)
    assert steps_in(tmp_path) == [6, 9]
    for rank, steps in enumerate(saved):
        assert not torch.equal(steps[1][0], steps[2][0])
        for number, parameters in ((6, steps[1]), (9, steps[2])):
            stored = load_file(tmp_path / f"model-step-{number}/weights_rank{rank}.safetensors")
            names = ("0.weight", "0.bias", "2.weight", "2.bias")
            assert all(torch.equal(stored[name], value) for name, value in zip(names, parameters, strict=True))


PLAIN_PROGRAM = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.saver import CheckpointSaver
from engine.communication.handler import CommunicationHandler

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
saver = CheckpointSaver(sys.argv[1], CommunicationHandler(torch.device("cpu"), dist.group.WORLD))
path = saver.save_checkpoint(model, CheckpointMetadata(model_name="plain", config={"kind": "plain"}), 7)
if dist.get_rank() == 0:
    torch.save(model.state_dict(), path.parent / "expected.pt")
dist.destroy_process_group()
"""


def run_program(folder: Path, text: str, *arguments: Path) -> str:
    """Run a program on two ranks under torchrun, and return what they print."""
    program = folder / "program.py"
    program.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", program, *arguments],
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_plain_module_is_saved_under_torchrun(tmp_path: Path) -> None:
    run_program(tmp_path, PLAIN_PROGRAM, tmp_path / "checkpoints")
    directory = find_model_directory(tmp_path / "checkpoints")
    expected = torch.load(tmp_path / "checkpoints/expected.pt")
    metadata = CheckpointMetadata.read(directory)
    assert (metadata.model_name, metadata.config, metadata.step, metadata.tp_size) == ("plain", {"kind": "plain"}, 7, 2)
    assert metadata.model_size == 4 * 3 + 3 + 3 + 3
    for rank in (0, 1):
        stored = load_file(directory / f"weights_rank{rank}.safetensors")
        assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


# --- one rank's failure ----------------------------------------------------------------------------------------------

Break = Callable[[CommunicationHandler, Path], tuple[nn.Module, int]]


def failing_save(group: CommunicationHandler, directory: Path, break_it: Break) -> tuple[str, str, float, list[str]]:
    """Save what `break_it` gives; return the error's type and text, how long it took, and what is there then."""
    model, step = break_it(group, directory)
    group.barrier()
    began = time.monotonic()
    try:
        CheckpointSaver(directory, group).save_checkpoint(model, METADATA, step)
    except (ValueError, RuntimeError) as error:
        seconds = time.monotonic() - began
        group.barrier()
        return type(error).__name__, str(error), seconds, names_in(directory)
    raise AssertionError("nothing failed")


def check_failure(directory: Path, tp_size: int, break_it: Break, problem: str, kind: str = "ValueError") -> None:
    """Check that all ranks fail alike and soon, and that the step of before is still there, alone."""
    run_on_ranks(save_filled, tp_size, directory)
    answers = run_on_ranks(failing_save, tp_size, directory, break_it)
    assert {answer[0] for answer in answers} == {kind}
    assert len({answer[1] for answer in answers}) == 1
    assert re.search(problem, answers[0][1]), answers[0][1]
    assert max(answer[2] for answer in answers) < SECONDS
    assert [answer[3] for answer in answers] == [["model-step-1"]] * tp_size
    assert run_on_ranks(load_is_same, tp_size, directory, 1) == [True] * tp_size


def other_shape_on_rank_1(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    return nn.Linear(3 + group.rank, 2), 1


def other_name_on_rank_1(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    return nn.ModuleDict({"ab"[group.rank]: nn.Linear(3, 2)}), 1


def other_order_on_rank_1(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    names = ["a", "b"] if group.rank == 0 else ["b", "a"]
    return nn.ModuleDict({name: nn.Linear(3, 2) for name in names}), 1


def other_type_on_rank_3(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    return nn.Linear(3, 2).to(torch.float64 if group.rank == 3 else torch.float32), 1


def other_step_on_rank_1(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    return nn.Linear(3, 2), 1 + group.rank


def other_values_on_rank_1(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    model = nn.Linear(3, 2)
    nn.init.zeros_(model.weight)
    nn.init.constant_(model.bias, group.rank)
    return model, 1


def unlike_kv_heads(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    """Return a model whose two KV heads are each on two of four ranks; those on rank 3 differ from those on rank 2."""
    model = filled(group)
    if group.rank == 3:
        with torch.no_grad():
            model.get_parameter("model.layers.1.self_attn.qkv_proj.weight")[-1] += 1
    return model, 1


def split_for_four(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    return filled(CommunicationHandler.place(group.rank, 4, CPU)), 1


def meta_on_rank_1(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    return nn.Linear(3, 2, device="meta" if group.rank == 1 else "cpu"), 1


def distributed_tensor(group: CommunicationHandler, _: Path) -> tuple[nn.Module, int]:
    mesh = init_device_mesh("cpu", (group.world_size,))
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    torch.distributed.destroy_process_group()  # which the mesh has made
    return model, 1


FAILURES: dict[str, tuple[int, Break, str]] = {
    "another shape": (
        2,
        other_shape_on_rank_1,
        r"^rank 0 and rank 1 have different models: tensor weight is F32 of shape \[2, 3\].* on one, and "
        r"F32 of shape \[2, 4\].* on the other$",
    ),
    "another name": (2, other_name_on_rank_1, "different models: tensor a.weight is on one of them only$"),
    "another order": (2, other_order_on_rank_1, "different models: tensor b.weight comes at another place"),
    "another type": (4, other_type_on_rank_3, "^rank 0 and rank 3 have different models: tensor weight is F32 .* F64"),
    "another step": (2, other_step_on_rank_1, "^step: rank 0 saves 1, and rank 1 2$"),
    "other values": (2, other_values_on_rank_1, "^tensor bias should be the same on rank 0 and on rank 1, but differs"),
    "other values of replicated heads": (
        4,
        unlike_kv_heads,
        r"^tensor model.layers.1.self_attn.qkv_proj.weight should be the same on rank 2 and on rank 3, but differs",
    ),
    "a model of other ranks": (2, split_for_four, "tensor .* cannot be cut as parts says"),
    "a tensor without values": (2, meta_on_rank_1, "^tensor weight has no values: it is on the meta device$"),
    "a distributed tensor": (2, distributed_tensor, "^tensor weight is a DTensor; only plain tensors are saved"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_one_ranks_failure_is_the_same_error_on_all(tmp_path: Path, case: str) -> None:
    tp_size, break_it, problem = FAILURES[case]
    check_failure(tmp_path, tp_size, break_it, problem)


def two_large(_: CommunicationHandler, __: Path) -> tuple[nn.Module, int]:
    return nn.Linear(400, 400), 1  # 640 kB a rank


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "small", "1m") as path:
        yield path


def test_a_full_disk_is_the_same_error_on_all_and_loses_nothing(small_disk: Path) -> None:
    check_failure(
        small_disk,
        2,
        two_large,
        r"model-step-1/weights_rank[01].safetensors: cannot be written: No space left on device$",
    )
    # There is room again, as all that was half written is gone.
    run_on_ranks(save_filled, 2, small_disk, (2,))
    assert names_in(small_disk) == ["model-step-1", "model-step-2"]


def test_a_read_only_disk_is_the_same_error_on_all(small_disk: Path) -> None:
    run_on_ranks(save_filled, 2, small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    answers = run_on_ranks(failing_save, 2, small_disk, two_large)
    assert len({answer[1] for answer in answers}) == 1
    assert re.search("Read-only file system$", answers[0][1])
    assert answers[0][1].startswith(f"{small_disk}: ")
    assert run_on_ranks(load_is_same, 2, small_disk, 1) == [True, True]


HIDING_PROGRAM = """
import ctypes, subprocess, sys
import torch
import torch.distributed as dist
from pathlib import Path
from torch import nn
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.saver import CheckpointSaver
from engine.communication.handler import CommunicationHandler

dist.init_process_group("gloo")
directory = Path(sys.argv[1])
if dist.get_rank() == 1:
    if ctypes.CDLL(None).unshare(0x00020000):  # a mount namespace of its own, as on another machine
        sys.exit(77)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", directory], check=True)
try:
    saver = CheckpointSaver(directory, CommunicationHandler(torch.device("cpu"), dist.group.WORLD))
    saver.save_checkpoint(nn.Linear(3, 2), CheckpointMetadata(model_name="plain"), 7)
except ValueError as error:
    print("error:", error, flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_rank_that_sees_another_file_system_is_named(tmp_path: Path, small_disk: Path) -> None:
    assert small_disk.is_dir()  # mounts are allowed
    (tmp_path / "checkpoints").mkdir()
    done = run_program(tmp_path, HIDING_PROGRAM, tmp_path / "checkpoints")
    errors = re.findall("error: (.*)", done)
    assert len(errors) == 2
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"{tmp_path}/checkpoints/.model-step-7.tmp-")
    assert errors[0].endswith("rank 1 does not see the directory that rank 0 has made there")
    assert names_in(tmp_path / "checkpoints") == []


# --- two savers ------------------------------------------------------------------------------------------------------

ENDLESS_PROGRAM = """
import sys
import torch
from torch import nn
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.saver import CheckpointSaver
from engine.communication.handler import CommunicationHandler

saver = CheckpointSaver(sys.argv[1], CommunicationHandler(torch.device("cpu")))
model = nn.Linear(1000, 1000)
for step in range(2, 10**6):
    saver.save_checkpoint(model, CheckpointMetadata(model_name="other"), step)
    print(step, flush=True)
    sys.stdin.readline()
"""


def test_of_two_savers_in_one_directory_the_second_fails_on_all_ranks(tmp_path: Path) -> None:
    run_on_ranks(save_filled, 2, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS_PROGRAM, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        try:
            caught_at = stop_while_it_writes(other, tmp_path)
            answers = run_on_ranks(failing_save, 2, tmp_path, two_large)
            other.send_signal(signal.SIGCONT)
            assert other.stdout.readline() == f"{caught_at}\n"
        finally:
            other.kill()
    expected = f"{tmp_path}: process {other.pid} on {socket.gethostname()} is writing there now"
    assert [answer[:2] for answer in answers] == [("ValueError", expected)] * 2
    assert find_model_directory(tmp_path).name == f"model-step-{caught_at}"
    assert run_on_ranks(load_is_same, 2, tmp_path / "model-step-1", 1) == [True, True]


def stop_while_it_writes(saver: "subprocess.Popen[str]", directory: Path) -> int:
    """Stop a process in the middle of a save; return the step."""
    assert saver.stdin is not None
    assert saver.stdout is not None
    for step in range(2, 200):
        while not list(directory.glob(f".model-step-{step}.tmp-*")) and not (directory / f"model-step-{step}").exists():
            time.sleep(0)
        saver.send_signal(signal.SIGSTOP)
        while psutil.Process(saver.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        if list(directory.glob(f".model-step-{step}.tmp-*/*/*.safetensors")):
            return step
        saver.send_signal(signal.SIGCONT)
        assert saver.stdout.readline() == f"{step}\n"
        saver.stdin.write("\n")
        saver.stdin.flush()
    raise AssertionError("it was never seen to write")

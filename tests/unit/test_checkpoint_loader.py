"""Loading a distributed checkpoint by as many ranks as saved it: files are mapped, and nothing is copied."""

import ctypes
import gc
import logging
import mmap
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoint.loader import LoadReport, ModelLoadConfig
from engine.checkpoint.model_distributor import ModelDistributor
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from tests.configs import model_config
from tests.sharded_checkpoints import CPU, place, write

P = ParamSpec("P")
R = TypeVar("R")
MIB = 1 << 20
CONFIG = model_config(vocab_size=1000, hidden_size=64, intermediate_size=96)
CHILD_SECONDS = 120.0
CAP_IPC_LOCK = 14
CAPABILITY_VERSION = 0x20080522


class Large(nn.Module):
    """Some MiB of numbers, in tensors of odd sizes."""

    def __init__(self, value: float | None = None) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.empty(4 * MIB + 3))
        self.second = nn.Parameter(torch.empty(3, MIB + 1))
        if value is not None:
            for parameter in self.parameters():
                parameter.data.fill_(value)

    @property
    def num_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(lambda _: Large(1.5), tmp_path_factory.mktemp("large") / "checkpoint", 1)


def make_llama(group: CommunicationHandler, *, seed: int = 0, tied: bool = True) -> nn.Module:
    torch.manual_seed(seed + group.rank)
    config = model_config(**{**vars(CONFIG), "tie_word_embeddings": tied})
    model = build_model(config, group, device=CPU, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def load(model: nn.Module, directory: Path, **options: Any) -> LoadReport:
    config = ModelLoadConfig(checkpoint_dir="", tp_size=1, **{"enable_prefetch": False, **options})
    return ModelDistributor(place(0, 1), config).load_model(model, directory)


def mapping_of(tensor: Tensor) -> dict[str, str]:
    """Return what the system says of the mapping that a tensor lies in; its path is the entry `path`."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head and not head.endswith(":"):
            start, stop = (int(address, 16) for address in head.split("-"))
            if found:
                return found
            if start <= tensor.data_ptr() < stop:
                found = {"path": rest.split(maxsplit=4)[-1], "start": str(start), "stop": str(stop)}
        elif found:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def kibibytes(mapping: dict[str, str], name: str) -> int:
    return int(mapping[name].split()[0])


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def in_child(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what a function returns in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(theirs, function, args, kwargs), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(CHILD_SECONDS), "no answer"
        result: R = ours.recv()
        return result
    finally:
        process.kill()
        process.join()


def _send(pipe: Connection, function: Callable[..., object], args: Any, kwargs: Any) -> None:
    torch.set_num_threads(1)
    pipe.send(function(*args, **kwargs))


# --- nothing is copied ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_file_size", [None, 10_000])
def test_parameters_are_aligned_views_of_their_files(tmp_path: Path, max_file_size: int | None) -> None:
    directory = write(make_llama, tmp_path / "ck", 1, max_file_size=max_file_size)
    model = make_llama(place(0, 1), seed=9)
    report = load(model, directory)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() % 64 == 0, name
        mapping = mapping_of(parameter.data)
        assert Path(mapping["path"]).parent == directory, name
        assert parameter.data_ptr() + parameter.nbytes <= int(mapping["stop"])
        assert torch.equal(parameter, make_llama(place(0, 1)).get_parameter(name))
    assert report.bytes_read == sum(parameter.nbytes for parameter in model.parameters())
    assert report.memory.num_bytes >= report.bytes_read
    assert report.directory == directory
    assert 0 < report.metadata_seconds < report.seconds


def touch(*tensors: Tensor) -> float:
    return sum(float(tensor.detach().sum(dtype=torch.float64)) for tensor in tensors)


def growth_over_load(directory: Path, use_memory_map: bool) -> tuple[int, int, int]:
    model = Large()
    load(Large(), directory)  # whatever is made once
    touch(model.first[:1], model.second[:, :1000])
    gc.collect()
    before = status("VmRSS")
    report = load(model, directory, use_memory_map=use_memory_map)
    loaded = status("VmRSS") - before
    assert touch(*model.parameters()) == 1.5 * sum(parameter.numel() for parameter in model.parameters())
    touched = status("VmRSS") - before
    del report
    return loaded, touched, status("RssAnon")


def test_no_memory_is_taken_before_weights_are_touched_and_none_beside_them_then(large: Path) -> None:
    loaded, touched, _ = in_child(growth_over_load, large, True)
    assert loaded < MIB
    assert Large().num_bytes - MIB < touched < Large().num_bytes + 2 * MIB


def test_without_a_map_weights_take_private_memory_as_they_are_loaded(large: Path) -> None:
    loaded, touched, _ = in_child(growth_over_load, large, False)
    assert Large().num_bytes - MIB < loaded <= touched < Large().num_bytes + 2 * MIB
    model = Large()
    report = load(model, large, use_memory_map=False)
    assert all(mapping_of(parameter.data)["path"] != str(large) for parameter in model.parameters())
    assert report.memory.num_bytes == 0
    assert torch.equal(model.second, Large(1.5).second)


def test_writing_to_a_mapped_weight_changes_neither_the_file_nor_what_others_see(tmp_path: Path) -> None:
    directory = write(lambda _: Large(1.5), tmp_path / "ck", 1)
    file = directory / "weights_rank0.safetensors"
    model, other = Large(), Large()
    load(model, directory)
    load(other, directory)
    before = file.read_bytes()
    with torch.no_grad():
        model.second.mul_(2)
    assert torch.equal(model.second, Large(3.0).second)
    assert torch.equal(other.second, Large(1.5).second)
    assert torch.equal(model.first, Large(1.5).first)
    assert file.read_bytes() == before


def test_a_mapped_model_trains(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs, wanted = torch.randn(64, 5), torch.randn(64, 1)
    fresh, loaded = nn.Linear(5, 1), nn.Linear(5, 1)
    directory = write(lambda _: fresh, tmp_path / "ck", 1)
    load(loaded, directory)
    for model in (fresh, loaded):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(inputs), wanted).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert torch.equal(fresh.weight, loaded.weight)
    assert torch.equal(fresh.bias, loaded.bias)


@pytest.mark.parametrize("use_memory_map", [True, False])
def test_tied_weights_stay_tied(tmp_path: Path, use_memory_map: bool) -> None:
    directory = write(make_llama, tmp_path / "ck", 1)
    model = make_llama(place(0, 1), seed=9)
    load(model, directory, use_memory_map=use_memory_map)
    head, embedding = model.get_parameter("lm_head.weight"), model.get_parameter("model.embed_tokens.weight")
    assert head is embedding
    assert torch.equal(head, make_llama(place(0, 1)).get_parameter("lm_head.weight"))


def test_a_file_that_is_replaced_stays_what_it_was_for_those_who_have_mapped_it(tmp_path: Path) -> None:
    directory = write(lambda _: Large(1.5), tmp_path / "ck", 1)
    model = Large()
    load(model, directory)
    file = directory / "weights_rank0.safetensors"
    file.unlink()
    file.write_bytes(b"another")
    assert torch.equal(model.second, Large(1.5).second)


# --- kept in memory, and brought in -----------------------------------------------------------------------------------


def locked(directory: Path) -> tuple[int, int, list[dict[str, str]]]:
    model = Large()
    before = status("VmLck")
    report = load(model, directory, lock_memory=True)
    deadline = time.monotonic() + CHILD_SECONDS
    while report.memory.resident_share() < 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join()
    return status("VmLck") - before, report.memory.num_bytes, [mapping_of(p.data) for p in model.parameters()]


def test_locked_weights_are_in_memory_once_and_uncopied(large: Path) -> None:
    in_status, num_bytes, mappings = in_child(locked, large)
    size = (large / "weights_rank0.safetensors").stat().st_size
    assert in_status == num_bytes == -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    for mapping in mappings:
        assert kibibytes(mapping, "Rss") * 1024 == num_bytes
        assert kibibytes(mapping, "Anonymous") == kibibytes(mapping, "Private_Dirty") == 0


def lock_with_limit(directory: Path, model: nn.Module, limit: int) -> tuple[str, int]:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
    drop_capability(CAP_IPC_LOCK)
    try:
        load(model, directory, lock_memory=True)
    except ValueError as error:
        return str(error), status("VmLck")
    return "", status("VmLck")


def drop_capability(number: int) -> None:
    """Give one up; harmless where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of the first 32; then of the others
    assert libc.capget(header, sets) == 0
    sets[0] &= ~(1 << number)
    sets[1] &= ~(1 << number)
    assert libc.capset(header, sets) == 0


def test_too_small_a_limit_for_locked_memory_is_named(large: Path) -> None:
    error, in_status = in_child(lock_with_limit, large, Large(), MIB)
    size = (large / "weights_rank0.safetensors").stat().st_size
    num_bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    assert error == (
        f"--mlock: {num_bytes} bytes of weights cannot be kept in memory: Cannot allocate memory; "
        f"ulimit -l allows {MIB} bytes"
    )
    assert in_status == 0


def test_a_limit_that_is_large_enough_needs_no_capability(tmp_path: Path) -> None:
    directory = write(lambda _: nn.Linear(50, 50), tmp_path / "ck", 1)
    assert in_child(lock_with_limit, directory, nn.Linear(50, 50), MIB) == ("", 3 * mmap.PAGESIZE)


def test_locking_without_a_map_is_refused() -> None:
    with pytest.raises(ValueError, match="lock_memory keeps mapped weights in memory: it has no effect without"):
        ModelLoadConfig(checkpoint_dir="x", tp_size=1, lock_memory=True, use_memory_map=False)


def test_weights_that_could_not_be_locked_are_told_of(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load(Large().bfloat16(), large, lock_memory=True)
    assert f"{large}: 14.0 MiB are copied, not mapped: memory is not locked" in caplog.text


def drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drop_and_load(directory: Path, prefetch: bool) -> tuple[float, float, bool]:
    drop_from_cache(directory)
    model = Large()
    load_prefetch = {"enable_prefetch": prefetch}
    report = load(model, directory, **load_prefetch)
    first = report.memory.resident_share()
    if prefetch:
        deadline = time.monotonic() + CHILD_SECONDS
        while report.memory.resident_share() < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
    else:
        touch(*model.parameters())
    return first, report.memory.resident_share(), torch.equal(model.second, Large(1.5).second)


@pytest.mark.parametrize("prefetch", [True, False])
def test_the_resident_share_follows_the_page_cache(tmp_path: Path, prefetch: bool) -> None:
    directory = write(lambda _: Large(1.5), tmp_path / "ck", 1)
    first, last, is_right = in_child(drop_and_load, directory, prefetch)
    if not prefetch:
        if first > 0.9:
            pytest.skip("this file system does not drop what is cached")
        assert first < 0.2
    assert last == 1.0
    assert is_right


def test_nothing_is_resident_when_nothing_is_mapped(large: Path) -> None:
    report = load(Large(), large, use_memory_map=False)
    assert report.memory.resident_share() == 1.0


def test_a_file_that_cannot_be_read_ahead_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.mapped_memory.WAITS", (0.01,))
    directory = write(lambda _: Large(1.5), tmp_path / "ck", 1)
    report = load(Large(), directory)
    path = directory / "weights_rank0.safetensors"
    os.truncate(path, mmap.PAGESIZE)
    with caplog.at_level(logging.ERROR):
        report.memory.prefetch().join()
    assert f"{path}: cannot be read at byte 0: what uses these weights will end" in caplog.text


# --- how far it has come ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("verify_checksums", [True, False])
def test_progress_never_falls_and_ends_at_the_whole(large: Path, dtype: torch.dtype, verify_checksums: bool) -> None:
    model, heard = Large().to(dtype), list[tuple[int, int]]()
    config = ModelLoadConfig(checkpoint_dir="", tp_size=1, verify_checksums=verify_checksums)
    ModelDistributor(place(0, 1), config, lambda done, total: heard.append((done, total))).load_model(model, large)
    totals = {total for _, total in heard}
    size = (large / "weights_rank0.safetensors").stat().st_size
    assert totals == {model.num_bytes + verify_checksums * size}
    assert heard == sorted(heard)
    assert heard[-1][0] == heard[-1][1]

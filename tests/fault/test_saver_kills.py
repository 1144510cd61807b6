"""kill -9 of savers at random moments: what is there is always whole, the old or the new."""

import contextlib
import multiprocessing
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import nn

from engine.checkpoint.file_lock import DirectoryLock
from engine.checkpoint.integrity import checksum_problem
from engine.checkpoint.metadata import CheckpointMetadata
from engine.checkpoint.model_distributor import ModelDistributor
from engine.checkpoint.saver import CheckpointSaver
from engine.checkpoint.sharded import ShardedFiles
from engine.checkpoint.targets import TensorSlice
from engine.communication.process_group import ProcessGroupManager
from engine.parallel.base import split_evenly
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.protocol.model_directory import find_model_directory, steps_in
from tests.ports import free_port

TP_SIZE = 2
WIDTH = 401  # odd, so that there is padding
KEPT = 2
JOIN_SECONDS = 60.0
END_SECONDS = 30.0  # for a rank whose peer died
STORE_LOST = "the ranks' store cannot be reached any more"  # where it went with rank 0 before the others met that
GLIMPSE = 0.05  # seconds, about, that a save takes


@dataclass(frozen=True)
class Orders:
    """What the ranks of one round save: versions from `first` on, each as a step of its own or all as `step`."""

    directory: Path
    log: Path
    first: int
    step: int | None
    port: int
    idle: int | None = None  # a rank that saves once and then does nothing


def save_for_ever(orders: Orders, rank: int, pipe: Connection) -> None:
    """Be a rank that saves one version after the other, each as soon as it can."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(orders.port)}
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(TP_SIZE), "LOCAL_RANK": str(rank), **address})
    with ProcessGroupManager(torch.device("cpu"), timeout_seconds=JOIN_SECONDS) as groups:
        group = groups.tensor_parallel
        model = nn.Sequential(
            ColumnParallelLinear(
                WIDTH, [split_evenly(WIDTH, TP_SIZE)], group, bias=True, device=group.device, dtype=torch.float32
            ),
            RowParallelLinear(
                split_evenly(WIDTH, TP_SIZE), WIDTH, group, bias=True, device=group.device, dtype=torch.float32
            ),
        )
        saver = CheckpointSaver(orders.directory, group, keep_last=KEPT, max_file_size=400_000)
        if orders.first > 1:  # as a job that goes on; from here on the ranks know each other's processes
            ModelDistributor(group).load_model(model, orders.directory)
        pipe.send("ready")
        pipe.recv()
        version = orders.first
        try:
            while True:
                for parameter in model.parameters():
                    nn.init.constant_(parameter, version)
                note(orders.log, "begin", version)
                step = version if orders.step is None else orders.step
                saver.save_checkpoint(model, CheckpointMetadata(model_name="it", extra={"version": version}), step)
                note(orders.log, "end", version)
                version += 1
                if rank == orders.idle:
                    time.sleep(END_SECONDS * 2)
        except RuntimeError as error:
            pipe.send(str(error))
            os._exit(1)  # the group's other ends are gone


def note(log: Path, word: str, version: int) -> None:
    """Write a line that outlives this process."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{word} {version}\n".encode())
    os.close(descriptor)


def noted(log: Path, word: str) -> int:
    """Return the highest version of which `word` was written; 0 if there is none."""
    return max([int(number) for number in re.findall(rf"{word} (\d+)", log.read_text())], default=0)


def lines_in(log: Path) -> list[str]:
    return log.read_text().splitlines()


class Ranks:
    """The processes of one round."""

    def __init__(self, orders: Orders) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._pipes, self._processes = [], []
        for rank in range(TP_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=save_for_ever, args=(orders, rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def begin(self) -> None:
        for pipe in self._pipes:
            assert pipe.poll(JOIN_SECONDS)
            assert pipe.recv() == "ready"
        for pipe in self._pipes:
            pipe.send("go")

    def kill(self, victims: list[int]) -> None:
        for rank in victims:
            self._processes[rank].kill()

    def check_end(self, victims: list[int]) -> None:
        """Check that those who were not killed end by themselves, and know who died."""
        for rank in set(range(TP_SIZE)) - set(victims):
            self._processes[rank].join(END_SECONDS)
            assert self._processes[rank].exitcode == 1, f"rank {rank} still runs"
            said = self._pipes[rank].recv()
            assert said == f"rank {victims[0]} died" or (victims[0] == 0 and said.startswith(STORE_LOST))

    def close(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()


@contextlib.contextmanager
def ranks_of(orders: Orders) -> Iterator[Ranks]:
    ranks = Ranks(orders)
    try:
        yield ranks
    finally:
        ranks.close()


def version_in(parent: Path) -> int:
    """Load all of the latest step, and return the one version that all of it is of."""
    directory = find_model_directory(parent)
    metadata = CheckpointMetadata.read(directory)
    assert [problem for file in metadata.files if (problem := checksum_problem(directory, file))] == []
    values: set[float] = set()
    with ShardedFiles(directory, metadata) as source:
        assert len(source.names) == 4
        for name in source.names:
            shape = source.shape_of(name)
            values |= set(source.read(name, TensorSlice(shape), torch.float32).flatten().tolist())
    assert values == {metadata.extra["version"]}
    return int(metadata.extra["version"])


def kill_again_and_again(directory: Path, log: Path, kills: int, *, same_step: bool) -> tuple[int, int]:
    """Kill random ranks of savers at random moments, and check what is there after each.

    Returns:
        How many saves ended, and how many kills came in the middle of one.
    """
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    log.touch()
    save_first(directory, log, same_step=same_step)
    ended = interrupted = 0
    for _ in range(kills):
        before = version_in(directory)
        victims = draw.choice(([0], [1], [0, 1], [1, 0]))
        orders = Orders(directory, log, before + 1, 1 if same_step else None, free_port())
        with ranks_of(orders) as ranks:
            ranks.begin()
            time.sleep(draw.uniform(0, 3 * GLIMPSE))
            ranks.kill(victims)
            ranks.check_end(victims)
        after = version_in(directory)
        assert max(before, noted(log, "end")) <= after <= max(before, noted(log, "begin"))
        assert len(leftover_of(directory)) <= 1
        ended += after - before
        interrupted += noted(log, "begin") > noted(log, "end")
    return ended, interrupted


def leftover_of(directory: Path) -> set[str]:
    """Return the ids of the dead processes that have left something: the last one's at most, as each cleans up."""
    return {path.name.split("-")[-2] for path in directory.glob(".*.tmp-*")}


def save_first(directory: Path, log: Path, *, same_step: bool) -> None:
    """Let real ranks save at least one version."""
    with ranks_of(Orders(directory, log, 1, 1 if same_step else None, free_port())) as ranks:
        already = lines_in(log).count("end 1")
        ranks.begin()
        wait_for(log, "end 1", already + 1)


def wait_for(log: Path, line: str, count: int = 1) -> None:
    """Wait until the line has been written that often."""
    deadline = time.monotonic() + JOIN_SECONDS
    while lines_in(log).count(line) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_kills(tmp_path: Path, kills: int, *, same_step: bool) -> None:
    directory = tmp_path / "checkpoints"
    ended, interrupted = kill_again_and_again(directory, tmp_path / "log", kills, same_step=same_step)
    print(f"{ended} saves ended, {interrupted} of {kills} kills came in the middle of one")
    assert interrupted > 0
    save_first(directory, tmp_path / "log", same_step=same_step)
    with DirectoryLock(directory):
        pass
    assert len(leftover_of(directory)) <= 1
    assert len(steps_in(directory)) <= KEPT + 1  # one that the last kill kept from being removed


@pytest.mark.parametrize("same_step", [False, True], ids=["steps of their own", "one step"])
def test_killed_savers_leave_the_old_or_the_new(tmp_path: Path, same_step: bool) -> None:
    check_kills(tmp_path, 5, same_step=same_step)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_between_two_saves_is_noticed_by_the_other(tmp_path: Path, victim: int) -> None:
    orders = Orders(tmp_path, tmp_path / "log", 1, None, free_port(), idle=victim)
    orders.log.touch()
    with ranks_of(orders) as ranks:
        ranks.begin()
        wait_for(orders.log, "begin 2")  # by the other rank, which waits now
        wait_for(orders.log, "end 1", TP_SIZE)  # also by rank 0, which cleans up after the other has gone on
        ranks.kill([victim])
        ranks.check_end([victim])
    assert version_in(tmp_path) == 1
    assert leftover_of(tmp_path) == set()


@pytest.mark.slow
@pytest.mark.parametrize("same_step", [False, True], ids=["steps of their own", "one step"])
def test_savers_killed_fifty_times_leave_the_old_or_the_new(tmp_path: Path, same_step: bool) -> None:
    check_kills(tmp_path, 50, same_step=same_step)

"""How a group of ranks is lost, and the next takes its place. Nothing may be left of the first."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from engine.protocol.config import EngineConfig
from engine.protocol.messages import GroupState, GroupStatus, Recovery, Request, SamplingParams
from tests.checkpoints import random_llama
from tests.engine_process import EngineFailedError, EngineProcess
from tests.leftovers import SharedMemory
from tests.service_process import wait_until

FAULTS = ("-m", "tests.fault.orchestrator")
ODD_GROUP = ("-m", "tests.fault.odd_group")
MANY = SamplingParams(max_tokens=900, temperature=0.0)
SOME = SamplingParams(max_tokens=200, temperature=0.0)
FEW = SamplingParams(max_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"), seed=1, num_attention_heads=4, num_key_value_heads=2)


def config(checkpoint: Path, *, rank_timeout: float = 30.0, max_num_seqs: int = 64) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint),
        tensor_parallel_size=2,
        device="cpu",
        dtype="float32",
        num_kv_blocks=64,
        max_num_seqs=max_num_seqs,
        rank_timeout=rank_timeout,
    )


def rank_pids(engine: EngineProcess) -> list[int]:
    return [rank.pid for rank in engine.status.ranks]


def fork_server(engine: EngineProcess) -> psutil.Process:
    """Return the process that ranks are forked from."""
    children = psutil.Process(engine.process.pid).children()
    [process] = [child for child in children if child.pid not in rank_pids(engine)]
    return process


def be_in_a_step(engine: EngineProcess) -> None:
    """Return while the engine is busy for long."""
    engine.submit([Request("long", [1, 2, 3], MANY)])
    engine.receive()


def recovery_of(status: GroupStatus) -> Recovery:
    assert status.recovery is not None
    return status.recovery


def recover(engine: EngineProcess) -> Recovery:
    """Wait for the next group; check that it is like the one before, of which nothing is left, and that it computes."""
    before = engine.status
    noticed = recovery_of(engine.wait_for(GroupState.RECOVERING))
    status = engine.wait_until_ready()
    recovery = recovery_of(status)
    assert (recovery.cause, recovery.in_step, recovery.kind) == (noticed.cause, noticed.in_step, noticed.kind)
    assert recovery.seconds.keys() == {"kill", "respawn", "load"}
    assert all(seconds > 0 for seconds in recovery.seconds.values())
    assert (status.num_kv_blocks, status.max_model_len) == (before.num_kv_blocks, before.max_model_len)
    check_that_nothing_is_left(engine, before)
    assert len(engine.generate([Request("after", [1, 2, 3], FEW)])["after"]) == 12
    return recovery


def check_that_nothing_is_left(engine: EngineProcess, lost: GroupStatus) -> None:
    epoch, world_size = engine.status.epoch, len(engine.status.ranks)
    assert epoch > lost.epoch
    assert not any(psutil.pid_exists(rank.pid) for rank in lost.ranks)
    children = {child.pid for child in psutil.Process(engine.process.pid).children(recursive=True)}
    assert set(rank_pids(engine)) < children
    assert len(children) == world_size + 1
    assert {path.name for path in Path(engine.spec.run_dir).iterdir()} == {
        "spec.json",
        "status",
        f"beats-{epoch}",
        f"engine-{epoch}",
        *(f"control-{epoch}-{rank}" for rank in range(world_size)),
        *(f"steps-{epoch}-{rank}" for rank in range(1, world_size)),
    }


def test_a_killed_rank_is_followed_by_the_next_group(checkpoint: Path) -> None:
    shared_memory = SharedMemory()
    with EngineProcess(config(checkpoint)) as engine:
        expected = engine.generate([Request("a", [5, 6, 7], FEW)])
        epoch = engine.status.epoch
        for is_busy in (True, False):
            for victim in range(2):
                if is_busy:
                    be_in_a_step(engine)
                pid = rank_pids(engine)[victim]
                os.kill(pid, signal.SIGKILL)
                recovery = recover(engine)
                assert (recovery.cause, recovery.kind) == (f"rank {victim} (pid {pid}) was killed by SIGKILL", "died")
                assert recovery.in_step in ([["long"], []] if is_busy else [[]])
        assert engine.status.epoch == epoch + 4
        assert engine.generate([Request("a", [5, 6, 7], FEW)]) == expected
        shared_memory.check()


def test_a_rank_stuck_in_a_step_is_hung_and_the_steps_requests_are_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTS_FOLDER", str(tmp_path))
    with EngineProcess(config(checkpoint, rank_timeout=1, max_num_seqs=2), FAULTS) as engine:
        for victim in range(2):
            (tmp_path / f"wedge-{victim}").touch()
            engine.submit([Request(name, [1, 2, 3], MANY) for name in ("first", "second", "waits")])
            recovery = recover(engine)
            assert recovery.kind == "hung"
            assert f"rank {victim} (pid" in recovery.cause
            assert recovery.cause.endswith("got no further with a step within 1 s")
            assert recovery.in_step == ["first", "second"]


def test_a_stopped_rank_is_hung_in_a_step_and_idle(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint, rank_timeout=1)) as engine:
        for victim, is_busy in ((0, True), (1, True), (1, False)):
            if is_busy:
                be_in_a_step(engine)
            pid = rank_pids(engine)[victim]
            os.kill(pid, signal.SIGSTOP)
            recovery = recover(engine)
            cause = f"rank {victim} (pid {pid}) was stopped, and not continued within 1 s"
            assert (recovery.cause, recovery.kind) == (cause, "hung")
            assert is_busy or recovery.in_step == []


def test_a_rank_that_is_continued_in_time_goes_on(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        expected = engine.generate([Request("a", [5, 6, 7], SOME)])
        engine.submit([Request("a", [5, 6, 7], SOME)])
        tokens = next(output.token_ids for output in engine.receive())
        rank = psutil.Process(rank_pids(engine)[1])
        rank.suspend()
        wait_until(lambda: rank.status() == psutil.STATUS_STOPPED, 30)
        rank.resume()
        while len(tokens) < len(expected["a"]):
            tokens += next(output.token_ids for output in engine.receive())
        assert tokens == expected["a"]
        assert not any(status.recovery for status in engine.statuses)


def test_a_step_that_takes_longer_than_the_time_out_but_gets_further_is_not_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ODDITY", "slow")  # eight layers of 0.4 s each
    checkpoint = random_llama(tmp_path, seed=1, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=8)
    with EngineProcess(config(checkpoint, rank_timeout=2), ODD_GROUP) as engine:
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        began = time.monotonic()
        assert len(engine.generate([Request("a", [1, 2, 3], sampling)])["a"]) == 1
        assert time.monotonic() - began > 2


def test_an_error_in_a_step_is_followed_by_the_next_group(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODDITY", "fails")
    with EngineProcess(config(checkpoint), ODD_GROUP) as engine:
        engine.submit([Request("odd", [1, 2, 3], FEW)])
        recovery = recovery_of(engine.wait_for(GroupState.RECOVERING))
        assert (recovery.cause, recovery.kind) == ("rank 0 failed: RuntimeError: the step is odd", "failed")
        assert recovery.in_step == ["odd"]
        engine.wait_until_ready()
        assert len(engine.generate([Request("odd", [1, 2, 3], FEW)])["odd"]) == 12


@pytest.mark.parametrize("victims", [(0, 1), (1, 0)])
def test_ranks_that_die_while_they_load_and_while_they_take_the_place_of_others_are_followed(
    checkpoint: Path, victims: tuple[int, int]
) -> None:
    engine = EngineProcess(config(checkpoint))
    with killing(engine, dict(zip((GroupState.STARTING, GroupState.RECOVERING), victims, strict=True))), engine:
        while engine.status.epoch < 9:  # a group may be faster than what kills it
            engine.wait_until_ready()
        assert f"rank {victims[1]} (pid" in recovery_of(engine.status).cause
        check_that_nothing_is_left(engine, engine.statuses[0])
        assert len(engine.generate([Request("after", [1, 2, 3], FEW)])["after"]) == 12


def test_the_process_that_ranks_are_forked_from_may_die(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        forks = fork_server(engine)
        be_in_a_step(engine)
        forks.kill()
        wait_until(lambda: not forks.is_running(), 30)
        assert engine.receive()  # the ranks go on
        os.kill(rank_pids(engine)[1], signal.SIGKILL)
        recover(engine)
        os.kill(rank_pids(engine)[0], signal.SIGKILL)
        recover(engine)


def test_a_stopped_process_that_ranks_are_forked_from_is_replaced(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint, rank_timeout=1)) as engine:
        forks = fork_server(engine)
        forks.suspend()
        os.kill(rank_pids(engine)[1], signal.SIGKILL)
        engine.wait_until_ready()
        assert engine.status.epoch == 9
        assert f"(pid {forks.pid}) was stopped" in recovery_of(engine.status).cause
        assert not forks.is_running()
        assert len(engine.generate([Request("after", [1, 2, 3], FEW)])["after"]) == 12


def test_a_user_s_mistake_found_by_the_next_group_is_the_end(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    with EngineProcess(config(copy)) as engine:
        (copy / "model.safetensors").unlink()
        os.kill(rank_pids(engine)[1], signal.SIGKILL)
        with pytest.raises(EngineFailedError, match="safetensors") as failure:
            engine.wait_until_ready()
        assert failure.value.status.is_user_error
        assert engine.process.wait(30) == 1


def test_other_weights_than_those_of_the_first_group_are_the_end(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.norm.weight"] += 1
    with EngineProcess(config(copy)) as engine:
        save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
        (tmp_path / "other.safetensors").replace(copy / "model.safetensors")
        os.kill(rank_pids(engine)[1], signal.SIGKILL)
        with pytest.raises(EngineFailedError, match="the weights are others than those that the service began with"):
            engine.wait_until_ready()
        assert engine.process.wait(30) == 1


def test_an_orchestrator_after_another_has_its_sizes_and_removes_what_it_left(checkpoint: Path) -> None:
    engine = EngineProcess(config(checkpoint), epoch=9, num_kv_blocks=33, max_model_len=100)
    left = [Path(engine.spec.run_dir) / name for name in ("beats-8", "control-8-1", "engine-8", "steps-8-1")]
    for path in left:
        path.touch()
    with engine:
        assert (engine.status.epoch, engine.status.num_kv_blocks, engine.status.max_model_len) == (9, 33, 100)
        assert not any(path.exists() for path in left)
        for name in ("spec.json", "beats-9"):  # as what cleans /tmp up does
            (Path(engine.spec.run_dir) / name).unlink()
        os.kill(rank_pids(engine)[0], signal.SIGKILL)
        recover(engine)


def test_a_folder_of_sockets_that_is_gone_is_named_when_the_next_group_needs_it(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        epoch = engine.status.epoch
        shutil.rmtree(engine.spec.run_dir)
        os.kill(rank_pids(engine)[0], signal.SIGKILL)
        message = rf"^TMPDIR: {engine.spec.run_dir}/beats-{epoch + 1} cannot be made: No such file or directory$"
        with pytest.raises(EngineFailedError, match=message):
            engine.wait_until_ready()
        assert engine.process.wait(30) == 1


class killing:  # noqa: N801  (reads as a statement)
    """Kill, in the background, a rank of the first group in each state, as soon as its process is known."""

    def __init__(self, engine: EngineProcess, victims: dict[GroupState, int]) -> None:
        self._engine = engine
        self._victims = victims
        self._thread = threading.Thread(target=self._kill)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()

    def _kill(self) -> None:
        for state, victim in self._victims.items():
            self._engine.wait_until_heard(lambda status, state=state: status.state is state and status.ranks)  # type: ignore[misc]
            status = next(status for status in self._engine.statuses if status.state is state and status.ranks)
            os.kill(status.ranks[victim].pid, signal.SIGKILL)

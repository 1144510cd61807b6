"""How an engine ends: by a mistake, by being asked, with what started it. Nothing may be left of it."""

import os
import signal
from pathlib import Path

import psutil
import pytest
import zmq

from engine.protocol.config import EngineConfig
from engine.protocol.messages import FinishReason, GroupState, Request, SamplingParams
from engine.protocol.model_config import ModelConfig
from tests.checkpoints import random_llama
from tests.engine_process import EngineFailedError, EngineProcess
from tests.leftovers import still_running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_llama(tmp_path_factory.mktemp("llama"), seed=1, num_attention_heads=4, num_key_value_heads=2)


def config(checkpoint: Path, tp_size: int = 2) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint), tensor_parallel_size=tp_size, device="cpu", dtype="float32", num_kv_blocks=64
    )


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_ranks_die_with_a_killed_orchestrator(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        processes = descendants(engine.process.pid)
        assert len(processes) == 3  # the ranks, and what they are forked from
        engine.process.kill()
        engine.process.wait()
        assert still_running(processes, 5) == []


def test_closing_the_orchestrators_input_ends_the_group_and_removes_its_folder(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        processes = descendants(engine.process.pid)
        assert engine.process.stdin is not None
        engine.process.stdin.close()
        assert engine.process.wait(5) == 0
        assert not any(process.is_running() for process in processes)
        assert not Path(engine.spec.run_dir).exists()


def test_sigterm_to_the_orchestrator_ends_the_group(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        processes = descendants(engine.process.pid)
        engine.process.terminate()
        assert engine.process.wait(5) == 0
        assert not any(process.is_running() for process in processes)


def test_a_rank_ignores_the_terminals_interrupt(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        for rank in engine.status.ranks:
            os.kill(rank.pid, signal.SIGINT)
        requests = [Request("a", [1, 2, 3], SamplingParams(max_tokens=4))]
        assert len(engine.generate(requests)["a"]) == 4


def test_a_rank_that_dies_in_each_start_while_another_still_loads_is_named(checkpoint: Path) -> None:
    """The last READY comes when its sender's peer is dead already: nothing may wait for the dead one."""
    scripted = EngineProcess(config(checkpoint), command=("-m", "tests.fault.scripted_group"))
    with pytest.raises(EngineFailedError, match=r"rank 0 .* was killed by SIGKILL; .* start 3 in a row"), scripted:
        pass
    assert [status.epoch for status in scripted.statuses if status.state is GroupState.RECOVERING] == [8, 8, 9, 9]
    assert scripted.statuses[-1].state is GroupState.FAILED
    assert scripted.process.returncode == 1


def test_words_that_make_no_sense_end_the_group_with_an_error(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint, tp_size=1)) as engine:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(engine.spec.control_endpoint(0))
        stranger.send(b"\x63garbage")
        with pytest.raises(EngineFailedError, match="protocol version 99, expected 1"):
            engine.wait_for(GroupState.READY)
        context.destroy(linger=0)
        assert engine.process.wait(10) == 1


def test_a_missing_weights_file_is_the_users_to_mend(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    with pytest.raises(EngineFailedError, match="safetensors") as failure, EngineProcess(config(tmp_path)):
        pass
    assert failure.value.status.is_user_error


def test_a_context_that_the_cache_cannot_hold_is_the_users_to_mend(checkpoint: Path) -> None:
    wrong = EngineConfig(model=str(checkpoint), device="cpu", num_kv_blocks=2, max_model_len=33)
    with pytest.raises(EngineFailedError, match="--max-model-len 33 does not fit") as failure, EngineProcess(wrong):
        pass
    assert failure.value.status.is_user_error


def test_a_cache_that_memory_cannot_hold_is_the_users_to_mend(checkpoint: Path) -> None:
    wrong = EngineConfig(model=str(checkpoint), tensor_parallel_size=2, device="cpu", num_kv_blocks=2**31 - 1)
    with (
        pytest.raises(EngineFailedError, match="cannot allocate 2147483647 KV blocks") as failure,
        EngineProcess(wrong),
    ):
        pass
    assert failure.value.status.is_user_error


def test_a_request_that_can_never_run_is_answered_with_its_error(checkpoint: Path) -> None:
    good = SamplingParams(max_tokens=4)
    bad = [
        Request("the prompt", [10**6], good),
        Request("logit_bias", [1], SamplingParams(max_tokens=4, logit_bias={3: 1.0, 10**6: 1.0})),
        Request("stop_token_ids", [1], SamplingParams(max_tokens=4, stop_token_ids=(-1,))),
    ]
    with EngineProcess(config(checkpoint, tp_size=1)) as engine:
        engine.submit([*bad, Request("good", [1], good)])
        outputs = {output.request_id: output for output in engine.receive()}
        for request in bad:
            assert str(outputs[request.request_id].error).startswith(
                f"{request.request_id} has token ids outside the vocabulary"
            )
        assert engine.receive()[0].request_id == "good"


def test_a_request_for_which_every_token_is_excluded_ends_alone(checkpoint: Path) -> None:
    vocab_size = ModelConfig.from_directory(checkpoint).vocab_size
    sampling = SamplingParams(max_tokens=4)
    nothing_left = SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=tuple(range(vocab_size)))
    with EngineProcess(config(checkpoint, tp_size=2)) as engine:
        engine.submit([Request("stuck", [1], nothing_left), Request("good", [1], sampling)])
        outputs = {output.request_id: output for output in engine.receive()}
        assert outputs["stuck"].finish_reason is FinishReason.ERROR
        assert "min_tokens" in str(outputs["stuck"].error)
        assert len(outputs["good"].token_ids) == 1


def test_an_aborted_request_frees_its_blocks_while_others_go_on(checkpoint: Path) -> None:
    with EngineProcess(config(checkpoint)) as engine:
        sampling = SamplingParams(max_tokens=200, temperature=0.0)
        engine.submit([Request("gone", [1, 2], sampling), Request("stays", [3, 4], sampling)])
        engine.receive()
        engine.submit(aborted=["gone"])
        tokens = engine.generate([Request("later", [5], SamplingParams(max_tokens=300, temperature=0.0))])
        assert len(tokens["later"]) == 300
        report = engine.wait_for_report()
        assert report.scheduler.num_free_kv_blocks == 64
        assert sum(report.scheduler.integrity_checks for report in engine.reports) > 0

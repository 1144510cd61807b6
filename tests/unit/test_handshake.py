from dataclasses import replace

import pytest

from engine.orchestrator.handshake import Agreement, Handshake, HandshakeError
from engine.protocol.config import EMBEDDED_MODEL, EngineConfig, RankSpec, config_hash
from engine.protocol.messages import Hello, Ready, Start, Started
from engine.protocol.model_config import ModelConfig
from tests.configs import model_config

MODEL = model_config()


def engine_config(max_model_len: int | None = None) -> EngineConfig:
    return EngineConfig(model=str(EMBEDDED_MODEL), tensor_parallel_size=2, max_model_len=max_model_len)


def handshake(engine: EngineConfig, model: ModelConfig = MODEL) -> Handshake:
    return Handshake(engine, model, epoch=1)


def hello(engine: EngineConfig, rank: int) -> Hello:
    return Hello(epoch=1, rank=rank, pid=100 + rank, host="here", device="cpu", config_hash=config_hash(engine))


def ready(rank: int, num_kv_blocks: int, fingerprint: str = "same") -> Ready:
    return Ready(
        epoch=1,
        rank=rank,
        fingerprint=fingerprint,
        num_kv_blocks=num_kv_blocks,
        kv_block_bytes=3,
        memory={"weights": 5},
    )


def complete(engine: EngineConfig, blocks: tuple[int, int], model: ModelConfig = MODEL) -> Handshake:
    group = handshake(engine, model)
    for rank in (1, 0):
        group.hear_hello(hello(engine, rank))
        assert not group.all_loaded
        group.hear_ready(ready(rank, blocks[rank]))
    return group


def test_the_group_is_complete_when_all_ranks_are_ready() -> None:
    group = complete(engine_config(), (8, 8))
    assert group.all_loaded
    assert [rank.pid for rank in group.ranks] == [100, 101]
    assert group.memory(8) == {"weights": 10, "kv_cache": 48}


def test_the_group_takes_steps_when_all_ranks_have_allocated() -> None:
    group = complete(engine_config(), (8, 8))
    group.hear_started(Started(epoch=1, rank=1))
    assert not group.all_started
    group.hear_started(Started(epoch=1, rank=0))
    assert group.all_started


def test_the_smallest_rank_decides_the_number_of_blocks_and_so_the_context() -> None:
    assert complete(engine_config(), (8, 3)).start() == Start(epoch=1, num_kv_blocks=3, max_model_len=48)


def test_the_models_own_context_is_the_limit_when_there_is_room() -> None:
    assert complete(engine_config(), (100, 100)).start().max_model_len == 128


def test_a_sliding_window_is_the_limit_where_it_is_smaller() -> None:
    assert complete(engine_config(), (100, 100), replace(MODEL, sliding_window=96)).start().max_model_len == 96


def test_a_context_that_was_asked_for_and_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="--max-model-len 100 does not fit: the KV cache holds 48 tokens"):
        complete(engine_config(max_model_len=100), (8, 3)).start()


def test_a_rank_with_another_configuration_is_refused() -> None:
    engine = engine_config()
    with pytest.raises(HandshakeError, match="rank 1 on here was started with another configuration"):
        handshake(engine).hear_hello(hello(engine_config(max_model_len=64), 1))


def test_ranks_with_different_weights_are_refused() -> None:
    group = handshake(engine_config())
    group.hear_ready(ready(0, 8))
    with pytest.raises(HandshakeError, match="ranks 0 and 1 loaded different weights"):
        group.hear_ready(ready(1, 8, fingerprint="other"))


def test_a_group_behind_another_begins_with_what_that_had() -> None:
    before = complete(engine_config(), (7, 9))
    agreements = [before.agreement]
    for rank in range(2):
        before.hear_started(Started(epoch=1, rank=rank))
    agreements.append(before.agreement)
    assert agreements == [None, Agreement(7, before.start().max_model_len, "same")]
    group = Handshake(engine_config(), MODEL, 2, agreements[1])
    for rank in range(2):
        group.hear_ready(ready(rank, 3))
    first = before.start()
    assert group.start() == Start(2, first.num_kv_blocks, first.max_model_len)


def test_a_group_with_other_weights_than_the_one_before_is_refused() -> None:
    group = Handshake(engine_config(), MODEL, 2, Agreement(7, 16, "other"))
    with pytest.raises(HandshakeError, match="others than those that the service began with"):
        group.hear_ready(ready(0, 7))
    Handshake(engine_config(), MODEL, 2, Agreement(7, 16)).hear_ready(ready(0, 7))  # what was before is not known


def test_a_launch_may_be_told_what_the_groups_before_had() -> None:
    spec = RankSpec(engine=engine_config(), epoch=3, run_dir="/nowhere")
    assert Agreement.of(spec) is None
    assert Agreement.of(replace(spec, num_kv_blocks=5, max_model_len=80)) == Agreement(5, 80)

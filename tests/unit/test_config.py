import pytest

from engine.protocol.config import EngineConfig, config_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be between 1 and 2147483647, not 0"),
        ({"block_size": -1}, "--block-size must be between 1"),
        ({"num_kv_blocks": 10**18}, "--num-kv-blocks must be between 1 and 2147483647"),
        ({"kv_cache_memory": 2**60}, "--kv-cache-memory must be between 1 and 281474976710656"),
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda, not 'tpu'"),
        ({"dtype": "int3"}, "--dtype must be one of"),
        ({"rank_timeout": 0.5}, "--rank-timeout must be between 1 and 86400 seconds, not 0.5"),
        ({"rank_timeout": float("nan")}, "--rank-timeout must be between 1 and 86400 seconds, not nan"),
        ({"num_kv_blocks": 1, "kv_cache_memory": 1}, "--num-kv-blocks and --kv-cache-memory both size the KV cache"),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)  # type: ignore[arg-type]


def test_a_switch_can_be_off() -> None:
    assert not EngineConfig(enable_prefix_caching=False).enable_prefix_caching


def test_two_configurations_share_a_hash_only_if_they_are_equal() -> None:
    assert config_hash(EngineConfig(max_num_seqs=3)) == config_hash(EngineConfig(max_num_seqs=3))
    assert config_hash(EngineConfig(max_num_seqs=3)) != config_hash(EngineConfig(max_num_seqs=4))

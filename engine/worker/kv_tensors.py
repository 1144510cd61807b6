"""The tensors behind the KV blocks, and how many of them fit into memory."""

import torch

from engine.attention.base import KVCache
from engine.protocol.config import EngineConfig
from engine.protocol.model_config import ModelConfig
from engine.worker import host

# Shares of the free memory that the cache may take when nobody sizes it; the rest is for activations and the host.
CPU_SHARE = 0.5
CUDA_SHARE = 0.9


def block_bytes(config: ModelConfig, *, block_size: int, num_kv_heads: int, dtype: torch.dtype) -> int:
    """Return the bytes that one KV block takes on a rank with `num_kv_heads` of the model's heads."""
    return 2 * config.num_hidden_layers * block_size * num_kv_heads * config.head_dim * dtype.itemsize


def num_blocks_that_fit(engine: EngineConfig, config: ModelConfig, *, bytes_per_block: int, free_memory: int) -> int:
    """Return the KV blocks that a rank should hold.

    Args:
        engine: its explicit sizes win; otherwise no more is taken than `max_num_seqs` full contexts could ever use.
        config: for the longest context.
        bytes_per_block: see `block_bytes`.
        free_memory: bytes that this rank may spend on the cache.

    Raises:
        ValueError: if not even one block fits.
    """
    if engine.num_kv_blocks is not None:
        return engine.num_kv_blocks
    if engine.kv_cache_memory is not None:
        fitting, source = engine.kv_cache_memory // bytes_per_block, "--kv-cache-memory"
    else:
        context = engine.max_model_len or config.longest_context
        most = engine.max_num_seqs * -(-context // engine.block_size)
        fitting, source = min(free_memory // bytes_per_block, most), "free memory"
    if fitting < 1:
        raise ValueError(f"{source} does not hold one KV block of {bytes_per_block} bytes")
    return fitting


def free_memory_share(device: torch.device, ranks_on_host: int, *, unloaded_bytes: int = 0) -> int:
    """Return the bytes of free memory on `device` that one rank may fill with KV blocks.

    Args:
        device: the rank's.
        ranks_on_host: how many ranks share this host's memory.
        unloaded_bytes: what each rank's weights will take that are not loaded yet.
    """
    if device.type == "cuda":  # pragma: cuda
        free, _ = torch.cuda.mem_get_info(device)
        return int(max(0, free - unloaded_bytes) * CUDA_SHARE)
    free = host.free_memory() - unloaded_bytes * ranks_on_host
    return int(max(0, free) * CPU_SHARE) // ranks_on_host


def allocate(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:
    """Return zeroed keys and values, a pair a layer. On CPU the pages are mapped when they are first written.

    Raises:
        ValueError: if the memory cannot be had.
    """
    shape = (config.num_hidden_layers, 2, num_blocks, block_size, num_kv_heads, config.head_dim)
    try:
        storage = torch.zeros(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:  # torch's out-of-memory errors, on CPU and CUDA
        size = num_blocks * block_bytes(config, block_size=block_size, num_kv_heads=num_kv_heads, dtype=dtype)
        message = f"cannot allocate {num_blocks} KV blocks ({size} bytes); lower --num-kv-blocks or --kv-cache-memory"
        raise ValueError(message) from error
    return [KVCache(layer[0], layer[1]) for layer in storage]

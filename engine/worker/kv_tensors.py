"""The tensors behind the KV blocks, and how many of them fit into memory."""

import math
import mmap

import torch
from torch import Tensor

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


def num_blocks_that_fit(
    engine: EngineConfig, config: ModelConfig, *, bytes_per_block: int, free_memory: int, most_memory: int
) -> int:
    """Return the KV blocks that a rank should hold.

    Args:
        engine: its explicit sizes win; otherwise no more is taken than `max_num_seqs` full contexts could ever use.
        config: for the longest context.
        bytes_per_block: see `block_bytes`.
        free_memory: see `free_memory_share`; what is taken when nobody sizes the cache.
        most_memory: see `largest_cache`; what an explicit size may not exceed.

    Raises:
        ValueError: if not even one block fits, or fewer than were asked for.
    """
    if engine.num_kv_blocks is not None:
        fitting, source = engine.num_kv_blocks, "--num-kv-blocks"
    elif engine.kv_cache_memory is not None:
        fitting, source = engine.kv_cache_memory // bytes_per_block, "--kv-cache-memory"
    else:
        context = engine.max_model_len or config.longest_context
        most = engine.max_num_seqs * -(-context // engine.block_size)
        fitting, source = min(free_memory // bytes_per_block, most), "free memory"
    if fitting < 1:
        raise ValueError(f"{source} does not hold one KV block of {bytes_per_block} bytes")
    if fitting * bytes_per_block > most_memory:
        raise ValueError(_too_large(fitting, bytes_per_block))
    return fitting


def _too_large(num_blocks: int, bytes_per_block: int) -> str:
    size = num_blocks * bytes_per_block
    return f"cannot allocate {num_blocks} KV blocks ({size} bytes); lower --num-kv-blocks or --kv-cache-memory"


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


def largest_cache(device: torch.device, ranks_on_host: int, *, weight_bytes: int, unloaded_bytes: int = 0) -> int:
    """Return the bytes above which `device` cannot hold one rank's cache, whatever else is ended or given up.

    On CPU that is the rank's part of all memory less its weights, since pages are taken one by one and others may free
    some until then. On CUDA it is what is free, since the cache is taken at once.

    Args:
        device: the rank's.
        ranks_on_host: how many ranks share this host's memory.
        weight_bytes: what each rank's weights take, loaded or not.
        unloaded_bytes: what of these is not loaded yet.
    """
    if device.type == "cuda":  # pragma: cuda
        free, _ = torch.cuda.mem_get_info(device)
        return free - unloaded_bytes
    return host.total_memory() // ranks_on_host - weight_bytes


def allocate(
    config: ModelConfig,
    *,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVCache]:
    """Return zeroed keys and values, a pair a layer. On CPU a page is taken when it is first written.

    Raises:
        ValueError: if the memory cannot be had.
    """
    shape = (config.num_hidden_layers, 2, num_blocks, block_size, num_kv_heads, config.head_dim)
    try:
        if device.type == "cpu":
            storage = _zeros_taken_when_written(shape, dtype)
        else:  # pragma: cuda
            storage = torch.zeros(shape, dtype=dtype, device=device)
    except (RuntimeError, OSError, OverflowError) as error:  # torch's, the kernel's, and a size of more than 64 bits
        bytes_per_block = block_bytes(config, block_size=block_size, num_kv_heads=num_kv_heads, dtype=dtype)
        raise ValueError(_too_large(num_blocks, bytes_per_block)) from error
    return [KVCache(layer[0], layer[1]) for layer in storage]


def _zeros_taken_when_written(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros in a mapping of their own: `torch.zeros` would write every page, and so take it, at once."""
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)

"""Predicts what a model takes, and how long it loads, without running it; docs/capacity.md shows what comes out.

For a model of L layers, hidden size h, vocabulary V, intermediate size m, a query and k KV heads of d, in numbers of b
bytes, split over p ranks, with ceil(x) the next multiple of p:

    a rank's parameters  n = e * ceil(V) / p * h  +  L * (block / p  +  2 * h)  +  h
    block                  = 2 * h * a * d  +  2 * h * max(k, p) * d  +  3 * h * ceil(m)
    weights                = n * b;  e is 1 if the embedding is the LM head too, else 2
    KV cache               = 2 * L * max(1, k / p) * d * b for each token, in whole blocks of tokens
    a rank's file          = weights + header + fillers
    memory of a rank       = weights + KV cache + what its process takes beside them

Biases, where a family has them, are added likewise. The header is the JSON text that names each tensor, so its length
follows from the layers themselves (`file_bytes`).

Loading, s being the weights, f the file, and all p ranks on one host:

    warm, CPU    = time of load() + s / (rate at which a rank touches what is in the page cache)
    cold, CPU    = time of load() + p * f / (bytes a second that the disk reads), where that is slower
    warm, device = time of load() + s / (bytes a second of one device's bus)
    cold, device = time of load() + the longer of p * f / disk and s / bus: copies overlap with reading
"""

from dataclasses import dataclass

import torch

from engine.checkpoint.layout import lay_out
from engine.checkpoint.metadata import NO_CHECKPOINT, file_texts
from engine.checkpoint.targets import targets_of
from engine.checkpoint.tensor_writer import file_size
from engine.communication.handler import CommunicationHandler
from engine.models.registry import build_model
from engine.parallel.base import padded_to
from engine.protocol.model_config import ModelConfig
from engine.worker.kv_tensors import block_bytes

BLOCK_SIZE = 16  # tokens, as serving takes by default


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What loading is bound by. Rates are in bytes a second."""

    load_seconds: float  # until load() returns, with nothing read yet
    touch_rate: float  # of one rank, from the page cache
    disk_rate: float  # of the host, all ranks together
    bus_rate: float  # from the host to one device


@dataclass(frozen=True, kw_only=True)
class LoadTime:
    """Seconds until all weights can be computed with."""

    warm_cpu: float
    cold_cpu: float
    warm_device: float
    cold_device: float


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What one rank of a model takes, in bytes."""

    weights: int
    file: int
    kv_cache: int
    overhead: int

    @property
    def memory(self) -> int:
        """All of it that is in memory."""
        return self.weights + self.kv_cache + self.overhead


def capacity_of(
    config: ModelConfig, tp_size: int, *, dtype: torch.dtype, context: int, sequences: int, overhead: int
) -> Capacity:
    """Predict what each of `tp_size` ranks takes.

    Args:
        config: the model.
        tp_size: ranks that it is split over.
        dtype: of weights and KV cache.
        context: tokens of each sequence.
        sequences: how many such contexts the KV cache holds.
        overhead: bytes of a rank's process beside weights and KV cache.

    Raises:
        ValueError: if the model cannot be split so.
    """
    config.check_tensor_parallel_size(tp_size)
    return Capacity(
        weights=weight_bytes(config, tp_size, dtype),
        file=file_bytes(config, tp_size, dtype),
        kv_cache=kv_bytes(config, tp_size, dtype, context=context, sequences=sequences),
        overhead=overhead,
    )


def weight_bytes(config: ModelConfig, tp_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of each rank's weights: padding, and KV heads that several ranks hold, included."""
    hidden = config.hidden_size
    embeddings = (1 if config.tie_word_embeddings else 2) * padded_to(config.vocab_size, tp_size) // tp_size * hidden
    blocks = config.num_hidden_layers * (_block_matrices(config, tp_size) + _block_vectors(config, tp_size))
    return (embeddings + blocks + hidden) * dtype.itemsize


def _block_matrices(config: ModelConfig, tp_size: int) -> int:
    """Return the numbers in one rank's matrices of a block: q, k, v and o, then gate, up and down."""
    query_heads, kv_heads = config.num_attention_heads // tp_size, config.local_kv_heads(tp_size)
    attention = (2 * query_heads + 2 * kv_heads) * config.head_dim
    return config.hidden_size * (attention + 3 * _local_intermediate(config, tp_size))


def _block_vectors(config: ModelConfig, tp_size: int) -> int:
    """Return the numbers in one rank's two norms and biases of a block; those of o and down are on each rank whole."""
    heads = config.num_attention_heads // tp_size + 2 * config.local_kv_heads(tp_size)
    qkv = config.qkv_bias * heads * config.head_dim
    mlp = config.mlp_bias * (2 * _local_intermediate(config, tp_size) + config.hidden_size)
    return 2 * config.hidden_size + qkv + config.o_bias * config.hidden_size + mlp


def _local_intermediate(config: ModelConfig, tp_size: int) -> int:
    return padded_to(config.intermediate_size, tp_size) // tp_size


def kv_bytes(config: ModelConfig, tp_size: int, dtype: torch.dtype, *, context: int, sequences: int) -> int:
    """Return the bytes of each rank's KV cache for so many sequences, which take whole blocks."""
    size = block_bytes(config, block_size=BLOCK_SIZE, num_kv_heads=config.local_kv_heads(tp_size), dtype=dtype)
    return sequences * -(-context // BLOCK_SIZE) * size


def file_bytes(config: ModelConfig, tp_size: int, dtype: torch.dtype) -> int:
    """Return the size of each rank's file: its layers' tensors behind the header that names them."""
    meta = torch.device("meta")
    model = build_model(config, CommunicationHandler.place(0, tp_size, meta), device=meta, dtype=dtype)
    tensors = lay_out(targets_of(model))
    texts = file_texts(NO_CHECKPOINT, 0, tp_size, 0)
    return file_size([(item.name, dtype, item.local_shape) for item in tensors], texts=texts)


def load_time(capacity: Capacity, tp_size: int, speeds: Speeds) -> LoadTime:
    """Predict how long `tp_size` ranks of one host load."""
    disk = tp_size * capacity.file / speeds.disk_rate
    bus = capacity.weights / speeds.bus_rate
    return LoadTime(
        warm_cpu=speeds.load_seconds + capacity.weights / speeds.touch_rate,
        cold_cpu=speeds.load_seconds + max(disk, capacity.weights / speeds.touch_rate),
        warm_device=speeds.load_seconds + bus,
        cold_device=speeds.load_seconds + max(disk, bus),
    )

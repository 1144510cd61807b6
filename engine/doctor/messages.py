"""What a rank of the doctor tells: `Hello`, then one `RankReport`, or `Failed`."""

from engine.protocol.messages import Message, Part


class Capacity(Part, frozen=True):
    """What the model would take on this rank, as serving computes it."""

    weight_bytes: int
    bytes_per_token: int  # of the weights, that one decode step reads
    free_memory: int  # bytes on the rank's device, before anything is loaded
    kv_block_bytes: int
    num_kv_blocks: int  # 0 if none fits
    error: str  # why none does
    best_read_bandwidth: float  # bytes a second from as much memory as `bytes_per_token`, all ranks at once


class RankReport(Message, frozen=True):
    """What one rank measured."""

    rank: int
    num_threads: int
    join_seconds: float  # to meet the other ranks
    are_sums_right: bool
    all_reduce_seconds: dict[int, list[float]]  # by size in bytes; empty for one rank
    read_bandwidth: float  # bytes a second from memory, all ranks at once: the median
    capacity: Capacity
    kernels: str = ""  # what it would compute with: an instruction set, or torch
    carrier: str = ""  # of collectives: see `CommunicationHandler.carrier`

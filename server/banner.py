"""What is printed once requests are taken."""

import logging
import socket
import sys

from engine.protocol.config import RankSpec
from engine.protocol.logs import fields_of
from engine.protocol.messages import GroupStatus
from engine.protocol.units import format_bytes
from server.logs import is_json

logger = logging.getLogger(__name__)


def banner(status: GroupStatus, spec: RankSpec, name: str, url: str) -> str:
    """Return a few lines: model, by its name in the API, ranks, memory, context and address, which is `url`."""
    ranks = [
        ", ".join(filter(None, (f"{rank.rank}: pid {rank.pid} on {rank.host}", rank.device, rank.threads)))
        for rank in status.ranks
    ]
    memory = ", ".join(f"{kind.replace('_', ' ')} {format_bytes(size)}" for kind, size in status.memory.items())
    promises = ", batch-invariant" * spec.engine.batch_invariant
    matrices = "" if spec.engine.quantization == "none" else f", {spec.engine.quantization} matrices"
    lines = [
        ("model", f"{name} ({spec.engine.model})"),
        *([("weights", f"{spec.weights} (shard cache)")] if spec.weights else []),
        *(("ranks" if index == 0 else "", rank) for index, rank in enumerate(ranks)),
        ("kernels", f"{status.kernels}{matrices}{promises}"),
        ("memory", f"{memory} (all ranks)"),
        ("KV cache", f"{status.num_kv_blocks} blocks of {spec.engine.block_size} tokens on each rank"),
        ("context", f"{status.max_model_len} tokens"),
        ("API", f"{url}/v1  (docs {url}/docs, metrics {url}/metrics)"),
    ]
    return "\n".join(["ryzanstein is ready", *(f"  {name:<9} {text}" for name, text in lines)])


def announce_ready(status: GroupStatus, spec: RankSpec, name: str, url: str) -> None:
    """Write the banner; to a log that is JSON, one record."""
    if not is_json():
        sys.stderr.write(banner(status, spec, name, url) + "\n")
        return
    fields = fields_of(
        url=url,
        model=name,
        epoch=status.epoch,
        tensor_parallel_size=spec.engine.tensor_parallel_size,
        pids=[rank.pid for rank in status.ranks],
        kernels=status.kernels,
        memory=status.memory,
        num_kv_blocks=status.num_kv_blocks,
        max_model_len=status.max_model_len,
    )
    logger.info("ryzanstein is ready: %s", url, extra=fields)


def listening_url(listener: socket.socket, scheme: str) -> str:
    """Return the address that `listener` is bound to, as a URL; any address is shown as this machine's."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

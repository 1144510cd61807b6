"""What is printed once requests are taken."""

import socket

from engine.protocol.config import RankSpec
from engine.protocol.messages import GroupStatus
from engine.protocol.units import format_bytes


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


def listening_url(listener: socket.socket, scheme: str) -> str:
    """Return the address that `listener` is bound to, as a URL; any address is shown as this machine's."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

"""Whether the model fits, and how fast it could be at best."""

from engine.doctor.messages import Capacity
from engine.doctor.rank import SMALL
from engine.doctor.subject import Subject
from engine.orchestrator.handshake import Handshake
from engine.protocol.checks import Check, Finding, failure, ok, warning
from engine.protocol.config import EngineConfig
from engine.protocol.messages import Ready, Start
from engine.protocol.model_config import ModelConfig
from engine.protocol.units import format_bytes, format_count, format_seconds

SECTION = "capacity"


def checks(subject: Subject) -> list[Check]:
    """Return this section's checks."""
    return [
        Check(SECTION, "weights", lambda: _weights(subject)),
        Check(SECTION, "KV cache", lambda: _kv_cache(subject)),
        Check(SECTION, "speed limit", lambda: _speed_limit(subject)),
    ]


def _weights(subject: Subject) -> Finding:
    shares_memory = subject.device(0).type == "cpu"
    return weights_fit([report.capacity for report in subject.all_reports()], shares_memory=shares_memory)


def weights_fit(capacities: list[Capacity], *, shares_memory: bool) -> Finding:
    """Compare weights with free memory: the host's, if ranks share it, else each device's."""
    total, free = sum(item.weight_bytes for item in capacities), min(item.free_memory for item in capacities)
    most = total if shares_memory else max(item.weight_bytes for item in capacities)
    where = "the host" if shares_memory else "a device"
    found = f"{format_bytes(max(item.weight_bytes for item in capacities))} on each rank, {format_bytes(total)} in all"
    if most > free:
        return failure(
            f"{found}; {where} has {format_bytes(free)} free", "use a smaller --dtype, another machine, or more devices"
        )
    return ok(f"{found}; {where} has {format_bytes(free)} free")


def _kv_cache(subject: Subject) -> Finding:
    capacities = [report.capacity for report in subject.all_reports()]
    engine, config = subject.engine, subject.usable_model()
    for item in capacities:
        if item.error:
            raise ValueError(item.error)
    start = agreed_start(engine, config, capacities)
    tokens = start.num_kv_blocks * engine.block_size
    per_token = format_bytes(capacities[0].kv_block_bytes / engine.block_size)
    size = format_bytes(start.num_kv_blocks * capacities[0].kv_block_bytes)
    contexts = tokens / start.max_model_len
    found = (
        f"{size} on each rank: {format_count(tokens)} tokens of {per_token}, "
        f"{contexts:.1f} full contexts of {start.max_model_len}"
    )
    shares_memory = subject.device(0).type == "cpu"
    missing = missing_memory(capacities, start.num_kv_blocks) if shares_memory else 0
    if missing > 0:
        return warning(
            f"{found}; once it is full, {format_bytes(missing)} more than is free now",
            "lower --num-kv-blocks or --kv-cache-memory, or end what else takes memory",
        )
    return ok(found)


def missing_memory(capacities: list[Capacity], num_kv_blocks: int) -> int:
    """Return how many bytes weights and full caches of ranks that share the host's memory take beyond what is free."""
    taken = sum(item.weight_bytes + num_kv_blocks * item.kv_block_bytes for item in capacities)
    return taken - min(item.free_memory for item in capacities)


def agreed_start(engine: EngineConfig, config: ModelConfig, capacities: list[Capacity]) -> Start:
    """Return what ranks with these capacities would begin with.

    Raises:
        ValueError: if the cache would not hold the context that was asked for.
    """
    handshake = Handshake(engine, config, epoch=0)
    for rank, item in enumerate(capacities):
        handshake.hear_ready(
            Ready(
                epoch=0,
                rank=rank,
                fingerprint="",
                num_kv_blocks=item.num_kv_blocks,
                kv_block_bytes=item.kv_block_bytes,
                memory={},
            )
        )
    return handshake.start()


def _speed_limit(subject: Subject) -> Finding:
    """Estimate from above, by the fastest of what was measured on the slowest rank.

    A decode step reads every weight once, and waits for two all-reduces a layer.
    """
    reports = subject.all_reports()
    reading = max(report.capacity.bytes_per_token / report.capacity.best_read_bandwidth for report in reports)
    read = format_bytes(max(report.capacity.bytes_per_token for report in reports))
    found = f"at most {format_count(1 / reading)} tokens/s for one request: each reads {read} of weights on every rank"
    if subject.tp_size == 1:
        return ok(found)
    waits = 2 * subject.usable_model().num_hidden_layers + 1
    latency = max(min(report.all_reduce_seconds[SMALL]) for report in reports)
    both = format_count(1 / (reading + waits * latency))
    return ok(
        f"{found}; at most {both} with the {waits} all-reduces of a token, {format_seconds(latency)} each at best"
    )

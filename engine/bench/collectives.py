"""`ryzanstein bench collectives`: what it takes ranks to exchange data, beside a plain copy of the same bytes."""

from collections.abc import Sequence

from engine.bench.collectives_messages import HIDDEN_SIZE, CollectiveSample, CollectivesSample, CollectivesTask
from engine.bench.collectives_report import Collective, CollectivesBenchmark
from engine.bench.figures import Figure
from engine.bench.rank_group import run_ranks
from engine.protocol.commands import BenchCollectivesCommand

CARRIERS = ("shared-memory", "gloo")
ELEMENT_BYTES = 2  # of bfloat16


def measure_collectives(command: BenchCollectivesCommand) -> CollectivesBenchmark:
    """Run ranks over shared memory and over gloo, in turns. Where memory cannot be shared, a note says why.

    Raises:
        RuntimeError: naming a rank that died.
    """
    found: dict[str, list[tuple[CollectivesSample, ...]]] = {carrier: [] for carrier in CARRIERS}
    notes: list[str] = []
    for _ in range(command.runs):
        for carrier, runs in list(found.items()):
            try:
                runs.append(_run(carrier, command.tensor_parallel_size))
            except ValueError as error:
                notes.append(str(error))
                del found[carrier]
    return CollectivesBenchmark(
        tensor_parallel_size=command.tensor_parallel_size,
        runs=command.runs,
        collectives=tuple(item for carrier, runs in found.items() for item in _figures(carrier, runs)),
        notes=tuple(notes),
    )


def _run(carrier: str, world_size: int) -> tuple[CollectivesSample, ...]:
    def make_task(results: str) -> CollectivesTask:
        return CollectivesTask(carrier=carrier, results=results)

    return run_ranks("engine.bench.collectives_rank", make_task, world_size, CollectivesSample)


def _figures(carrier: str, runs: Sequence[tuple[CollectivesSample, ...]]) -> list[Collective]:
    """Return the figures of each operation and size. They come in the same order from each rank of each run."""
    ranks_of_runs = [list(zip(*(rank.samples for rank in ranks), strict=True)) for ranks in runs]
    return [_collective(carrier, same) for same in zip(*ranks_of_runs, strict=True)]


def _collective(carrier: str, runs: Sequence[tuple[CollectiveSample, ...]]) -> Collective:
    """Return the figures of one operation of one size.

    Args:
        carrier: of the bytes.
        runs: of each run, what each rank measured.
    """
    first = runs[0][0]
    num_bytes = first.num_tokens * HIDDEN_SIZE * ELEMENT_BYTES
    seconds = [max(rank.seconds for rank in ranks) for ranks in runs]
    copies = [max(rank.copy_seconds for rank in ranks) for ranks in runs]
    splits = [
        (rank.seconds - rank.waiting, rank.waiting) for ranks in runs for rank in ranks if rank.waiting is not None
    ]
    transfers, waits = zip(*splits, strict=True) if splits else ((), ())
    return Collective(
        carrier=carrier,
        operation=first.operation,
        num_tokens=first.num_tokens,
        num_bytes=num_bytes,
        seconds=Figure.of(seconds),
        transfer_seconds=Figure.of(transfers) if splits else None,
        waiting_seconds=Figure.of(waits) if splits else None,
        rate=Figure.of([num_bytes / each for each in seconds]),
        copy_seconds=Figure.of(copies),
        copies=Figure.of([each / copy for each, copy in zip(seconds, copies, strict=True)]),
    )

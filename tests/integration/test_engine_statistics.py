"""What real ranks report of their steps, collectives and memory."""

import time

import pytest

from engine.protocol.config import EMBEDDED_MODEL, EngineConfig
from engine.protocol.messages import HistogramDelta, RankStats, Request, SamplingParams, StatsReport
from engine.protocol.model_config import ModelConfig
from engine.protocol.stats import HOST_MEMORY_KINDS, PHASES
from tests.engine_process import EngineProcess

NUM_SEQUENCES, PROMPT, NUM_STEPS = 2, 20, 120
NUM_TOKENS = NUM_SEQUENCES * (PROMPT + NUM_STEPS - 1)  # that are computed: the last of each is not
REPORT_SECONDS = 60.0  # in which all ranks tell what they did; they take about one


class Measured:
    """What ranks tell of sequences that are in one batch from their first step to their last."""

    def __init__(self, tp_size: int, *, step_timing: bool = True) -> None:
        self.tp_size = tp_size
        sampling = SamplingParams(max_tokens=NUM_STEPS)
        requests = [Request(str(number), [5 + number] * PROMPT, sampling) for number in range(NUM_SEQUENCES)]
        config = EngineConfig(tensor_parallel_size=tp_size, num_kv_blocks=512, step_timing=step_timing)
        with EngineProcess(config) as engine:
            self.reports = engine.reports
            began = time.perf_counter()
            engine.generate(requests)
            self.seconds = time.perf_counter() - began
            while not self._is_complete(step_timing):
                report = engine.channel.receive(REPORT_SECONDS)
                assert isinstance(report, StatsReport), "not all ranks have told what they did"
                self.reports.append(report)

    def _is_complete(self, step_timing: bool) -> bool:
        """Whether all ranks have told of all steps; of one that times none, whether it told more than its start."""
        if sum(report.scheduler.steps for report in self.reports) < NUM_STEPS:
            return False
        if step_timing:
            return all(count_of(self.phase(rank, "compute")) == NUM_STEPS for rank in range(self.tp_size))
        return all(len(self.stats(rank)) > 1 for rank in range(self.tp_size))

    def stats(self, rank: int) -> list[RankStats]:
        return [stats for report in self.reports for stats in report.ranks if stats.rank == rank]

    def phase(self, rank: int, name: str) -> list[HistogramDelta]:
        return [stats.phases[name] for stats in self.stats(rank) if name in stats.phases]

    def collective(self, rank: int, operation: str) -> list[HistogramDelta]:
        return [stats.collectives[operation] for stats in self.stats(rank) if operation in stats.collectives]


def count_of(deltas: list[HistogramDelta]) -> int:
    return sum(sum(delta.counts) for delta in deltas)


def sum_of(deltas: list[HistogramDelta]) -> float:
    return sum(delta.sum for delta in deltas)


@pytest.fixture(scope="module", params=[1, 2, 4])
def measured(request: pytest.FixtureRequest) -> Measured:
    return Measured(request.param)


def phases_add_up(measured: Measured) -> bool:
    total = sum(sum_of(measured.phase(0, name)) for name in PHASES)
    return 0.9 * measured.seconds < total < measured.seconds


def test_the_phases_of_rank_0_add_up_to_the_time_that_the_steps_took(measured: Measured) -> None:
    phases = {name: measured.phase(0, name) for name in PHASES}
    assert {count_of(deltas) for deltas in phases.values()} == {NUM_STEPS}
    # Those who submit and receive may have waited for a processor, in up to four of five runs.
    assert phases_add_up(measured) or any(phases_add_up(Measured(measured.tp_size)) for _ in range(4))
    assert all(sum_of(deltas) > 0 for name, deltas in phases.items() if measured.tp_size > 1 or name != "communicate")


def test_the_other_ranks_compute_and_communicate_within_that_time(measured: Measured) -> None:
    for rank in range(1, measured.tp_size):
        assert {name for stats in measured.stats(rank) for name in stats.phases} == {"compute", "communicate"}
        seconds = sum(sum_of(measured.phase(rank, name)) for name in ("compute", "communicate"))
        assert 0 < seconds < measured.seconds


def test_what_a_rank_communicates_is_its_collectives(measured: Measured) -> None:
    for rank in range(measured.tp_size):
        operations = ("all_reduce", "gather")
        seconds = sum(sum_of(measured.collective(rank, operation)) for operation in operations)
        assert sum_of(measured.phase(rank, "communicate")) == pytest.approx(seconds, rel=1e-6)


def test_collectives_are_counted_with_their_bytes(measured: Measured) -> None:
    model = ModelConfig.from_directory(EMBEDDED_MODEL)
    num_all_reduces = 2 * model.num_hidden_layers + 1  # attention and MLP of each layer; the embedding
    row_bytes = model.hidden_size * 2  # bfloat16
    for rank in range(measured.tp_size) if measured.tp_size > 1 else ():
        assert count_of(measured.collective(rank, "all_reduce")) == NUM_STEPS * num_all_reduces
        assert count_of(measured.collective(rank, "gather")) == NUM_STEPS
        num_bytes = sum(stats.collective_bytes.get("all_reduce", 0) for stats in measured.stats(rank))
        assert num_bytes == NUM_TOKENS * num_all_reduces * row_bytes
        assert {stats.backend for stats in measured.stats(rank)} == {"shared-memory"}
        assert {stats.world_size for stats in measured.stats(rank)} == {measured.tp_size}


def test_the_ranks_skew_is_known_of_each_step(measured: Measured) -> None:
    skews = [report.rank_skew for report in measured.reports if report.rank_skew is not None]
    assert count_of(skews) == (NUM_STEPS if measured.tp_size > 1 else 0)
    computing = [sum_of(measured.phase(rank, "compute")) for rank in range(measured.tp_size)]
    assert max(computing) - min(computing) <= sum_of(skews) + 1e-9 <= sum(computing)


def test_batch_sizes_and_tokens_of_steps_are_counted(measured: Measured) -> None:
    sizes = [report.scheduler.batch_sizes for report in measured.reports if report.scheduler.batch_sizes is not None]
    tokens = [report.scheduler.step_tokens for report in measured.reports if report.scheduler.step_tokens is not None]
    assert (count_of(sizes), sum_of(sizes)) == (NUM_STEPS, NUM_STEPS * NUM_SEQUENCES)
    assert (count_of(tokens), sum_of(tokens)) == (NUM_STEPS, NUM_TOKENS)


def test_each_rank_tells_its_memory(measured: Measured) -> None:
    for rank in range(measured.tp_size):
        memory = measured.stats(rank)[-1].memory
        assert set(memory) == set(HOST_MEMORY_KINDS)
        assert memory["weights"] + memory["kv_cache"] <= memory["resident"] <= memory["resident_peak"] * 1.01
        assert (memory["shared"] > 0) == (measured.tp_size > 1)
        assert 0 < measured.stats(rank)[-1].weights_resident_ratio <= 1


def test_without_step_timing_no_time_is_told_and_all_else_is() -> None:
    untimed = Measured(2, step_timing=False)
    for rank in range(2):
        for stats in untimed.stats(rank):
            assert (stats.phases, stats.collectives, stats.waiting, stats.collective_bytes) == ({}, {}, {}, {})
            assert set(stats.memory) == set(HOST_MEMORY_KINDS)
    assert [report.rank_skew for report in untimed.reports] == [None] * len(untimed.reports)
    assert sum(report.scheduler.steps for report in untimed.reports) == NUM_STEPS

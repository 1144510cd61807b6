"""When a rank reports, and what."""

import mmap
import os
import time
from pathlib import Path

import pytest
import torch

from engine.checkpoint.mapped_memory import MappedMemory, map_privately
from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import RankReport
from engine.protocol.stats import HOST_MEMORY_KINDS
from engine.worker.statistics import (
    IDLE_REPORT_INTERVAL,
    REPORT_INTERVAL,
    RankStatistics,
    device_memory,
    process_memory,
)
from engine.worker.step_times import FollowerStepTimes, NoStepTimes
from tests.distributed import run_on_ranks

CPU = torch.device("cpu")
FIXED = {"weights": 123, "kv_cache": 45}


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def make_statistics() -> RankStatistics:
    return RankStatistics(CommunicationHandler(CPU), FIXED, MappedMemory([]), NoStepTimes(), epoch=3)


@pytest.mark.usefixtures("clock")
def test_a_first_report_is_due_at_once() -> None:
    assert make_statistics().seconds_until_due() == 0


def test_without_work_since_the_last_report_the_next_is_due_later(clock: Clock) -> None:
    statistics = make_statistics()
    statistics.take()
    assert statistics.seconds_until_due() == IDLE_REPORT_INTERVAL
    clock.now += 10 * REPORT_INTERVAL
    assert statistics.seconds_until_due() == IDLE_REPORT_INTERVAL - 10 * REPORT_INTERVAL > 0


def test_work_is_reported_an_interval_after_the_last_report(clock: Clock) -> None:
    statistics = make_statistics()
    statistics.take()
    clock.now += REPORT_INTERVAL / 4
    statistics.note_work()
    assert statistics.seconds_until_due() == REPORT_INTERVAL * 3 / 4
    clock.now += REPORT_INTERVAL * 3 / 4
    assert statistics.seconds_until_due() == 0


def test_a_late_report_is_due_now_and_not_in_the_past(clock: Clock) -> None:
    statistics = make_statistics()
    statistics.take()
    statistics.note_work()
    clock.now += 10 * REPORT_INTERVAL
    assert statistics.seconds_until_due() == 0


def test_the_next_interval_begins_when_a_report_is_taken(clock: Clock) -> None:
    statistics = make_statistics()
    clock.now += 7.5
    statistics.take()
    statistics.note_work()
    assert statistics.seconds_until_due() == REPORT_INTERVAL


def reports_after_work(group: CommunicationHandler) -> list[RankReport]:
    """Report after a step of three collectives, after one of one, and after none."""
    step_times = FollowerStepTimes(group.run_timer())
    statistics = RankStatistics(group, FIXED, MappedMemory([]), step_times, epoch=3)
    reports = []
    for num_collectives in (3, 1):
        step_times.begin_run()
        for _ in range(num_collectives):
            group.all_reduce(torch.ones(2))
        step_times.end_run()
        reports.append(statistics.take())
    return [*reports, statistics.take()]


def test_steps_and_collectives_are_counted_once_each_by_the_rank_that_took_part() -> None:
    for rank, reports in enumerate(run_on_ranks(reports_after_work, 2)):
        stats = [report.stats for report in reports]
        assert [(each.epoch, each.rank) for each in stats] == [(3, rank)] * 3
        assert [(each.backend, each.world_size) for each in stats] == [("shared-memory", 2)] * 3
        assert [sum(each.collectives["all_reduce"].counts) for each in stats[:2]] == [3, 1]
        assert [each.collective_bytes for each in stats] == [{"all_reduce": 24}, {"all_reduce": 8}, {}]
        for report in reports[:2]:
            phases = report.stats.phases
            assert {name: sum(delta.counts) for name, delta in phases.items()} == {"compute": 1, "communicate": 1}
            assert phases["communicate"].sum == pytest.approx(report.stats.collectives["all_reduce"].sum)
            assert report.compute_seconds == [phases["compute"].sum]
        assert (stats[2].collectives, stats[2].phases, reports[2].compute_seconds) == ({}, {}, [])


def test_a_report_has_the_fixed_memory_and_what_the_process_takes_now() -> None:
    memory = make_statistics().take().stats.memory
    assert set(memory) == set(HOST_MEMORY_KINDS)
    assert {kind: memory[kind] for kind in FIXED} == FIXED


def test_the_memory_of_a_process_is_what_the_kernel_says_in_bytes() -> None:
    with mmap.mmap(-1, 64 << 20) as shared:  # anonymous memory that processes share counts as files in memory
        shared[:] = b"x" * len(shared)
        with_it = process_memory(CPU)
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    present = int(line.split()[1]) * 1024
    without = process_memory(CPU)
    assert without["resident"] == pytest.approx(present, rel=0.05)
    assert with_it["shared"] - without["shared"] == pytest.approx(64 << 20, rel=0.05)
    assert without["resident_peak"] >= present + (32 << 20)


def test_a_host_has_more_than_it_can_still_give() -> None:
    memory = process_memory(CPU)
    assert 0 < memory["host_available"] < memory["host_total"]


def test_weights_that_are_no_mapped_files_are_in_memory() -> None:
    stats = make_statistics().take().stats
    assert (stats.weights_resident_ratio, stats.memory["weights_resident"]) == (1.0, FIXED["weights"])


def test_of_mapped_weights_the_share_that_is_in_memory_is_told(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(64 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = MappedMemory([(str(path), content := map_privately(file.fileno(), 64 << 20))])
    statistics = RankStatistics(CommunicationHandler(CPU), FIXED, mapped, NoStepTimes(), epoch=3)
    before = statistics.take().stats.weights_resident_ratio
    content[: 32 << 20].sum()
    after = statistics.take().stats
    assert before < 0.1
    assert 0.45 < after.weights_resident_ratio < 0.9  # the system reads ahead
    assert after.memory["weights_resident"] == round(FIXED["weights"] * after.weights_resident_ratio)


def test_memory_of_a_device_is_reported_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("memory_allocated", "memory_reserved", "max_memory_allocated")):
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: 77 + number)
    assert device_memory(torch.device("cuda", 0)) == {
        "device_allocated": 77,
        "device_reserved": 78,
        "device_peak": 79,
    }
    assert device_memory(CPU) == {}

"""When a rank reports, and what."""

import time
from pathlib import Path

import pytest
import torch

from engine.checkpoint.mapped_memory import MappedMemory
from engine.communication.handler import CommunicationHandler
from engine.protocol.messages import RankStats
from engine.worker.statistics import REPORT_INTERVAL, RankStatistics, process_memory
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
    return RankStatistics(CommunicationHandler(CPU), FIXED, MappedMemory([]), epoch=3)


@pytest.mark.usefixtures("clock")
def test_a_first_report_is_due_at_once() -> None:
    assert make_statistics().seconds_until_due() == 0


def test_nothing_is_due_without_work_since_the_last_report(clock: Clock) -> None:
    statistics = make_statistics()
    statistics.take()
    assert statistics.seconds_until_due() is None
    clock.now += 10 * REPORT_INTERVAL
    assert statistics.seconds_until_due() is None


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


def reports_after_work(group: CommunicationHandler) -> list[RankStats]:
    """Report after three collectives, after one more, and after none."""
    statistics = RankStatistics(group, FIXED, MappedMemory([]), epoch=3)
    reports = []
    for num_collectives in (3, 1, 0):
        for _ in range(num_collectives):
            group.all_reduce(torch.ones(2))
        reports.append(statistics.take())
    return reports


def test_collectives_are_counted_once_each_by_the_rank_that_took_part() -> None:
    for rank, reports in enumerate(run_on_ranks(reports_after_work, 2)):
        assert [(report.epoch, report.rank) for report in reports] == [(3, rank)] * 3
        assert [sum(report.collectives["all_reduce"].counts) for report in reports[:2]] == [3, 1]
        assert all(report.collectives["all_reduce"].sum > 0 for report in reports[:2])
        assert reports[2].collectives == {}


def test_a_report_has_the_fixed_memory_and_what_the_process_takes_now() -> None:
    memory = make_statistics().take().memory
    assert set(memory) == {"weights", "weights_resident", "kv_cache", "resident"}
    assert {kind: memory[kind] for kind in FIXED} == FIXED


def test_resident_memory_is_what_the_kernel_says_in_bytes() -> None:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    assert process_memory(CPU)["resident"] == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


def test_device_memory_is_reported_for_a_cuda_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 77 if device.type == "cuda" else 0)
    assert process_memory(torch.device("cuda", 0))["device_allocated"] == 77
    assert "device_allocated" not in process_memory(CPU)

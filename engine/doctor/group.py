"""Real rank processes: started as in serving, they meet, add up, and measure what the model will live on."""

import statistics
import sys
import time
from contextlib import ExitStack

import zmq

from engine.doctor.messages import RankReport
from engine.doctor.rank import LARGE, SMALL
from engine.doctor.subject import Subject
from engine.kernels.cpu_kernels import DTYPES
from engine.kernels.library import fastest_library
from engine.kernels.torch_kernels import TORCH_KERNELS
from engine.orchestrator.group import SETTLE_SECONDS
from engine.orchestrator.handshake import Handshake, HandshakeError
from engine.orchestrator.launcher import RankProcesses
from engine.orchestrator.loss import diagnose
from engine.protocol.channel import Channel
from engine.protocol.checks import Check, Finding, MissingBasisError, failure, ok, skipped, warning
from engine.protocol.messages import Failed, Hello, Message
from engine.protocol.units import format_bytes, format_seconds
from engine.worker.device import choose_dtype, num_cuda_devices

SECTION = "ranks"
RANK_COMMAND = (sys.executable, "-P", "-m", "engine.doctor.rank")
REPORT_SECONDS = 180.0  # for all ranks to start, meet and measure; a few seconds on an idle machine
POLL_MILLISECONDS = 100
SLOW_ALL_REDUCE = 5e-3  # seconds for `LARGE` between ranks of one machine


def checks(subject: Subject) -> list[Check]:
    """Return this section's checks."""
    return [
        Check(SECTION, "devices", lambda: _devices(subject)),
        Check(SECTION, "processes", lambda: _processes(subject)),
        Check(SECTION, "kernels", lambda: _kernels(subject)),
        Check(SECTION, "all-reduce", lambda: _all_reduce(subject)),
        Check(SECTION, "memory bandwidth", lambda: _bandwidth(subject)),
    ]


def _devices(subject: Subject) -> Finding:
    """Pair ranks with devices, as each rank does."""
    engine, count = subject.engine, num_cuda_devices()
    devices = [str(subject.device(rank)) for rank in range(subject.tp_size)]
    found = "all ranks on the CPU" if set(devices) == {"cpu"} else _pairs(devices)
    if engine.device == "auto" and 0 < count < subject.tp_size:
        return warning(
            f"{found}: {count} CUDA device(s) are too few for {subject.tp_size} ranks",
            f"--tensor-parallel-size {count}, or less, uses them",
        )
    return ok(found)


def _pairs(devices: list[str]) -> str:
    return ", ".join(f"rank {rank} on {device}" for rank, device in enumerate(devices))


def _processes(subject: Subject) -> Finding:
    """Run the ranks to their reports."""
    if not subject.is_split:
        raise MissingBasisError("a model that splits over the ranks")
    problem = _run_ranks(subject)
    if problem:
        return failure(problem)
    if not all(report.are_sums_right for report in subject.reports):
        wrong = [str(report.rank) for report in subject.reports if not report.are_sums_right]
        return failure(f"an all-reduce gave wrong sums on rank {', '.join(wrong)}")
    threads = sorted({report.num_threads for report in subject.reports})
    each = f"{'-'.join(map(str, threads))} thread(s) each"
    if subject.tp_size == 1:
        return ok(f"one rank started, {each}")
    joined = max(report.join_seconds for report in subject.reports)
    return ok(f"{subject.tp_size} ranks met in {format_seconds(joined)}, {each}; their sums are right")


def _run_ranks(subject: Subject) -> str:
    """Start the ranks and collect what they tell, into `subject`; return why that failed, or nothing."""
    spec = subject.spec
    with ExitStack() as stack:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stack.callback(context.destroy, linger=0)
        controls = [Channel(context, spec.epoch, Hello, RankReport, Failed) for _ in range(subject.tp_size)]
        for rank, control in enumerate(controls):
            control.bind(spec.control_endpoint(rank))
        ranks = RankProcesses(subject.spec_path, subject.tp_size, RANK_COMMAND)
        stack.callback(ranks.kill)
        return _listen(subject, controls, ranks)


def _listen(subject: Subject, controls: list[Channel], ranks: RankProcesses) -> str:
    handshake = Handshake(subject.engine, subject.usable_model(), subject.spec.epoch)
    reports: dict[int, RankReport] = {}
    deadline = time.monotonic() + REPORT_SECONDS
    while len(reports) < subject.tp_size:
        messages = _take(controls)
        if ranks.dead() or any(isinstance(message, Failed) for message in messages):
            time.sleep(SETTLE_SECONDS)
            return diagnose(messages + _take(controls), ranks).cause
        try:
            _hear(messages, handshake, reports)
        except HandshakeError as error:
            return str(error)
        if time.monotonic() > deadline:
            silent = ", ".join(str(rank) for rank in range(subject.tp_size) if rank not in reports)
            return f"rank {silent} did not answer within {format_seconds(REPORT_SECONDS)}"
        time.sleep(POLL_MILLISECONDS / 1000)
    subject.reports = [reports[rank] for rank in sorted(reports)]
    return ""


def _take(controls: list[Channel]) -> list[Message]:
    messages = []
    for control in controls:
        while (message := control.receive(0)) is not None:
            messages.append(message)
    return messages


def _hear(messages: list[Message], handshake: Handshake, reports: dict[int, RankReport]) -> None:
    for message in messages:
        if isinstance(message, Hello):
            handshake.hear_hello(message)
        elif isinstance(message, RankReport):
            reports[message.rank] = message


def _kernels(subject: Subject) -> Finding:
    """Tell what the ranks would compute with, and why not with something faster."""
    found = ", ".join(sorted({report.kernels for report in subject.all_reports()}))
    if subject.engine.kernels != "auto" or found != TORCH_KERNELS.name or subject.device(0).type != "cpu":
        return ok(f"{found}, batch-invariant" if subject.engine.batch_invariant else found)
    if choose_dtype(subject.engine, subject.usable_model()) not in DTYPES:
        return warning(f"{found}: the C++ kernels compute in float32 and bfloat16 only", "another --dtype is faster")
    try:
        fastest_library()
    except OSError as error:
        hint = "with a C++ compiler, `python -m engine.kernels.build` compiles them"
        return warning(f"{found}, slower than C++: {error}", hint)
    return ok(found)


def _all_reduce(subject: Subject) -> Finding:
    return all_reduce_times(subject.all_reports())


def all_reduce_times(reports: list[RankReport]) -> Finding:
    """Tell median and most of all ranks' times; on one machine a MiB takes less than 5 ms."""
    if len(reports) == 1:
        return skipped("one rank has nobody to wait for")
    small, large = ([seconds for report in reports for seconds in report.all_reduce_seconds[n]] for n in (SMALL, LARGE))
    found = f"{reports[0].carrier}: {_times(SMALL, small)}; {_times(LARGE, large)}"
    if statistics.median(large) > SLOW_ALL_REDUCE:
        return warning(
            f"{found}: more than {format_seconds(SLOW_ALL_REDUCE)}",
            "look for other load, fewer cores than threads, or a quota that pauses ranks",
        )
    return ok(found)


def _times(size: int, seconds: list[float]) -> str:
    median, most = format_seconds(statistics.median(seconds)), format_seconds(max(seconds))
    return f"{format_bytes(size)} in {median} (median; at most {most})"


def _bandwidth(subject: Subject) -> Finding:
    each = [report.read_bandwidth for report in subject.all_reports()]
    ranks = "" if len(each) == 1 else f": {', '.join(f'{value / 1e9:.1f}' for value in each)}"
    return ok(f"{sum(each) / 1e9:.1f} GB/s read, all ranks at once{ranks}")

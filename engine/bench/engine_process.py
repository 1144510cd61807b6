"""A real engine, orchestrator and ranks, asked over its sockets as the server asks it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec
import zmq

from engine.protocol.channel import Channel
from engine.protocol.config import EngineConfig, RankSpec
from engine.protocol.messages import (
    GroupState,
    GroupStatus,
    RankStats,
    Request,
    RequestBatch,
    SamplingParams,
    StatsReport,
    TokenBatch,
    TokenOutput,
)

ORCHESTRATOR = (sys.executable, "-P", "-m", "engine.orchestrator")
POLL_SECONDS = 0.2  # in which a group that is gone without a word is noticed
STOP_SECONDS = 2.5  # for an orderly end, before everything is killed
REPORT_SECONDS = 5.0  # in which the engine reports after its last token; it takes about one


class Arrival(NamedTuple):
    """When one step's tokens came."""

    seconds: float  # since the requests were sent
    num_tokens: int


class CollectiveSeconds(NamedTuple):
    """How long one rank was in collectives."""

    transfer: float = 0.0  # copying, adding and the hand-over; where waiting is not known, that too
    waiting: float = 0.0  # for slower ranks

    def plus(self, stats: RankStats) -> "CollectiveSeconds":
        """Return it with what a rank has reported."""
        whole, waiting = (sum(delta.sum for delta in times.values()) for times in (stats.collectives, stats.waiting))
        return CollectiveSeconds(self.transfer + whole - waiting, self.waiting + waiting)


class EngineProcess:
    """`with EngineProcess(config) as engine:` is ready inside the block and gone after it.

    Args:
        config: of the engine.
        threads: of each rank; None lets the ranks divide the cores.

    Raises:
        ValueError: (from here on) what the engine says of what a user did.
        RuntimeError: what else ended it.
    """

    def __init__(self, config: EngineConfig, threads: int | None) -> None:
        self._environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
        self._folder = tempfile.mkdtemp(prefix="ryzanstein-", dir="/tmp")  # paths of sockets end at 107 bytes
        self._spec = RankSpec(engine=config, epoch=1, run_dir=self._folder)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._status_channel = Channel(self._context, None, GroupStatus)
        self._channel = Channel(self._context, self._spec.epoch, TokenBatch, StatsReport)
        self._process: subprocess.Popen[bytes] | None = None
        self._next_id = 0
        self.pids: list[int] = []
        self.kernels = ""  # what the ranks compute with
        self.memory: dict[int, Mapping[str, int]] = {}  # of each rank, as it last reported
        self._collective_seconds: dict[int, CollectiveSeconds] = {}
        self._silent: set[int] = set()  # ranks that have not reported since they were waited for

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            _end(self._process)
        self._channel.close()
        self._status_channel.close()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._status_channel.bind(self._spec.status_endpoint)
        spec_path = Path(self._folder) / "spec.json"
        spec_path.write_bytes(msgspec.json.encode(self._spec))
        self._process = subprocess.Popen(
            [*ORCHESTRATOR, str(spec_path)],
            env=self._environment,
            stdin=subprocess.PIPE,  # its end is the orchestrator's sign to end
            stdout=sys.stderr,
            start_new_session=True,
        )
        while (status := self._hear(POLL_SECONDS)) is None or status.state is not GroupState.READY:
            pass
        self.pids = [rank.pid for rank in sorted(status.ranks, key=lambda info: info.rank)]
        self.kernels = status.kernels
        self._channel.connect(status.engine_endpoint)

    def _hear(self, seconds: float) -> GroupStatus | None:
        """Return the next word of the orchestrator, None if there is none for so long."""
        assert self._process is not None
        is_gone = self._process.poll() is not None
        status = self._status_channel.receive(0 if is_gone else seconds)
        if isinstance(status, GroupStatus):
            if status.state is GroupState.FAILED:
                raise (ValueError if status.is_user_error else RuntimeError)(status.error)
            if status.recovery is not None:  # what was asked of the ranks is lost with them
                raise RuntimeError(status.recovery.cause)
            return status
        if is_gone:
            raise RuntimeError(f"the orchestrator exited with code {self._process.returncode}")
        return None

    # --- requests ----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[list[int]], max_tokens: int) -> list[Arrival]:
        """Continue prompts greedily, by so many tokens each, all at once; return when tokens came."""
        requests = [self._request(prompt, max_tokens) for prompt in prompts]
        missing = len(prompts)
        arrivals = []
        began = time.perf_counter()
        self._channel.send(RequestBatch(epoch=self._spec.epoch, new=requests))
        while missing:
            batch = self._receive()
            if batch is not None:
                num_tokens = sum(len(output.token_ids) for output in batch.outputs)
                arrivals.append(Arrival(time.perf_counter() - began, num_tokens))
                missing -= sum(map(_has_ended, batch.outputs))
        return arrivals

    def take_collective_seconds(self) -> list[CollectiveSeconds]:
        """Return how long each rank was in collectives since this was last asked.

        To be asked after a step: it waits for the ranks' reports, which follow within a second.
        """
        self._silent = set(range(len(self.pids)))
        deadline = time.monotonic() + REPORT_SECONDS
        while self._silent and time.monotonic() < deadline:
            self._receive()
        seconds, self._collective_seconds = self._collective_seconds, {}
        return [seconds.get(rank, CollectiveSeconds()) for rank in range(len(self.pids))]

    def _request(self, prompt: list[int], max_tokens: int) -> Request:
        self._next_id += 1
        return Request(str(self._next_id), prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0))

    def _receive(self) -> TokenBatch | None:
        """Return the next step's tokens, None if there are none for a moment; keep what ranks report."""
        message = self._channel.receive(POLL_SECONDS)
        if isinstance(message, TokenBatch):
            return message
        if isinstance(message, StatsReport):
            for stats in message.ranks:
                self._keep(stats)
        self._hear(0)
        return None

    def _keep(self, stats: RankStats) -> None:
        self._collective_seconds[stats.rank] = self._collective_seconds.get(stats.rank, CollectiveSeconds()).plus(stats)
        self.memory[stats.rank] = stats.memory
        self._silent.discard(stats.rank)


def _has_ended(output: TokenOutput) -> bool:
    if output.error is not None:
        raise ValueError(output.error)
    return output.finish_reason is not None


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the orchestrator and its ranks, by force if they take long."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # raised when the whole group is gone, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

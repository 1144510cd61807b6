"""A real engine, orchestrator and ranks, driven over its sockets without HTTP."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from engine.protocol.channel import Channel
from engine.protocol.config import EngineConfig, RankSpec
from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    Request,
    RequestBatch,
    StatsReport,
    TokenBatch,
    TokenOutput,
)
from tests.kernels import with_kernels_of_the_suite

START_SECONDS = 120.0  # generous: only a hang should exceed it
OUTPUT_SECONDS = 120.0


class EngineFailedError(RuntimeError):
    """The group reported FAILED."""

    def __init__(self, status: GroupStatus) -> None:
        super().__init__(status.error)
        self.status = status


class EngineProcess:
    """`with EngineProcess(config) as engine:` is READY inside the block and gone after it.

    Args:
        config: the options.
        command: of the orchestrator, to which the path of the spec is appended.
        spec: what it says beside the configuration and the folder.
    """

    def __init__(
        self, config: EngineConfig, command: Sequence[str] = ("-P", "-m", "engine.orchestrator"), **spec: Any
    ) -> None:
        self._command = command
        self._folder = tempfile.TemporaryDirectory(prefix="ryzanstein-test-", dir="/tmp")
        engine = with_kernels_of_the_suite(config)
        self.spec = RankSpec(**{"engine": engine, "epoch": 7, "run_dir": self._folder.name, **spec})
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.status_channel = Channel(self._context, None, GroupStatus)
        self.channel = Channel(self._context, self.spec.epoch, TokenBatch, StatsReport)
        self.reports: list[StatsReport] = []
        self.statuses: list[GroupStatus] = []
        self.preemptions = 0

    def __enter__(self) -> Self:
        self.status_channel.bind(self.spec.status_endpoint)
        spec_path = Path(self.spec.run_dir) / "spec.json"
        spec_path.write_bytes(msgspec.json.encode(self.spec))
        self.process = subprocess.Popen(
            [sys.executable, *self._command, str(spec_path)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.channel.close()
        self.status_channel.close()
        self._context.destroy(linger=0)
        self._folder.cleanup()

    def wait_until_ready(self) -> GroupStatus:
        """Wait until a group is READY, and be its server from here on; what the one before had to do is lost."""
        self.status = self.wait_for(GroupState.READY)
        self.spec = replace(self.spec, epoch=self.status.epoch)
        self.channel.close()
        self.channel = Channel(self._context, self.status.epoch, TokenBatch, StatsReport)
        self.channel.connect(self.status.engine_endpoint)
        return self.status

    def wait_for(self, state: GroupState) -> GroupStatus:
        """Wait until the group says that it is in `state`."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            status = self.status_channel.receive(1)
            if not isinstance(status, GroupStatus):
                continue
            self.statuses.append(status)
            if status.state is state:
                return status
            if status.state is GroupState.FAILED:
                raise EngineFailedError(status)
        raise TimeoutError(f"the group is not {state}")

    def wait_until_heard(self, condition: Callable[[GroupStatus], bool]) -> None:
        """Wait, in another thread than the one that starts the group, until it has told of such a status."""
        deadline = time.monotonic() + START_SECONDS
        while not any(map(condition, self.statuses.copy())):
            if time.monotonic() > deadline:
                raise TimeoutError("the group did not say so")
            time.sleep(0.02)

    def submit(self, new: Iterable[Request] = (), aborted: Iterable[str] = ()) -> None:
        """Send requests and aborts."""
        self.channel.send(RequestBatch(epoch=self.spec.epoch, new=list(new), aborted=list(aborted)))

    def receive(self, timeout: float = OUTPUT_SECONDS) -> list[TokenOutput]:
        """Return the next batch's outputs; statistics on the way are kept in `reports`."""
        while True:
            message = self.channel.receive(timeout)
            if isinstance(message, TokenBatch):
                return message.outputs
            if isinstance(message, StatsReport):
                self.reports.append(message)
                self.preemptions += message.scheduler.preemptions
            else:
                raise TimeoutError("the engine is silent")

    def generate(self, requests: list[Request]) -> dict[str, list[int]]:
        """Run requests to their end; return the tokens that came meanwhile by request id."""
        self.submit(requests)
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        unfinished = set(tokens)
        while unfinished:
            for output in self.receive():
                assert output.finish_reason is not FinishReason.ERROR, output.error
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason is not None:
                    unfinished.discard(output.request_id)
        return tokens

    def wait_for_report(self, timeout: float = 10.0) -> StatsReport:
        """Return the report that follows the last token."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.channel.receive(0.5)
            if isinstance(message, StatsReport):
                self.reports.append(message)
                self.preemptions += message.scheduler.preemptions
                if message.scheduler.num_running == message.scheduler.num_waiting == 0:
                    return message
        raise TimeoutError("no report")

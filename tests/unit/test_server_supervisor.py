"""What the server makes of an orchestrator's life, over real sockets and processes: only what it says is scripted."""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq.asyncio

from engine.protocol.channel import AsyncChannel
from engine.protocol.config import EngineConfig, RankSpec
from engine.protocol.messages import (
    GroupState,
    GroupStatus,
    RankInfo,
    Recovery,
    Request,
    RequestBatch,
    SamplingParams,
    TokenBatch,
    TokenOutput,
)
from server import supervisor
from server.engine_client import EngineClient
from server.launch import EngineProcess
from server.metrics.metrics import Metrics
from server.supervisor import MAX_VAIN_RESTARTS, Supervisor
from tests.metric_samples import value_of

SILENT = ("sh", "-c", "exec cat")  # an orchestrator that leaves the talking to the test
WITH_A_RANK = ("sh", "-c", "sleep 600 & exec cat")
DIED = Recovery("rank 1 was killed by SIGKILL", 0.0, seconds={"kill": 0.1})
RANK = RankInfo(0, 1, "here", "cpu")


class Service:
    """A supervisor with its client and a process, and what the orchestrator and rank 0 say."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self.context = zmq.asyncio.Context()
        self.process = EngineProcess(EngineConfig(rank_timeout=1), command=command)
        self.client = EngineClient(self.context, Metrics())
        self.statuses: list[GroupStatus] = []
        self.readies: list[int] = []
        follow = Supervisor(
            self.context,
            self.process,
            self.client,
            self.statuses.append,
            lambda status: self.readies.append(status.epoch),
        )
        self.supervising = asyncio.create_task(follow.run())
        self._orchestrator = self._connect()
        self._ranks: list[AsyncChannel] = []

    def _connect(self) -> AsyncChannel:
        channel = AsyncChannel(self.context, None, GroupStatus)
        channel.connect(self.process.spec.status_endpoint)
        return channel

    def connect_anew(self) -> None:
        """Have another process be the orchestrator: one that was not connected before."""
        self._orchestrator.close()
        self._orchestrator = self._connect()

    async def say(self, status: GroupStatus) -> None:
        """Have the orchestrator send a status, and wait until it was heard."""
        count = len(self.statuses)
        await self.send(status)
        await until(lambda: len(self.statuses) > count)

    async def send(self, status: GroupStatus) -> None:
        await self._orchestrator.send(status)

    async def be_ready(self, epoch: int, recovery: Recovery | None = None) -> AsyncChannel:
        """Have rank 0 of an epoch listen, and the orchestrator say so; return rank 0's end."""
        rank = AsyncChannel(self.context, epoch, RequestBatch)
        endpoint = rank.bind(f"ipc://{self.process.run_dir}/rank0-{epoch}")
        self._ranks.append(rank)
        await self.say(
            GroupStatus(
                epoch,
                GroupState.READY,
                ranks=[RANK],
                engine_endpoint=endpoint,
                max_model_len=64,
                num_kv_blocks=32,
                recovery=recovery,
            )
        )
        return rank

    async def lose(self, epoch: int) -> None:
        """Have the orchestrator say that the group before `epoch` is lost."""
        await self.say(GroupStatus(epoch, GroupState.RECOVERING, recovery=DIED))

    async def end(self) -> GroupStatus:
        return await asyncio.wait_for(self.supervising, 20)

    @property
    def spec(self) -> RankSpec:
        """What the present orchestrator was told."""
        return msgspec.json.decode((self.process.run_dir / "spec.json").read_bytes(), type=RankSpec)

    async def until_restarted(self, old_pid: int) -> None:
        await until(lambda: self.process.pid != old_pid)

    async def close(self) -> None:
        self.supervising.cancel()
        await asyncio.gather(self.supervising, return_exceptions=True)
        await self.client.close("over")
        for channel in (self._orchestrator, *self._ranks):
            channel.close()
        self.process.stop()
        self.context.destroy(linger=0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(command: tuple[str, ...]) -> AsyncIterator[Service]:
    service = Service(command)
    try:
        yield service
    finally:
        await service.close()


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made; its path is short enough for the sockets in them."""
    with tempfile.TemporaryDirectory(prefix="sup-", dir="/tmp") as path:
        monkeypatch.setattr("tempfile.tempdir", path)
        yield Path(path)


def with_service(story: Callable[[Service], Awaitable[None]], command: tuple[str, ...] = SILENT) -> None:
    async def run() -> None:
        async with running(command) as service:
            await story(service)

    asyncio.run(run())


def request(request_id: str) -> Request:
    return Request(request_id, [1, 2], SamplingParams(max_tokens=9))


# --- groups ----------------------------------------------------------------------------------------------------------


def test_a_lost_group_is_a_pause_and_readiness_is_announced_once() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        service.client.submit([request("a")], 0.0)
        await service.lose(2)
        assert service.client.status.state is GroupState.RECOVERING
        rank = await service.be_ready(2, DIED)
        batch = await rank.receive()
        assert isinstance(batch, RequestBatch)
        assert len(batch.new) == 1
        assert service.readies == [1]

    with_service(story)


def test_a_group_that_is_lost_is_lost_once_however_often_its_successors_loading_is_told() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        for loaded in 0, 10, 20:
            await service.say(GroupStatus(2, GroupState.RECOVERING, loaded_bytes=loaded, total_bytes=20, recovery=DIED))
        assert value_of(service.client._metrics, "ryzanstein_recoveries_total", cause="died") == 1
        assert service.client.status.loaded_bytes == 20

    with_service(story)


def test_restarts_that_come_to_nothing_end_in_failure_and_name_the_cause() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        for epoch in range(2, MAX_VAIN_RESTARTS + 4):
            assert not service.supervising.done()
            await service.lose(epoch)
        status = await service.end()
        assert status.state is GroupState.FAILED
        assert DIED.cause in status.error
        assert f"{MAX_VAIN_RESTARTS + 1} restarts" in status.error
        assert service.client.status.state is GroupState.FAILED
        assert service.client.status.error == status.error

    with_service(story)


def test_a_token_between_two_losses_makes_a_restart_worthwhile() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        inbox = service.client.submit([request("a")], 0.0)
        for epoch in range(2, 2 * MAX_VAIN_RESTARTS):
            await service.lose(epoch)
            rank = await service.be_ready(epoch, DIED)
            batch = await rank.receive()
            assert isinstance(batch, RequestBatch)
            await rank.send(TokenBatch(epoch, 0, [TokenOutput(batch.new[0].request_id, [1])]))
            await inbox.take()
        assert not service.supervising.done()

    with_service(story)


def test_a_group_that_was_ready_for_long_was_no_vain_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        for epoch in range(2, 2 * MAX_VAIN_RESTARTS):
            await service.lose(epoch)
            await service.be_ready(epoch, DIED)
        assert not service.supervising.done()

    monkeypatch.setattr(supervisor, "STEADY_SECONDS", 0.0)
    with_service(story)


def test_a_failed_group_is_the_end() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        await service.say(GroupStatus(1, GroupState.FAILED, error="no more"))
        assert (await service.end()).error == "no more"

    with_service(story)


# --- the orchestrator ------------------------------------------------------------------------------------------------


def test_another_orchestrator_takes_over_with_the_next_epoch_and_the_sizes_of_the_last() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        service.client.submit([request("a")], 0.0)
        await service.lose(2)
        await service.be_ready(2, DIED)
        pid = service.process.pid
        os.kill(pid, signal.SIGKILL)
        await service.until_restarted(pid)
        assert (service.spec.epoch, service.spec.num_kv_blocks, service.spec.max_model_len) == (3, 32, 64)
        assert service.client.status.state is GroupState.RECOVERING
        await service.say(GroupStatus(3, GroupState.STARTING))
        await service.say(GroupStatus(3, GroupState.STARTING, ranks=[RANK]))
        assert service.client.status.state is GroupState.RECOVERING
        rank = await service.be_ready(3)
        batch = await rank.receive()
        assert isinstance(batch, RequestBatch)
        assert [request.request_id.split("~")[0] for request in batch.new] == ["a"]
        recovery = service.client.last_recovery
        assert recovery is not None
        assert recovery.kind == "orchestrator"
        assert recovery.cause == "the engine's orchestrator was killed by signal 9"
        assert list(recovery.seconds) == ["kill", "respawn", "load"]

    with_service(story)


def test_what_a_dead_orchestrator_said_last_is_not_taken_for_its_successors() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        pid = service.process.pid
        os.kill(pid, signal.SIGKILL)
        await service.until_restarted(pid)
        await service.send(GroupStatus(1, GroupState.FAILED, error="too late"))
        await service.be_ready(2)
        assert service.client.status.state is GroupState.READY

    with_service(story)


def test_an_orchestrator_is_heard_although_the_socket_for_it_was_removed() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        (service.process.run_dir / "status").unlink()  # as what cleans /tmp up does
        pid = service.process.pid
        os.kill(pid, signal.SIGKILL)
        await service.until_restarted(pid)
        service.connect_anew()
        await service.be_ready(2)
        assert service.client.status.state is GroupState.READY

    with_service(story)


@pytest.mark.parametrize("is_recovering", [False, True])
def test_an_orchestrator_that_is_stopped_is_replaced(is_recovering: bool) -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        if is_recovering:  # then there is no link to rank 0 that would be cut
            await service.lose(2)
        pid = service.process.pid
        os.kill(pid, signal.SIGSTOP)
        await service.until_restarted(pid)
        assert not psutil.pid_exists(pid)
        recovery = service.client.last_recovery
        assert recovery is not None
        assert recovery.kind == "orchestrator"
        assert recovery.cause == "the engine's orchestrator was stopped, and not continued within 1 s"
        await service.be_ready(service.spec.epoch)
        assert service.client.status.state is GroupState.READY

    with_service(story)


def test_an_orchestrator_that_is_continued_in_time_goes_on() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        pid = service.process.pid
        for _ in range(3):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.4)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.4)
        assert service.process.pid == pid
        assert service.client.last_recovery is None

    with_service(story)


def test_ranks_that_an_orchestrator_leaves_are_gone_before_the_next_begins() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        pid = service.process.pid
        await until(lambda: len(psutil.Process(pid).children()) == 1)
        (rank,) = psutil.Process(pid).children()
        (service.process.run_dir / "control-1-0").touch()
        os.kill(pid, signal.SIGKILL)
        await service.until_restarted(pid)
        assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE
        assert sorted(path.name for path in service.process.run_dir.iterdir()) == ["rank0-1", "spec.json", "status"]

    with_service(story, WITH_A_RANK)


def test_an_orchestrator_that_is_killed_while_the_first_group_starts_is_replaced() -> None:
    async def story(service: Service) -> None:
        await service.say(GroupStatus(1, GroupState.STARTING))
        pid = service.process.pid
        os.kill(pid, signal.SIGKILL)
        await service.until_restarted(pid)
        assert (service.spec.epoch, service.spec.num_kv_blocks) == (2, None)
        assert service.client.status.state is GroupState.STARTING
        await service.be_ready(2)
        assert service.readies == [2]

    with_service(story)


def test_an_orchestrator_that_exits_before_any_group_was_ready_is_the_end() -> None:
    async def story(service: Service) -> None:
        status = await service.end()
        assert status.state is GroupState.FAILED
        assert status.error == "the engine's orchestrator exited with code 3"

    with_service(story, ("sh", "-c", "exit 3"))


def test_orchestrators_that_are_killed_again_and_again_are_the_end() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        for _ in range(MAX_VAIN_RESTARTS + 1):
            pid = service.process.pid
            os.kill(pid, signal.SIGKILL)
            await service.until_restarted(pid)
        os.kill(service.process.pid, signal.SIGKILL)
        status = await service.end()
        assert "was killed by signal 9; 4 restarts" in status.error

    with_service(story)


def test_a_broken_link_to_rank_0_is_mended_by_another_orchestrator() -> None:
    async def story(service: Service) -> None:
        rank = await service.be_ready(1)
        service.client.submit([request("a")], 0.0)
        await rank.receive()
        pid = service.process.pid
        await rank._socket.send(b"nonsense")
        await service.until_restarted(pid)
        assert not psutil.pid_exists(pid)
        await service.be_ready(2)
        assert service.client.last_recovery is not None
        assert service.client.last_recovery.kind == "link"

    with_service(story)


def test_the_end_during_a_restart_leaves_no_process() -> None:
    async def story(service: Service) -> None:
        await service.be_ready(1)
        others = set(psutil.Process().children()) - {psutil.Process(service.process.pid)}
        os.kill(service.process.pid, signal.SIGKILL)
        await until(lambda: service.client.status.state is GroupState.RECOVERING)
        service.process.stop()
        assert not service.process.run_dir.exists()
        left = set(psutil.Process().children()) - others
        assert [child for child in left if child.status() != psutil.STATUS_ZOMBIE] == []

    with_service(story)

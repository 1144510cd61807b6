"""What the server makes of groups that are lost, over real sockets: each test says what rank 0 sees and sends."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import zmq.asyncio

from engine.protocol.channel import AsyncChannel
from engine.protocol.messages import (
    FinishReason,
    GroupState,
    GroupStatus,
    Recovery,
    Request,
    RequestBatch,
    SamplingParams,
    TokenBatch,
    TokenLogprobs,
    TokenOutput,
)
from server import engine_client
from server.engine_client import EngineClient
from server.errors import APIError
from server.flights import Inbox
from server.metrics.metrics import Metrics
from tests.metric_samples import value_of

SCORE = TokenLogprobs(1, -0.5, 1, [], [])


def request(request_id: str, *, choice: int = 0) -> Request:
    return Request(request_id, [1, 2, 3], SamplingParams(max_tokens=9, choice_index=choice))


class Service:
    """An `EngineClient`, and rank 0 of one epoch after the other."""

    def __init__(self, folder: Path) -> None:
        self.context = zmq.asyncio.Context()
        self.metrics = Metrics()
        self.client = EngineClient(self.context, self.metrics)
        self.left: list[str] = []
        self.client.on_left = self.left.append
        self.epoch = 0
        self._folder = folder
        self._rank: AsyncChannel | None = None

    def start_group(self, recovery: Recovery | None = None) -> None:
        self.epoch += 1
        self._rank = AsyncChannel(self.context, self.epoch, RequestBatch)
        endpoint = self._rank.bind(f"ipc://{self._folder}/rank0-{self.epoch}")
        self.client.connect(
            GroupStatus(self.epoch, GroupState.READY, engine_endpoint=endpoint, max_model_len=64, recovery=recovery)
        )

    def lose_group(self, *in_step: str, kind: str = "died") -> bool:
        recovery = Recovery("rank 0 was killed by SIGKILL", 0.0, list(in_step), kind=kind)
        progressed = self.client.lose(GroupStatus(self.epoch + 1, GroupState.RECOVERING, recovery=recovery))
        self.end_rank()
        return progressed

    def end_rank(self) -> None:
        if self._rank is not None:
            self._rank.close()
            self._rank = None

    async def sent(self) -> RequestBatch:
        """Return the next batch that rank 0 gets."""
        assert self._rank is not None
        batch = await asyncio.wait_for(self._rank.receive(), 10)
        assert isinstance(batch, RequestBatch)
        return batch

    async def sent_ids(self) -> list[str]:
        return [request.request_id for request in (await self.sent()).new]

    async def say(self, *outputs: TokenOutput) -> None:
        assert self._rank is not None
        await self._rank.send(TokenBatch(self.epoch, 0, list(outputs)))

    def metric(self, name: str, **labels: str) -> float | None:
        return value_of(self.metrics, f"ryzanstein_{name}", **labels)


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Service]:
    service = Service(folder)
    service.start_group()
    try:
        yield service
    finally:
        await service.client.close("over")
        service.end_rank()
        service.context.destroy(linger=0)


def with_service(folder: Path, story: Callable[[Service], Awaitable[None]]) -> None:
    async def run() -> None:
        async with running(folder) as service:
            await story(service)

    asyncio.run(run())


async def take(inbox: Inbox) -> list[TokenOutput]:
    return await asyncio.wait_for(inbox.take(), 10)


# --- the next group --------------------------------------------------------------------------------------------------


def test_the_next_group_goes_on_behind_what_was_received(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a")], 0.0)
        assert (await service.sent()).new == [request("a")]
        await service.say(TokenOutput("a", [], prompt_logprobs=[SCORE], queue_seconds=0.25, num_cached_tokens=2))
        await service.say(TokenOutput("a", [7], prompt_logprobs=[SCORE]), TokenOutput("a", [8]))
        while sum(len(output.token_ids) for output in await take(inbox)) == 0:
            pass
        service.lose_group("a")
        service.start_group()
        (again,) = (await service.sent()).new
        assert (again.prompt_token_ids, again.sampling) == ([1, 2, 3], request("a").sampling)
        assert (again.received_token_ids, again.num_received_prompt_logprobs) == ([7, 8], 2)
        await service.say(TokenOutput(again.request_id, [9], queue_seconds=0.5, num_cached_tokens=0))
        assert await take(inbox) == [TokenOutput("a", [9])]

    with_service(tmp_path, story)


def test_prefill_and_decode_are_measured_once_across_a_loss(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a")], time.perf_counter() - 1000)
        await service.sent()
        await service.say(TokenOutput("a", [7], queue_seconds=0.0))
        await take(inbox)
        service.lose_group("a")
        service.start_group()
        (again,) = (await service.sent()).new
        await service.say(TokenOutput(again.request_id, [8], FinishReason.LENGTH, queue_seconds=0.0))
        await take(inbox)
        for name in ("request_queue", "request_prefill", "request_decode"):
            assert service.metric(f"{name}_time_seconds_count") == 1
        prefill, decode = (service.metric(f"request_{part}_time_seconds_sum") for part in ("prefill", "decode"))
        assert prefill is not None
        assert 0 < prefill < 1000  # not the wait before it was sent
        assert service.metric("request_time_per_output_token_seconds_sum") == decode
        assert service.metric("request_generation_tokens_sum") == 2

    with_service(tmp_path, story)


def test_a_sequence_that_had_nothing_yet_gets_what_the_next_group_says_of_it(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a")], 0.0)
        await service.sent()
        service.lose_group("a")
        service.start_group()
        (again,) = (await service.sent()).new
        await service.say(TokenOutput(again.request_id, [9], queue_seconds=0.5, num_cached_tokens=2))
        assert await take(inbox) == [TokenOutput("a", [9], queue_seconds=0.5, num_cached_tokens=2)]

    with_service(tmp_path, story)


def test_latencies_and_prompts_are_counted_once(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a"), request("b", choice=1)], 0.0)
        for token in 4, 5:
            ids = await service.sent_ids()
            await service.say(*(TokenOutput(name, [token], queue_seconds=0.5, num_cached_tokens=0) for name in ids))
            await take(inbox)
            service.lose_group(*ids)
            service.start_group()
        ids = await service.sent_ids()
        await service.say(*(TokenOutput(name, [6], FinishReason.LENGTH) for name in ids))
        assert [output.finish_reason for output in await take(inbox)] == [FinishReason.LENGTH] * 2
        assert service.metric("time_to_first_token_seconds_count") == 2
        assert service.metric("inter_token_latency_seconds_count") == 4
        assert service.metric("request_queue_time_seconds_count") == 2
        assert service.metric("prompt_tokens_total") == 3
        assert service.metric("generation_tokens_total") == 6
        assert service.metric("recoveries_total", cause="died") == 2

    with_service(tmp_path, story)


def test_requests_that_come_between_two_groups_wait_for_the_next(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.client.submit([request("old")], 0.0)
        await service.sent()
        service.lose_group()
        service.client.submit([request("new")], 0.0)
        assert service.client.num_in_flight == 2
        service.start_group()
        old, new = await service.sent_ids()
        assert old.startswith("old")
        assert new.startswith("new")

    with_service(tmp_path, story)


def test_what_was_aborted_between_two_groups_is_not_sent_to_the_next(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.client.submit([request("goes"), request("ends"), request("stays")], 0.0)
        await service.sent()
        service.lose_group("goes", "ends", "stays")
        service.client.abort(["goes"])
        service.client.end("ends")
        service.start_group()
        batch = await service.sent()
        assert [request.request_id.split("~")[0] for request in batch.new] == ["stays"]
        assert batch.aborted == []

    with_service(tmp_path, story)


def test_limits_of_the_last_group_hold_while_there_is_none(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.lose_group()
        assert service.client.status.state is GroupState.RECOVERING
        assert service.client.status.max_model_len == 64

    with_service(tmp_path, story)


def test_limits_hold_when_the_group_failed_and_requests_are_told_that_it_has(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.client.set_status(GroupStatus(epoch=1, state=GroupState.FAILED, error="no more"))
        assert service.client.status.max_model_len == 64  # a request that is being read is not measured by 0
        with pytest.raises(APIError, match="failed: no more") as caught:
            service.client.submit([request("a")], 0.0)
        assert caught.value.status == 503

    with_service(tmp_path, story)


def test_a_group_that_is_lost_before_any_was_ready_takes_no_requests(tmp_path: Path) -> None:
    async def run() -> None:
        service = Service(tmp_path)
        service.lose_group()
        with pytest.raises(APIError, match="being loaded"):
            service.client.submit([request("a")], 0.0)
        service.context.destroy(linger=0)

    asyncio.run(run())


def test_times_of_a_recovery_are_shown_by_phase(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a")], 0.0)
        await service.sent()
        service.lose_group("a", kind="hung")
        assert service.metric("engine_state", state="RECOVERING") == 1
        recovery = Recovery("rank 1 hung", 0.0, seconds={"kill": 0.5, "respawn": 1.0, "load": 2.0}, kind="hung")
        service.start_group(recovery)
        (name,) = await service.sent_ids()
        await service.say(TokenOutput(name, [1]), TokenOutput(name, [2]))
        await take(inbox)
        assert service.client.last_recovery == recovery
        assert service.metric("recoveries_total", cause="hung") == 1
        assert service.metric("engine_state", state="READY") == 1
        assert service.metric("engine_state", state="RECOVERING") == 0
        sums = {phase: service.metric("recovery_seconds_sum", phase=phase) for phase in recovery.seconds}
        assert sums == recovery.seconds
        assert service.metric("recovery_seconds_count", phase="first_token") == 1

    with_service(tmp_path, story)


def test_idle_time_is_no_part_of_a_recovery(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.client.submit([request("a")], 0.0)
        service.lose_group("a")
        service.start_group(Recovery("rank 1 was killed", 0.0))
        service.client.abort(["a"])
        inbox = service.client.submit([request("b")], 0.0)
        (name,) = await service.sent_ids()
        await service.say(TokenOutput(name, [1]))
        await take(inbox)
        assert service.metric("recovery_seconds_count", phase="first_token") == 0

    with_service(tmp_path, story)


# --- taken out of the engine -----------------------------------------------------------------------------------------


def test_a_withdrawn_sequence_can_be_submitted_again_and_loses_and_repeats_nothing(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a"), request("b")], 0.0)
        assert await service.sent_ids() == ["a", "b"]
        await service.say(TokenOutput("a", [7]), TokenOutput("a", [8]))
        assert [output.token_ids for output in await take(inbox)] == [[7], [8]]
        back = service.client.withdraw(["a", "unknown"])
        assert list(back) == ["a"]
        assert back["a"].received_token_ids == [7, 8]
        assert service.client.num_in_flight == 1
        assert service.client.submit(list(back.values()), 0.0, inbox) is inbox
        batch = await service.sent()
        assert batch.aborted == ["a"]
        (again,) = batch.new
        assert again.request_id != "a"
        assert again.received_token_ids == [7, 8]
        await service.say(TokenOutput("a", [9]), TokenOutput(again.request_id, [9]), TokenOutput("b", [1]))
        assert await take(inbox) == [TokenOutput("a", [9]), TokenOutput("b", [1])]
        assert service.metric("request_success_total", finished_reason="abort") == 0
        service.client.forget(["a"])
        assert service.metric("request_success_total", finished_reason="abort") == 1

    with_service(tmp_path, story)


def test_a_sequence_withdrawn_before_it_was_sent_is_unknown_to_the_engine(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.client.submit([request("never"), request("now")], 0.0)
        assert list(service.client.withdraw(["never"])) == ["never"]
        batch = await service.sent()
        assert ([request.request_id for request in batch.new], batch.aborted) == (["now"], [])

    with_service(tmp_path, story)


def test_each_way_to_leave_is_told_once(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        names = ["finishes", "aborted", "ended", "withdrawn", "fails", "stays"]
        inbox = service.client.submit([request(name) for name in names], 0.0)
        await service.sent()
        await service.say(*(TokenOutput(name, [1]) for name in names))
        await take(inbox)
        await service.say(
            TokenOutput("finishes", [2], FinishReason.LENGTH), TokenOutput("fails", [], FinishReason.ERROR, "no")
        )
        await take(inbox)
        service.client.abort(["aborted", "finishes"])
        service.client.end("ended")
        service.client.withdraw(["withdrawn"])
        service.lose_group("stays")
        assert service.left == ["finishes", "fails", "aborted", "ended", "withdrawn"]
        await service.client.close("over")
        assert service.left[5:] == ["stays"]

    with_service(tmp_path, story)


def test_whoever_hears_of_one_that_left_may_take_out_others(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        def take_out_the_other(request_id: str) -> None:
            service.left.append(request_id)
            service.client.abort({"a": ["b"], "c": ["d"]}.get(request_id, []))

        service.client.on_left = take_out_the_other
        service.client.submit([request(name) for name in "abcd"], 0.0)
        service.client.abort(["a", "b"])
        await service.client.close("over")
        assert service.left == ["a", "b", "c", "d"]
        assert service.metric("request_success_total", finished_reason="abort") == 3

    with_service(tmp_path, story)


# --- suspects --------------------------------------------------------------------------------------------------------


async def lose_twice(service: Service, *names: str) -> Inbox:
    """Submit, and lose two groups in a step of all, without a token; the third is there."""
    inbox = service.client.submit([request(name) for name in names], 0.0)
    for _ in range(2):
        service.lose_group(*await service.sent_ids())
        service.start_group()
    return inbox


def test_a_request_that_kills_each_group_ends_alone_with_the_cause(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = await lose_twice(service, "a", "b", "kills")
        assert service.client.num_in_flight == 3
        (alone,) = await service.sent_ids()
        assert alone.startswith("kills")
        assert service.lose_group(alone)
        (output,) = await take(inbox)
        assert (output.request_id, output.finish_reason) == ("kills", FinishReason.ERROR)
        assert "rank 0 was killed by SIGKILL" in (output.error or "")
        service.start_group()
        assert [name.split("~")[0] for name in await service.sent_ids()] == ["a", "b"]

    with_service(tmp_path, story)


def test_suspects_run_one_after_the_other_and_then_all_together(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = await lose_twice(service, "a", "b")
        (b,) = await service.sent_ids()
        service.client.submit([request("new")], 0.0)
        await service.say(TokenOutput(b, [5]))
        await take(inbox)
        batch = await service.sent()
        assert batch.aborted == [b]
        (a,) = [request.request_id for request in batch.new]
        assert (b.split("~")[0], a.split("~")[0]) == ("b", "a")
        await service.say(TokenOutput(b, [6]))  # comes too late: it will be computed again
        await service.say(TokenOutput(a, [5]))
        assert [output.request_id for output in await take(inbox)] == ["a"]
        batch = await service.sent()
        assert sorted(request.request_id.split("~")[0] for request in batch.new) == ["b", "new"]
        assert {len(request.received_token_ids) for request in batch.new} == {0, 1}

    with_service(tmp_path, story)


def test_a_suspect_that_goes_away_holds_up_nobody(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        await lose_twice(service, "a", "goes")
        (alone,) = await service.sent_ids()
        service.client.abort(["goes"])
        batch = await service.sent()
        assert batch.aborted == [alone]
        assert [request.request_id.split("~")[0] for request in batch.new] == ["a"]

    with_service(tmp_path, story)


def test_nobody_is_suspected_where_a_token_came_between_two_losses(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a"), request("b")], 0.0)
        service.lose_group(*await service.sent_ids())
        service.start_group()
        a, b = await service.sent_ids()
        await service.say(TokenOutput(a, [5]))
        await take(inbox)
        assert service.lose_group(a, b)
        service.start_group()
        assert len(await service.sent_ids()) == 2

    with_service(tmp_path, story)


# --- a link that breaks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"", b"\x63", b"\x01garbage"])
def test_a_rank_that_makes_no_sense_breaks_the_link(payload: bytes, tmp_path: Path) -> None:
    async def run() -> None:
        context, endpoint = zmq.asyncio.Context(), f"ipc://{tmp_path}/rank0"
        rank = context.socket(zmq.DEALER)
        rank.bind(endpoint)
        client = EngineClient(context, Metrics())
        client.connect(GroupStatus(epoch=1, state=GroupState.READY, engine_endpoint=endpoint))
        inbox = client.submit([Request("a", [1], SamplingParams(max_tokens=1))], arrival=0.0)
        await rank.recv()
        await rank.send(payload)
        reason = await asyncio.wait_for(client.until_broken(), 10)
        assert reason.startswith("the link to rank 0 broke: ")
        await client.close(reason)
        (output,) = await take(inbox)
        assert output.finish_reason is FinishReason.ERROR
        context.destroy(linger=0)

    asyncio.run(run())


def test_a_cut_link_is_noticed_and_never_joined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(service: Service) -> None:
        inbox = service.client.submit([request("a")], 0.0)
        await service.sent()
        service.end_rank()
        late = AsyncChannel(service.context, 1, RequestBatch)  # what lost tokens could be followed by
        late.bind(f"ipc://{tmp_path}/rank0-1")
        sending = asyncio.create_task(late.send(TokenBatch(1, 0, [TokenOutput("a", [2])])))
        assert "cut" in await asyncio.wait_for(service.client.until_broken(), 10)
        assert not sending.done()  # there is nobody
        sending.cancel()
        late.close()
        service.lose_group("a", kind="link")
        service.start_group()
        (name,) = await service.sent_ids()
        await service.say(TokenOutput(name, [1]))
        assert [output.token_ids for output in await take(inbox)] == [[1]]

    monkeypatch.setattr(engine_client, "LINK_GRACE_SECONDS", 0.2)
    with_service(tmp_path, story)


def test_a_link_that_is_cut_by_a_death_that_is_told_is_no_broken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(service: Service) -> None:
        service.client.submit([request("a")], 0.0)
        await service.sent()
        broken = asyncio.create_task(service.client.until_broken())
        service.end_rank()
        await asyncio.sleep(0.05)
        service.lose_group("a")
        await asyncio.sleep(0.3)
        assert not broken.done()
        broken.cancel()

    monkeypatch.setattr(engine_client, "LINK_GRACE_SECONDS", 0.2)
    with_service(tmp_path, story)


def test_what_is_in_flight_while_there_is_no_group_waits(tmp_path: Path) -> None:
    async def story(service: Service) -> None:
        service.client.submit([request("a"), request("b")], 0.0)
        assert sorted(await service.sent_ids()) == ["a", "b"]
        assert service.metric("num_requests_waiting") == 0
        service.lose_group("a", "b")
        assert service.metric("num_requests_waiting") == 2
        service.client.abort(["b"])
        assert service.metric("num_requests_waiting") == 1
        service.start_group()
        await service.sent()
        assert service.metric("num_requests_waiting") == 0

    with_service(tmp_path, story)

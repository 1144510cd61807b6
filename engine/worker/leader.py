"""Rank 0: schedules, broadcasts each step, samples, and talks to the server."""

import math
from collections.abc import Iterable

import zmq

from engine.protocol.beats import RankBeats
from engine.protocol.channel import Channel
from engine.protocol.messages import (
    FinishReason,
    RankReport,
    RankStats,
    Request,
    RequestBatch,
    ScheduledStep,
    StatsReport,
    TokenBatch,
    TokenOutput,
)
from engine.sampling.sampler import Sampler
from engine.sampling.step import sample_step
from engine.scheduler.result import StepResult
from engine.scheduler.scheduler import Scheduler
from engine.worker.model_runner import ModelRunner, RunnerOutput
from engine.worker.statistics import RankStatistics
from engine.worker.step_times import RankSkew, StepTimes


class Leader:
    """Runs steps while there is work, and waits for the server while there is none."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        server: Channel,
        followers: list[Channel],
        step_times: StepTimes,
        statistics: RankStatistics,
        sampler: Sampler,
        beats: RankBeats,
        *,
        epoch: int,
        vocab_size: int,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._server = server
        self._followers = followers
        self._step_times = step_times
        self._statistics = statistics
        self._sampler = sampler
        self._beats = beats
        self._epoch = epoch
        self._vocab_size = vocab_size
        self._had_work = False
        self._rank_stats: list[RankStats] = []  # on their way to the server
        self._skew = RankSkew(1 + len(followers))
        self._poller = zmq.Poller()
        for channel in (server, *followers):
            self._poller.register(channel.socket, zmq.POLLIN)

    def run(self) -> None:
        """Run until the process is ended."""
        while True:
            self._wait_for_work()
            self._step_times.begin()
            self._take_messages()
            self._beats.beat()
            step = self._scheduler.schedule()
            if step is not None:
                self._run_step(step)
            self._check_when_idle()
            self._report_if_due()

    def _check_when_idle(self) -> None:
        """Check the block bookkeeping each time the last request has gone."""
        had_work, self._had_work = self._had_work, self._scheduler.has_work
        if had_work and not self._had_work:
            self._scheduler.check_integrity()

    # --- a step ------------------------------------------------------------------------------------------------------

    def _run_step(self, step: ScheduledStep) -> None:
        """Run a scheduled step; after each of `step_times.LAPS` comes its lap."""
        self._beats.begin_step([row.request_id for row in step.rows])
        self._step_times.lap()
        for follower in self._followers:
            follower.send(step)
        self._step_times.lap()
        output = self._run(step)
        self._step_times.lap()
        result = self._sample(step, output)
        self._step_times.lap()
        outputs = self._scheduler.apply(step, result)
        self._beats.end_step()  # before anybody hears of it: who has, is not told that the step was lost
        self._step_times.lap()
        self._emit(step.step, outputs)
        self._step_times.lap()
        self._statistics.note_work()

    def _run(self, step: ScheduledStep) -> RunnerOutput:
        self._step_times.begin_run()
        output = self._runner.run(step)
        self._step_times.end_run()
        self._beats.beat()
        return output

    def _sample(self, step: ScheduledStep, output: RunnerOutput) -> StepResult:
        if output.logits is None:
            return StepResult(prompt_logprobs=output.prompt_logprobs)
        tokens, logprobs = sample_step(output.logits, self._scheduler.sampling_rows(step), self._sampler)
        request_ids = [row.request_id for row in step.rows if row.samples]
        return StepResult(
            tokens=dict(zip(request_ids, tokens, strict=True)),
            logprobs={request_ids[row]: of_row for row, of_row in logprobs.items()},
            prompt_logprobs=output.prompt_logprobs,
        )

    # --- messages ----------------------------------------------------------------------------------------------------

    def _wait_for_work(self) -> None:
        """Wait for something to arrive, or for a report to be due, if there is no work."""
        if not self._scheduler.has_work:
            seconds = self._statistics.seconds_until_due()
            self._beats.rest()
            self._poller.poll(math.ceil(seconds * 1000))

    def _take_messages(self) -> None:
        """Take what has arrived."""
        while (message := self._server.receive(0)) is not None:
            if isinstance(message, RequestBatch):
                self._take_requests(message)
        for follower in self._followers:
            while (message := follower.receive(0)) is not None:
                if isinstance(message, RankReport):
                    self._take_report(message)
                    self._statistics.note_work()  # it is passed on with this rank's own, also when that has no news

    def _take_requests(self, batch: RequestBatch) -> None:
        self._had_work = True  # also where all of it is aborted before a step
        refused = []
        for request in batch.new:
            try:
                self._check_token_ids(request)
                self._scheduler.add(request)
            except ValueError as error:
                refused.append(TokenOutput(request.request_id, [], FinishReason.ERROR, error=str(error)))
        for request_id in batch.aborted:
            self._scheduler.abort(request_id)
        if refused:
            self._emit(-1, refused)
        self._statistics.note_work()

    def _check_token_ids(self, request: Request) -> None:
        sampling = request.sampling
        places: dict[str, Iterable[int]] = {
            "the prompt": request.prompt_token_ids,
            "what was received": request.received_token_ids,
            "logit_bias": sampling.logit_bias,
            "stop_token_ids": sampling.stop_token_ids,
        }
        for place, token_ids in places.items():
            if any(not 0 <= token_id < self._vocab_size for token_id in token_ids):
                raise ValueError(f"{place} has token ids outside the vocabulary of {self._vocab_size}")

    def _emit(self, step: int, outputs: list[TokenOutput]) -> None:
        if outputs:
            self._server.send(TokenBatch(epoch=self._epoch, step=step, outputs=outputs))

    def _take_report(self, report: RankReport) -> None:
        self._rank_stats.append(report.stats)
        self._skew.add(report.stats.rank, report.compute_seconds)

    def _report_if_due(self) -> None:
        if self._statistics.seconds_until_due() != 0:
            return
        self._take_report(self._statistics.take())
        ranks, self._rank_stats = self._rank_stats, []
        self._server.send(StatsReport(self._epoch, self._scheduler.take_stats(), ranks, self._skew.take()))

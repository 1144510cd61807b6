"""Ranks 1 … N-1: obey rank 0's steps."""

from engine.protocol.beats import RankBeats
from engine.protocol.channel import Channel
from engine.protocol.messages import ScheduledStep
from engine.worker.model_runner import ModelRunner
from engine.worker.statistics import RankStatistics
from engine.worker.step_times import StepTimes


class Follower:
    """Waits for steps, for ever and without burning CPU; runs each; reports its statistics to rank 0."""

    def __init__(
        self, runner: ModelRunner, steps: Channel, step_times: StepTimes, statistics: RankStatistics, beats: RankBeats
    ) -> None:
        self._runner = runner
        self._steps = steps
        self._step_times = step_times
        self._statistics = statistics
        self._beats = beats

    def run(self) -> None:
        """Run until the process is ended."""
        while True:
            self._beats.rest()
            message = self._steps.receive(self._statistics.seconds_until_due())
            self._beats.beat()
            if isinstance(message, ScheduledStep):
                self._step_times.begin_run()
                self._runner.run(message)
                self._step_times.end_run()
                self._statistics.note_work()
            if self._statistics.seconds_until_due() == 0:
                self._steps.send(self._statistics.take())

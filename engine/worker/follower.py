"""Ranks 1 … N-1: obey rank 0's steps."""

from engine.protocol.channel import Channel
from engine.protocol.messages import ScheduledStep
from engine.worker.model_runner import ModelRunner
from engine.worker.statistics import RankStatistics


class Follower:
    """Waits for steps, for ever and without burning CPU; runs each; reports its statistics to rank 0."""

    def __init__(self, runner: ModelRunner, steps: Channel, statistics: RankStatistics) -> None:
        self._runner = runner
        self._steps = steps
        self._statistics = statistics

    def run(self) -> None:
        """Run until the process is ended."""
        while True:
            message = self._steps.receive(self._statistics.seconds_until_due())
            if isinstance(message, ScheduledStep):
                self._runner.run(message)
                self._statistics.note_work()
            if self._statistics.seconds_until_due() == 0:
                self._steps.send(self._statistics.take())

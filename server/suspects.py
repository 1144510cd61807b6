"""Which request kills its ranks? Whoever is suspected runs alone until it has shown that it does not.

A group that dies takes every sequence with it, and all of them are sent again. One that kills each group that computes
it would thus be the end of the service. It is known by this: the group dies in a step of it alone, twice, with no token
between. Nothing less ends a request, so that deaths for other reasons harm none of them.
"""

from collections.abc import Sequence

from server.flights import Flight

# A group may come to other sequences' tokens before it comes to the one that kills it.
MANY_LOSSES = 3


class Suspects:
    """Suspects come to be when a group dies without a token since the last one died: those of its step.

    So does a sequence in whose steps `MANY_LOSSES` groups died and which itself got no token between. The latest to
    come is tried first: the others had longer to show what they do.
    """

    def __init__(self) -> None:
        self._suspects: list[Flight] = []  # the next to be tried is the last
        self.has_progressed = True  # since a group was last lost: a token came, or the one that kills was found

    @property
    def on_trial(self) -> Flight | None:
        """The one sequence that may be with the engine; None: all may."""
        return self._suspects[-1] if self._suspects else None

    def note_token(self, flight: Flight) -> None:
        """A token of `flight` came."""
        self.has_progressed = True
        flight.num_losses = 0
        self.clear(flight)

    def clear(self, flight: Flight) -> None:
        """Do not suspect `flight` any more."""
        if flight in self._suspects:
            self._suspects.remove(flight)

    def note_loss(self, in_step: Sequence[Flight]) -> Flight | None:
        """The group died in a step of the flights `in_step`, in order of arrival; return the one that killed it.

        There is one only where it ran alone; nobody is suspected any more then.
        """
        had_progressed, self.has_progressed = self.has_progressed, False
        for flight in in_step:
            flight.num_losses += 1
        if self.on_trial is None:
            self._suspects = [flight for flight in in_step if not had_progressed or flight.num_losses >= MANY_LOSSES]
        elif not had_progressed and list(in_step) == [self.on_trial]:
            culprit = self.on_trial
            self.has_progressed = True
            self._suspects.clear()
            return culprit
        return None

"""The events of one stream: what server-sent events carry, with the numbers by which a client names them."""

from array import array


class EventLog:
    """Events with the ids 1, 2 and so on, framed when they are read. `head`, which most begin with, is kept once."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self._tails = bytearray()  # of the events that are there; each says in its first byte whether the head is off
        self._ends = array("Q")  # of these, counted from the first byte that ever was
        self._begin = 0  # bytes that are gone
        self._num_dropped = 0

    @property
    def last_id(self) -> int:
        """The id of the last event, 0 before the first."""
        return self._num_dropped + len(self._ends)

    @property
    def num_bytes(self) -> int:
        """How much memory the events take."""
        return len(self._tails) + len(self._ends) * self._ends.itemsize

    def append(self, data: bytes) -> None:
        """Add an event."""
        if data.startswith(self._head):
            self._tails += b"+"
            self._tails += memoryview(data)[len(self._head) :]
        else:
            self._tails += b" "
            self._tails += data
        self._ends.append(self._begin + len(self._tails))

    def after(self, event_id: int, most: int) -> tuple[bytes, int]:
        """Return the events after `event_id`, which is not the last one's, and the id of the last of them.

        Args:
            event_id: what comes after it must still be there.
            most: bytes beyond which no further event is begun.
        """
        events: list[bytes] = []
        num_bytes = 0
        while num_bytes < most and event_id < self.last_id:
            event_id += 1
            event = b"id: %d\ndata: %s\n\n" % (event_id, self._data(event_id))
            num_bytes += len(event)
            events.append(event)
        return b"".join(events), event_id

    def num_bytes_after(self, event_id: int) -> int:
        """Return how much memory the events after `event_id` take."""
        return self._begin + len(self._tails) - self._end(event_id)

    def drop(self, event_id: int) -> None:
        """Forget the events up to `event_id`, and that one."""
        end = self._end(event_id)
        del self._tails[: end - self._begin]
        del self._ends[: event_id - self._num_dropped]
        self._begin, self._num_dropped = end, event_id

    def _data(self, event_id: int) -> bytes:
        begin, end = self._end(event_id - 1) - self._begin, self._end(event_id) - self._begin
        head = self._head if self._tails[begin] == ord("+") else b""
        return head + self._tails[begin + 1 : end]

    def _end(self, event_id: int) -> int:
        index = event_id - self._num_dropped - 1
        return self._begin if index < 0 else self._ends[index]

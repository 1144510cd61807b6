import random

from server.event_log import EventLog

HEAD = b'{"id":"x","choices":['
MOST = 1 << 20


def framed(events: dict[int, bytes]) -> bytes:
    return b"".join(b"id: %d\ndata: %s\n\n" % item for item in events.items())


def filled(number: int) -> tuple[EventLog, dict[int, bytes]]:
    """Return a log of events with and without the head, and what is in it."""
    log = EventLog(HEAD)
    events = {number + 1: (HEAD if number % 3 else b"") + b"%d" % number * (number % 5) for number in range(number)}
    for event in events.values():
        log.append(event)
    return log, events


def test_events_come_back_whole_and_numbered_from_one() -> None:
    log, events = filled(20)
    assert log.last_id == 20
    assert log.after(0, MOST) == (framed(events), 20)
    assert log.after(19, MOST) == (framed({20: events[20]}), 20)


def test_pieces_of_any_size_make_the_whole() -> None:
    log, events = filled(200)
    for most in (1, 30, 1000):
        event_id, pieces = 0, b""
        while event_id < log.last_id:
            piece, event_id = log.after(event_id, most)
            assert len(piece) < most + len(HEAD) + 40
            pieces += piece
        assert pieces == framed(events)


def test_what_all_events_begin_with_is_kept_once() -> None:
    log = EventLog(HEAD)
    for _ in range(1000):
        log.append(HEAD + b"tail")
    assert log.num_bytes < 1000 * (len(b"tail") + 10)
    assert log.after(0, 10 * MOST)[0].count(HEAD) == 1000


def test_dropped_events_leave_the_others_and_their_numbers_as_they_are() -> None:
    generator = random.Random(0)
    log, events = filled(300)
    dropped = 0
    while dropped < 300:
        dropped = min(300, dropped + generator.randrange(40))
        log.drop(dropped)
        assert log.last_id == 300
        for event_id in range(dropped, 300):
            rest = {number: event for number, event in events.items() if number > event_id}
            assert log.after(event_id, MOST) == (framed(rest), 300)
            assert log.num_bytes_after(event_id) == sum(len(event.removeprefix(HEAD)) + 1 for event in rest.values())
    assert log.num_bytes == 0
    log.append(HEAD + b"more")
    assert log.after(300, MOST) == (framed({301: HEAD + b"more"}), 301)

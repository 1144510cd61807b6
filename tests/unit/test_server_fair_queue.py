from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from server.fair_queue import FairQueue


def take(queue: FairQueue[tuple[str, int]], num_tokens: int = 0) -> tuple[str, int]:
    """Take who is next, who is served so much."""
    item = queue.next()
    assert item is not None
    queue.remove(item[0], item)
    queue.charge(item[0], num_tokens)
    return item


def filled(**counts: int) -> FairQueue[tuple[str, int]]:
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for name, count in counts.items():
        for number in range(count):
            queue.push(name, (name, number))
    return queue


def test_the_items_of_one_caller_keep_their_order() -> None:
    queue = filled(a=3)
    assert [take(queue, 7) for _ in range(3)] == [("a", 0), ("a", 1), ("a", 2)]
    assert queue.next() is None


def test_who_is_next_stays_until_it_is_removed() -> None:
    queue = filled(a=2)
    assert queue.next() == queue.next() == ("a", 0)
    assert len(queue) == 2


def test_what_goes_ahead_goes_before_everyone_in_its_own_order() -> None:
    queue = filled(a=2)
    queue.push_ahead(("b", 8))
    queue.push_ahead(("a", 9))
    assert [take(queue) for _ in range(4)] == [("b", 8), ("a", 9), ("a", 0), ("a", 1)]


def test_one_may_leave_from_the_middle() -> None:
    queue = filled(a=3)
    queue.remove("a", ("a", 1))
    assert [take(queue), take(queue)] == [("a", 0), ("a", 2)]
    assert len(queue) == 0


def test_a_caller_with_many_items_does_not_hold_up_one_with_few() -> None:
    queue = filled(crowd=100, one=2)
    assert [take(queue, 10)[0] for _ in range(4)] == ["crowd", "one", "crowd", "one"]


def test_shares_are_counted_in_tokens_not_in_items() -> None:
    queue = filled(long=30, short=300)
    served: Counter[str] = Counter()
    for _ in range(110):
        name, _ = take(queue, 0)
        queue.charge(name, 100 if name == "long" else 10)
        served[name] += 100 if name == "long" else 10
    assert abs(served["long"] - served["short"]) <= 100


def test_tokens_that_are_charged_later_count_too() -> None:
    queue = filled(a=3, b=3)
    assert [take(queue, 1), take(queue, 1)] == [("a", 0), ("b", 0)]
    queue.charge("a", 50)
    assert [take(queue, 10)[0] for _ in range(2)] == ["b", "b"]


def test_who_comes_back_after_a_pause_does_not_make_up_for_it() -> None:
    queue = filled(a=100)
    for _ in range(50):
        take(queue, 10)
    for number in range(10):
        queue.push("late", ("late", number))
    assert [take(queue, 10)[0] for _ in range(6)].count("late") == 3


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 40)), min_size=1, max_size=60),
    st.integers(0, 60),
)
def test_callers_who_both_wait_are_served_alike_up_to_two_items(costs: list[tuple[str, int]], alone: int) -> None:
    """Whatever each costs, and however long one of them was served alone before."""
    queue = filled(a=200)
    for number in range(alone):
        take(queue, costs[number % len(costs)][1])
    for number in range(100):
        queue.push("b", ("b", number))
    served: Counter[str] = Counter()
    for _, cost in costs:
        served[take(queue, cost)[0]] += cost
        assert abs(served["a"] - served["b"]) <= 2 * 40

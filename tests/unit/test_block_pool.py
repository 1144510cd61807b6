import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kvcache.block_pool import BlockPool, IntegrityError


def test_allocating_more_than_is_free_takes_nothing() -> None:
    pool = BlockPool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_freed_blocks_can_be_allocated_again() -> None:
    pool = BlockPool(2)
    held = pool.allocate(2)
    assert held is not None
    assert pool.allocate(1) is None
    pool.free(held)
    assert sorted(pool.allocate(2) or []) == [0, 1]


def test_a_lost_block_is_found() -> None:
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(IntegrityError, match="lost or held twice"):
        pool.check_integrity([])


def test_a_block_held_twice_is_found() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    assert held is not None
    pool.check_integrity([held])
    with pytest.raises(IntegrityError):
        pool.check_integrity([held, held[:1]])


def test_a_block_freed_twice_is_found() -> None:
    pool = BlockPool(4)
    held = pool.allocate(2)
    assert held is not None
    pool.free(held)
    pool.free(held[:1])
    with pytest.raises(IntegrityError):
        pool.check_integrity([])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60))
def test_every_block_is_always_free_or_held_once(operations: list[tuple[bool, int]]) -> None:
    pool = BlockPool(20)
    held: list[list[int]] = []
    for allocates, number in operations:
        if allocates:
            blocks = pool.allocate(number)
            assert (blocks is None) == (number > 20 - sum(map(len, held)))
            held.extend([blocks] if blocks is not None else [])
        elif held:
            pool.free(held.pop(number % len(held)))
        pool.check_integrity(held)
        assert pool.num_free == 20 - sum(map(len, held))

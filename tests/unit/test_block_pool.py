import pytest

from engine.kvcache.block_pool import BlockPool, IntegrityError
from engine.kvcache.prefix_cache import NOTHING, PrefixCache


def make_pool(num_blocks: int) -> BlockPool:
    return BlockPool(num_blocks, PrefixCache())


def allocate(pool: BlockPool, count: int) -> list[int]:
    block_ids = pool.allocate(count)
    assert block_ids is not None
    return block_ids


def pool_with_idle_blocks(*block_ids: int, num_blocks: int) -> tuple[BlockPool, PrefixCache]:
    """Return a pool whose blocks are all findable and were freed in this order."""
    cache = PrefixCache()
    pool = BlockPool(num_blocks, cache)
    for block_id in allocate(pool, num_blocks):
        cache.add(NOTHING, (block_id,), block_id)
    for block_id in block_ids:
        pool.free([block_id])
    return pool, cache


def test_allocating_more_than_is_free_takes_nothing() -> None:
    pool = make_pool(3)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert allocate(pool, 3) == [0, 1, 2]
    assert pool.num_free == 0


def test_freed_blocks_can_be_allocated_again_the_last_freed_first() -> None:
    pool = make_pool(3)
    held = allocate(pool, 2)
    assert not pool.is_free(held[1])
    pool.free(held)
    assert pool.is_free(held[1])
    assert allocate(pool, 3) == [0, 1, 2]


def test_a_shared_block_is_free_when_its_last_holder_has_gone() -> None:
    pool = make_pool(2)
    held = allocate(pool, 1)
    pool.share(held)
    pool.check_integrity([held, held])
    pool.free(held)
    assert pool.num_free == 1
    pool.check_integrity([held])
    pool.free(held)
    assert pool.num_free == 2
    pool.check_integrity([])


def test_an_idle_block_that_is_shared_is_held_again() -> None:
    pool, cache = pool_with_idle_blocks(0, 1, num_blocks=2)
    pool.share([0])
    assert pool.num_free == 1
    pool.check_integrity([[0]])
    assert allocate(pool, 1) == [1]
    assert 0 in cache
    assert 1 not in cache


def test_empty_blocks_are_taken_before_idle_ones() -> None:
    cache = PrefixCache()
    pool = BlockPool(3, cache)
    held = allocate(pool, 2)
    cache.add(NOTHING, (1,), held[0])
    pool.free(held)
    assert allocate(pool, 2) == [1, 2]
    assert 0 in cache


def test_the_least_recently_used_idle_block_is_evicted_first() -> None:
    pool, cache = pool_with_idle_blocks(2, 0, 1, num_blocks=3)
    pool.share([2])
    pool.free([2])
    assert allocate(pool, 1) == [0]
    assert allocate(pool, 2) == [1, 2]
    assert not any(block_id in cache for block_id in range(3))


def test_of_one_table_the_last_block_is_evicted_first() -> None:
    cache = PrefixCache()
    pool = BlockPool(3, cache)
    held = allocate(pool, 3)
    for block_id in held:
        cache.add(NOTHING, (block_id,), block_id)
    pool.free(held)
    assert allocate(pool, 3) == [2, 1, 0]


def test_a_lost_block_is_found() -> None:
    pool = make_pool(4)
    allocate(pool, 1)
    with pytest.raises(IntegrityError, match=r"lost or miscounted: \[0\] \(1 of 4\)"):
        pool.check_integrity([])


def test_a_block_in_more_tables_than_counted_is_found() -> None:
    pool = make_pool(4)
    held = allocate(pool, 2)
    pool.check_integrity([held])
    with pytest.raises(IntegrityError):
        pool.check_integrity([held, held[:1]])


def test_a_block_freed_twice_is_found() -> None:
    pool = make_pool(4)
    held = allocate(pool, 2)
    pool.free(held)
    pool.free(held[:1])
    with pytest.raises(IntegrityError, match=r"\[0\]"):
        pool.check_integrity([])


def test_an_idle_block_that_cannot_be_found_is_found() -> None:
    pool, cache = pool_with_idle_blocks(0, 1, num_blocks=2)
    pool.check_integrity([])
    cache.evict(1)
    with pytest.raises(IntegrityError, match=r"\[1\]"):
        pool.check_integrity([])


def test_an_empty_block_that_can_be_found_is_found() -> None:
    cache = PrefixCache()
    pool = BlockPool(2, cache)
    cache.add(NOTHING, (1,), 1)
    with pytest.raises(IntegrityError, match=r"\[1\]"):
        pool.check_integrity([])


def test_at_most_ten_wrong_blocks_are_named() -> None:
    pool = make_pool(20)
    allocate(pool, 12)
    with pytest.raises(IntegrityError, match=r"\[0, 1, 2, 3, 4, 5, 6, 7, 8, 9\] \(12 of 20\)"):
        pool.check_integrity([])

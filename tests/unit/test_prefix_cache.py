from engine.kvcache.prefix_cache import NOTHING, PrefixCache


def test_a_block_is_found_by_its_tokens_and_all_before() -> None:
    cache = PrefixCache()
    first = cache.add(NOTHING, (1, 2), 7)
    second = cache.add(first, (3, 4), 9)
    found = cache.find(NOTHING, (1, 2))
    assert found == (first, 7)
    assert cache.find(first, (3, 4)) == (second, 9)
    assert cache.find(NOTHING, (3, 4)) is None
    assert cache.find(first, (3, 5)) is None


def test_the_first_block_with_the_same_tokens_stays_the_one_that_is_found() -> None:
    cache = PrefixCache()
    assert cache.add(NOTHING, (1, 2), 7) == cache.add(NOTHING, (1, 2), 8)
    found = cache.find(NOTHING, (1, 2))
    assert found is not None
    assert found.block_id == 7
    assert 7 in cache
    assert 8 not in cache


def test_an_evicted_block_is_not_found() -> None:
    cache = PrefixCache()
    cache.add(NOTHING, (1, 2), 7)
    cache.evict(7)
    assert cache.find(NOTHING, (1, 2)) is None
    assert 7 not in cache


def test_what_followed_an_evicted_block_is_not_found_through_other_tokens() -> None:
    cache = PrefixCache()
    first = cache.add(NOTHING, (1, 2), 7)
    cache.add(first, (3, 4), 8)
    cache.evict(7)
    other = cache.add(NOTHING, (5, 6), 7)
    again = cache.add(NOTHING, (1, 2), 9)
    assert len({NOTHING, first, other, again}) == 4
    assert cache.find(other, (3, 4)) is None

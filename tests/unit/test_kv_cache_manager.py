"""Tables of blocks against a memory that remembers which tokens each block was written with."""

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.kvcache.manager import BlockTable, KVCacheManager

BLOCK_SIZE = 4


def make_manager(num_blocks: int = 8, *, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=enable_prefix_caching)


def hold(manager: KVCacheManager, token_ids: Sequence[int]) -> BlockTable:
    """Compute a whole text, without looking for its beginning."""
    table = BlockTable()
    assert manager.extend(table, list(token_ids), len(token_ids))
    return table


def test_full_blocks_are_found_and_the_tail_is_not() -> None:
    manager = make_manager()
    table = hold(manager, range(10))
    cached = manager.find([*range(10), 10, 11], 12)
    assert (cached.block_ids, cached.num_tokens) == (table.block_ids[:2], 8)


def test_no_more_is_found_than_the_limit_allows() -> None:
    manager = make_manager()
    hold(manager, range(8))
    assert [manager.find(list(range(8)), limit).num_tokens for limit in (0, 3, 4, 7, 8)] == [0, 0, 4, 4, 8]


def test_what_differs_early_is_not_found_although_later_blocks_are_alike() -> None:
    manager = make_manager()
    hold(manager, range(12))
    assert manager.find([0, 1, 2, 9, *range(4, 12)], 12).num_tokens == 0
    assert manager.find([0, 1, 2, 3, 9, *range(5, 12)], 12).num_tokens == 4


def test_blocks_with_a_token_that_is_not_known_yet_are_not_found_until_it_is() -> None:
    manager = make_manager()
    table = BlockTable()
    assert manager.extend(table, [0, 1, 2], 4)
    assert manager.find([0, 1, 2, 3], 4).num_tokens == 0
    assert manager.extend(table, [0, 1, 2, 3], 5)
    assert manager.find([0, 1, 2, 3], 4).num_tokens == 4


def test_blocks_that_are_not_computed_yet_are_not_found() -> None:
    manager = make_manager()
    assert manager.extend(BlockTable(), list(range(8)), 7)
    assert manager.find(list(range(8)), 8).num_tokens == 4


def test_a_table_that_begins_with_shared_blocks_goes_on_with_its_own() -> None:
    manager = make_manager()
    first = hold(manager, range(8))
    second = manager.share(manager.find(list(range(8)), 8))
    assert second.block_ids == first.block_ids
    assert manager.extend(second, [*range(8), 20, 21, 22, 23], 12)
    assert manager.find([*range(8), 20, 21, 22, 23], 12).block_ids == second.block_ids
    assert manager.num_free == 5
    manager.check_integrity([first, second])
    manager.free(second)
    assert manager.num_free == 6


def test_a_block_taken_from_the_free_ones_counts_as_taken_though_it_is_found() -> None:
    manager = make_manager()
    hold(manager, range(8))
    manager.free(hold(manager, [*range(4), 9, 9, 9, 9]))
    cached = manager.find([*range(4), 9, 9, 9, 9], 8)
    assert len(cached.block_ids) == 2  # the first is held, by the other text
    assert manager.num_taken(cached, 17) == 4
    free = manager.num_free
    assert manager.extend(manager.share(cached), [*range(4), 9, 9, 9, 9], 17)
    assert free - manager.num_free == 4


def test_a_table_that_finds_no_room_is_as_it_was() -> None:
    manager = make_manager(num_blocks=2)
    table = hold(manager, range(4))
    assert not manager.extend(table, list(range(12)), 12)
    assert (len(table.block_ids), manager.num_free) == (1, 1)
    assert manager.find(list(range(12)), 12).num_tokens == 4


def test_an_evicted_beginning_hides_what_follows_it() -> None:
    manager = make_manager(num_blocks=3)
    manager.free(hold(manager, range(8)))
    hold(manager, [30] * 8)  # takes the empty block, then the text's last
    assert manager.find(list(range(8)), 8).num_tokens == 4


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = make_manager(enable_prefix_caching=False)
    hold(manager, range(8))
    assert manager.find(list(range(8)), 8) == ([], 0, 0)


class Tables(RuleBasedStateMachine):
    """Texts come, grow and go; each must always find its own tokens in its blocks."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.manager = make_manager(num_blocks)
        self.texts: list[tuple[list[int], BlockTable, int]] = []  # tokens, blocks, how many are computed
        self.contents: dict[int, int] = {}  # token by slot

    @rule(stem=st.integers(0, 20), tail=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def begin(self, stem: int, tail: list[int]) -> None:
        token_ids = [0] * stem + tail
        cached = self.manager.find(token_ids, len(token_ids) - 1)
        free = self.manager.num_free
        taken = self.manager.num_taken(cached, len(token_ids))
        if taken > free:
            return
        table = self.manager.share(cached)
        assert self.manager.extend(table, token_ids, len(token_ids)), "what num_taken says is enough"
        assert free - self.manager.num_free == taken
        self.write(token_ids, table, cached.num_tokens)

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 99), more=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, which: int, more: list[int]) -> None:
        token_ids, table, num_computed = self.texts.pop(which % len(self.texts))
        grown = token_ids + more
        if self.manager.extend(table, grown, len(grown)):
            self.write(grown, table, num_computed)
        else:
            self.texts.append((token_ids, table, num_computed))

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        _, table, _ = self.texts.pop(which % len(self.texts))
        self.manager.free(table)

    def write(self, token_ids: list[int], table: BlockTable, start: int) -> None:
        for position in range(start, len(token_ids)):
            self.contents[self.slot(table, position)] = token_ids[position]
        self.texts.append((token_ids, table, len(token_ids)))

    def slot(self, table: BlockTable, position: int) -> int:
        return table.block_ids[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    @invariant()
    def each_text_is_whole(self) -> None:
        for token_ids, table, _ in self.texts:
            assert [self.contents[self.slot(table, p)] for p in range(len(token_ids))] == token_ids

    @invariant()
    def every_block_is_counted(self) -> None:
        self.manager.check_integrity(table for _, table, _ in self.texts)
        held = {block_id for _, table, _ in self.texts for block_id in table.block_ids}
        assert self.manager.num_free == self.manager.num_blocks - len(held)


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30)

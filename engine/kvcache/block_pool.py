"""Which KV blocks are free, and who holds the others. Integers only: the tensors live in the ranks."""

from collections import OrderedDict
from collections.abc import Iterable

from engine.kvcache.prefix_cache import PrefixCache


class IntegrityError(AssertionError):
    """The bookkeeping contradicts itself: a block is lost, or held by others than are counted."""


class BlockPool:
    """Hands out block numbers `0 … num_blocks - 1` and counts the holders of each.

        empty ──── allocate ───► held, `ref_cnt` times ──── free ───► empty, or idle if the prefix cache finds it
        idle ───── share ──────► held
        idle ───── allocate ───► evicted from the prefix cache, then held: only when no block is empty

    Empty blocks are taken last freed first, idle ones first freed first: that is the least recently used.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._ref_cnt = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    def is_free(self, block_id: int) -> bool:
        """Whether nobody holds the block."""
        return self._ref_cnt[block_id] == 0

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` blocks for a first holder, or None (and take nothing) if fewer are free."""
        if count > self.num_free:
            return None
        block_ids = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._ref_cnt[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a holder to blocks that the prefix cache found."""
        for block_id in block_ids:
            if self.is_free(block_id):
                del self._idle[block_id]
            self._ref_cnt[block_id] += 1

    def free(self, block_ids: list[int]) -> None:
        """Take a holder away, the last block first: what many texts begin with is evicted after what follows it."""
        for block_id in reversed(block_ids):
            self._ref_cnt[block_id] -= 1
            if not self.is_free(block_id):
                continue
            if block_id in self._prefix_cache:
                self._idle[block_id] = None
            else:
                self._empty.append(block_id)

    def _evict(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        self._prefix_cache.evict(block_id)
        return block_id

    def check_integrity(self, tables: Iterable[list[int]]) -> None:
        """Check that each block is held by as many of the block tables as counted, and by none if it is free.

        Raises:
            IntegrityError: naming the blocks that are wrong.
        """
        holders = [0] * self.num_blocks
        for block_ids in tables:
            for block_id in block_ids:
                holders[block_id] += 1
        times_free = [0] * self.num_blocks
        for block_id in (*self._empty, *self._idle):
            times_free[block_id] += 1
        findable = [block_id in self._prefix_cache for block_id in range(self.num_blocks)]
        wrong = [
            block_id
            for block_id, count in enumerate(self._ref_cnt)
            if count != holders[block_id]
            or times_free[block_id] != (count == 0)
            or (count == 0 and findable[block_id] != (block_id in self._idle))
        ]
        if wrong:
            raise IntegrityError(f"KV blocks lost or miscounted: {wrong[:10]} ({len(wrong)} of {self.num_blocks})")

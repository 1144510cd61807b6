"""The KV cache as the scheduler sees it: tables of blocks, some of them shared."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.kvcache.block_pool import BlockPool
from engine.kvcache.prefix_cache import NOTHING, PrefixCache


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens.

    |-- block --|-- block --|-- block --|-- block --|
    |----- num_findable ----|  not full, or with a token that is not known yet
    """

    block_ids: list[int] = field(default_factory=list)
    num_findable: int = 0  # they are in the prefix cache, or others with the same tokens are
    prefix: int = NOTHING  # ends with the last of these


class CachedPrefix(NamedTuple):
    """What the cache holds of the beginning of a sequence."""

    block_ids: list[int]
    prefix: int  # ends with the last of the blocks
    num_tokens: int


class KVCacheManager:
    """Gives sequences their blocks, and full blocks with the same beginning to all that share it.

    A block may be found as soon as its computation is scheduled, even by a row of the same step: see
    `engine.attention.base.Attention`.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._prefix_cache = PrefixCache()
        self._pool = BlockPool(num_blocks, self._prefix_cache)

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return self._pool.num_free

    def find(self, token_ids: list[int], limit: int) -> CachedPrefix:
        """Return the longest cached beginning of `token_ids`, in whole blocks, of at most `limit` tokens."""
        block_ids: list[int] = []
        prefix = NOTHING
        for stop in range(self.block_size, limit + 1, self.block_size):
            block = self._prefix_cache.find(prefix, tuple(token_ids[stop - self.block_size : stop]))
            if block is None:
                break
            prefix = block.prefix
            block_ids.append(block.block_id)
        return CachedPrefix(block_ids, prefix, len(block_ids) * self.block_size)

    def num_taken(self, cached: CachedPrefix, num_tokens: int) -> int:
        """Return how many free blocks a sequence of `num_tokens` takes that begins with `cached`."""
        held = sum(not self._pool.is_free(block_id) for block_id in cached.block_ids)
        return self._blocks_for(num_tokens) - held

    def share(self, cached: CachedPrefix) -> BlockTable:
        """Return the table of a sequence that begins with `cached`."""
        self._pool.share(cached.block_ids)
        return BlockTable(cached.block_ids, len(cached.block_ids), cached.prefix)

    def extend(self, table: BlockTable, token_ids: list[int], num_tokens: int) -> bool:
        """Hold the first `num_tokens` tokens, now that they are to be computed.

        Args:
            table: the sequence's.
            token_ids: those that are known; blocks that they fill can be found from now on.
            num_tokens: known or not; never less than before.

        Returns:
            Whether there were free blocks enough. If not, nothing has changed.
        """
        block_ids = self._pool.allocate(self._blocks_for(num_tokens) - len(table.block_ids))
        if block_ids is None:
            return False
        table.block_ids.extend(block_ids)
        if self.enable_prefix_caching:
            self._make_findable(table, token_ids, min(num_tokens, len(token_ids)) // self.block_size)
        return True

    def free(self, table: BlockTable) -> None:
        """Take a sequence's blocks back. What can be found stays so until its block is needed."""
        self._pool.free(table.block_ids)

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Check that each block is held by as many tables as are counted, and is free if there are none.

        Raises:
            IntegrityError: from the block pool.
        """
        self._pool.check_integrity(table.block_ids for table in tables)

    def _make_findable(self, table: BlockTable, token_ids: list[int], num_full: int) -> None:
        for i in range(table.num_findable, num_full):
            block_token_ids = tuple(token_ids[i * self.block_size : (i + 1) * self.block_size])
            table.prefix = self._prefix_cache.add(table.prefix, block_token_ids, table.block_ids[i])
        table.num_findable = num_full

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

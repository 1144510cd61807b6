"""Which KV blocks hold what a text begins with."""

import itertools
from typing import NamedTuple

NOTHING = 0  # the prefix before the first block


class CachedBlock(NamedTuple):
    """A block, and the prefix that ends with it."""

    prefix: int
    block_id: int


class PrefixCache:
    """An index of full blocks by the tokens in them and all tokens before.

        tokens    |-- block --|-- block --|-- block --|- tail, in no index -|
        prefix    0 ────────► 7 ────────► 8 ────────► 12

    A number stands for each prefix; a block's key is the number of the prefix before it and its own tokens. Keys are
    compared whole, so no text is ever taken for another, as could happen were a hash to stand for the tokens. Numbers
    are not used twice: what followed an evicted block is not found again through another block's number.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[int, tuple[int, ...]], CachedBlock] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}  # by block
        self._prefixes = itertools.count(NOTHING + 1)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._keys

    def find(self, prefix: int, token_ids: tuple[int, ...]) -> CachedBlock | None:
        """Return the block that holds `token_ids` after `prefix`."""
        return self._blocks.get((prefix, token_ids))

    def add(self, prefix: int, token_ids: tuple[int, ...], block_id: int) -> int:
        """Make a block findable, unless another one is already, and return the prefix that ends with it."""
        key = prefix, token_ids
        if key not in self._blocks:
            self._blocks[key] = CachedBlock(next(self._prefixes), block_id)
            self._keys[block_id] = key
        return self._blocks[key].prefix

    def evict(self, block_id: int) -> None:
        """Let a block be found no more."""
        del self._blocks[self._keys.pop(block_id)]

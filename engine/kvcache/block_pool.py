"""Which KV blocks are free. Integers only: the tensors behind the numbers live in the ranks."""

from collections.abc import Iterable


class IntegrityError(AssertionError):
    """The bookkeeping contradicts itself: a block is lost, or held twice."""


class BlockPool:
    """Hands out block numbers `0 … num_blocks - 1`, the last freed first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` blocks, or None (and take nothing) if fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def free(self, block_ids: list[int]) -> None:
        """Take blocks back."""
        self._free.extend(reversed(block_ids))

    def check_integrity(self, held: Iterable[list[int]]) -> None:
        """Check that each block is free or in exactly one of the `held` block tables.

        Raises:
            IntegrityError: naming the blocks that are not.
        """
        seen = [0] * self.num_blocks
        for block_ids in (self._free, *held):
            for block_id in block_ids:
                seen[block_id] += 1
        wrong = [block_id for block_id, count in enumerate(seen) if count != 1]
        if wrong:
            raise IntegrityError(f"KV blocks lost or held twice: {wrong[:10]} ({len(wrong)} of {self.num_blocks})")

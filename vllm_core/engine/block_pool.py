"""Block ids of one pool: reference counts, content hashes, eviction of the least recently freed.

Knows: ids and hashes. Does not know: sequences, groups' windows, tensors. Block 0 is the null
block, never allocated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable


class BlockPool:
    """A free block keeps its content until it is allocated again, so that a later request can share
    it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self.references = [0] * num_blocks
        self.by_key: dict[Hashable, int] = {}
        self.key_of: dict[int, Hashable] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be allocated."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks nobody references, cached ones included."""
        return len(self.free)

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self.free)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be shared."""
        return sum(1 for block in self.key_of if block in self.free)

    def allocate(self) -> int:
        """A block with one reference and no content; the caller has checked num_free."""
        block, _ = self.free.popitem(last=False)
        self.forget(block)
        self.references[block] = 1
        return block

    def find(self, key: Hashable) -> int | None:
        """The block with this content, free or shared."""
        return self.by_key.get(key)

    def share(self, block: int) -> None:
        """One more reference."""
        if not self.references[block]:
            del self.free[block]
        self.references[block] += 1

    def register(self, block: int, key: Hashable) -> None:
        """The steps planned so far complete the block's content, known by this key; the first block
        with a key keeps it."""
        if key not in self.by_key and block not in self.key_of:
            self.by_key[key] = block
            self.key_of[block] = key

    def forget(self, block: int) -> None:
        """Its content can no longer be found."""
        key = self.key_of.pop(block, None)
        if key is not None:
            del self.by_key[key]

    def release(self, block: int) -> None:
        """One reference less; without any, the block is free. Worthless content is evicted
        first."""
        self.references[block] -= 1
        if not self.references[block]:
            self.free[block] = None
            if block not in self.key_of:
                self.free.move_to_end(block, last=False)

    def forget_all(self) -> None:
        """Drops every content, for a device that lost its cache."""
        self.by_key.clear()
        self.key_of.clear()

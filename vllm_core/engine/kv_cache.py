"""Block tables of the live rows: who holds which block, what is shared, what left a window.

Knows: groups, pools, prefix hits. Does not know: tensors, layouts, scheduling order.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from math import lcm

import numpy as np

from vllm_core.backend import KVGroup
from vllm_core.engine import prefix_cache
from vllm_core.engine.block_pool import BlockPool
from vllm_core.ops import HostArray


class KVCache:
    """Tables as arrays over rows, so that the decode path asks one vectorised question."""

    def __init__(
        self, groups: Many[KVGroup], num_blocks: dict[int, int], num_rows: int, max_tokens: int
    ) -> None:
        self.groups = tuple(groups)
        self.pools = [BlockPool(num_blocks[pool]) for pool in sorted(num_blocks)]
        self.sizes = np.array([g.block_tokens for g in groups])
        self.hit_multiple = lcm(*(g.block_tokens for g in groups))
        self.widths = tuple(-(-max_tokens // g.block_tokens) for g in groups)
        self.blocks = [np.zeros((num_rows, width), np.int32) for width in self.widths]
        self.num_blocks = np.zeros((len(groups), num_rows), np.int64)
        """Columns in use, per group and row."""
        self.first_live = np.zeros((len(groups), num_rows), np.int64)
        """Columns before this left the window and are the null block."""
        self.num_registered = np.zeros((len(groups), num_rows), np.int64)
        self.changes: list[list[tuple[int, int, int]]] = [[] for _ in groups]
        """(row, column, block) for the device, per group, since the last `take_changes`."""

    # ---- capacity
    def blocks_for(self, num_tokens: int, chunk: int) -> dict[int, int]:
        """Most blocks per pool that one sequence of this length ever holds, computed in such
        chunks."""
        need = dict.fromkeys(range(len(self.pools)), 0)
        for group in self.groups:
            need[group.pool] += group.blocks_held(num_tokens, chunk)
        return need

    def fits_ever(self, num_tokens: int, chunk: int) -> bool:
        """Whether one sequence of this length fits an empty cache."""
        need = self.blocks_for(num_tokens, chunk)
        return all(need[i] <= pool.num_usable for i, pool in enumerate(self.pools))

    def short_rows(self, rows: HostArray, upto: HostArray) -> HostArray:
        """[len(rows)] bool: which rows need a new block to hold `upto` tokens."""
        have = self.num_blocks[:, rows] * self.sizes[:, None]
        short: HostArray = (have < upto).any(0)
        return short

    # ---- one row's life
    def grow(self, row: int, upto: int) -> bool:
        """Blocks for the positions below `upto` in every group, or in none."""
        missing = [
            -(-upto // group.block_tokens) - int(self.num_blocks[g, row])
            for g, group in enumerate(self.groups)
        ]
        for i, pool in enumerate(self.pools):
            need = sum(max(0, n) for g, n in zip(self.groups, missing, strict=True) if g.pool == i)
            if need > pool.num_free:
                return False
        for g, group in enumerate(self.groups):
            for _ in range(missing[g]):
                self._append(g, row, self.pools[group.pool].allocate())
        return True

    def admit(
        self, row: int, tokens: HostArray, hashes: dict[int, list[bytes]], max_hit: int, chunk: int
    ) -> int | None:
        """Gives an empty row the longest cached prefix of at most `max_hit` tokens.

        -> tokens hit; None (and nothing taken) when the rest of its tokens would not find blocks
        now.
        """
        hit, found = self._longest_hit(hashes, max_hit)
        for g, group in enumerate(self.groups):
            for column, block in found[g]:
                self.pools[group.pool].share(block)
                self._set(g, row, column, block)
            self.num_blocks[g, row] = hit // group.block_tokens
            self.first_live[g, row] = group.first_live(hit)
            self.num_registered[g, row] = hit // group.block_tokens
        length = len(tokens) + 1
        for i, pool in enumerate(self.pools):
            need = sum(
                max(0, group.blocks_held(length, chunk) - len(found[g]))
                for g, group in enumerate(self.groups)
                if group.pool == i
            )
            if need > pool.num_free:
                self.release(row)
                return None
        return hit

    def leave_window(self, rows: HostArray, start: HostArray) -> None:
        """Frees the blocks that no query at or after `start` can see."""
        for g, group in enumerate(self.groups):
            if group.spec.window is None:
                continue
            first = np.maximum(0, (start - group.spec.window + 1) // group.block_tokens)
            for i in np.flatnonzero(first > self.first_live[g, rows]):
                row = int(rows[i])
                for column in range(int(self.first_live[g, row]), int(first[i])):
                    block = int(self.blocks[g][row, column])
                    if block:
                        self.pools[group.pool].release(block)
                        self._set(g, row, column, 0)
                self.first_live[g, row] = first[i]

    def release(self, row: int) -> None:
        """Frees everything of a row; the end of a sequence goes first, since prefixes are
        shared."""
        for g, group in enumerate(self.groups):
            pool = self.pools[group.pool]
            count = int(self.num_blocks[g, row])
            for block in self.blocks[g][row, :count][::-1].tolist():
                if block:
                    pool.release(block)
            self.blocks[g][row, :count] = 0
            if self.changes[g]:
                self.changes[g] = [c for c in self.changes[g] if c[0] != row]
        self.num_blocks[:, row] = self.first_live[:, row] = self.num_registered[:, row] = 0

    # ---- prefix cache
    def rows_to_register(self, rows: HostArray, complete: HostArray) -> HostArray:
        """Which rows have full blocks that the cache does not know yet."""
        full = complete[None] // self.sizes[:, None]
        found: HostArray = rows[(full > self.num_registered[:, rows]).any(0)]
        return found

    def name_blocks(self, hashes: dict[int, list[bytes]], root: bytes, tokens: HostArray) -> None:
        """Adds the names of the full blocks of `tokens` that `hashes` lacks."""
        for size in set(self.sizes.tolist()):
            prefix_cache.extend(hashes.setdefault(size, []), root, tokens, size)

    def names(self, hashes: dict[int, list[bytes]], start: int, stop: int) -> list[bytes]:
        """The names of the blocks that hold positions `start` to `stop`, as far as known. Those of
        one group, as each covers all tokens before it."""
        size = self.groups[0].block_tokens
        return hashes.get(size, [])[start // size : -(-stop // size)]

    def awaits(self, hashes: dict[int, list[bytes]], max_hit: int, coming: set[bytes]) -> bool:
        """Whether a hit of at most `max_hit` tokens may be longer once the blocks of these names
        are computed."""
        if not coming or max_hit < self.hit_multiple:
            return False
        hit, _ = self._longest_hit(hashes, max_hit)
        longer = hit + self.hit_multiple
        return longer <= max_hit and not coming.isdisjoint(self.names(hashes, hit, longer))

    def register(
        self, row: int, tokens: HostArray, hashes: dict[int, list[bytes]], root: bytes
    ) -> None:
        """Makes the row's full blocks of `tokens` (known, and computed by the steps planned so
        far) findable."""
        for g, group in enumerate(self.groups):
            own = hashes.setdefault(group.block_tokens, [])
            prefix_cache.extend(own, root, tokens, group.block_tokens)
            full = len(tokens) // group.block_tokens
            for column in range(int(self.num_registered[g, row]), full):
                block = int(self.blocks[g][row, column])
                if block:
                    self.pools[group.pool].register(block, (g, own[column]))
            self.num_registered[g, row] = full

    def forget(self, hashes: dict[int, list[bytes]]) -> None:
        """These blocks' content must not be shared any more (it holds NaN), wherever it is now."""
        for g, group in enumerate(self.groups):
            pool = self.pools[group.pool]
            for own in hashes.get(group.block_tokens, ()):
                block = pool.find((g, own))
                if block is not None:
                    pool.forget(block)

    def forget_all(self) -> None:
        for pool in self.pools:
            pool.forget_all()

    # ---- for the device
    def take_changes(self) -> tuple[HostArray, ...]:
        """Per group [c, 3] int32 since the last call."""
        taken = tuple(np.array(c, np.int32).reshape(-1, 3) for c in self.changes)
        self.changes = [[] for _ in self.groups]
        return taken

    # ---- helpers
    def _append(self, g: int, row: int, block: int) -> None:
        column = int(self.num_blocks[g, row])
        self._set(g, row, column, block)
        self.num_blocks[g, row] = column + 1

    def _set(self, g: int, row: int, column: int, block: int) -> None:
        self.blocks[g][row, column] = block
        self.changes[g].append((row, column, block))

    def _longest_hit(
        self, hashes: dict[int, list[bytes]], max_hit: int
    ) -> tuple[int, list[list[tuple[int, int]]]]:
        """(tokens, per group the (column, block) pairs): the longest prefix that every group can
        serve."""
        limit = max_hit // self.hit_multiple * self.hit_multiple
        for g, group in enumerate(self.groups):
            if group.spec.window is None:
                limit = min(limit, self._run(g, hashes, limit))
        limit = limit // self.hit_multiple * self.hit_multiple
        while limit > 0:
            found = [self._blocks_at(g, hashes, limit) for g in range(len(self.groups))]
            missing = [f for f in found if f is None]
            if not missing:
                return limit, [f for f in found if f is not None]
            limit -= self.hit_multiple
        return 0, [[] for _ in self.groups]

    def _run(self, g: int, hashes: dict[int, list[bytes]], limit: int) -> int:
        """Tokens of the longest cached run from the start of a full group."""
        group = self.groups[g]
        own, pool = hashes.get(group.block_tokens, []), self.pools[group.pool]
        column = 0
        while (column + 1) * group.block_tokens <= limit and column < len(own):
            if pool.find((g, own[column])) is None:
                break
            column += 1
        return column * group.block_tokens

    def _blocks_at(
        self, g: int, hashes: dict[int, list[bytes]], hit: int
    ) -> list[tuple[int, int]] | None:
        """The blocks that a group needs to go on at position `hit`; None when one is missing."""
        group = self.groups[g]
        own, pool = hashes.get(group.block_tokens, []), self.pools[group.pool]
        found = []
        for column in range(group.first_live(hit), hit // group.block_tokens):
            block = pool.find((g, own[column])) if column < len(own) else None
            if block is None:
                return None
            found.append((column, block))
        return found

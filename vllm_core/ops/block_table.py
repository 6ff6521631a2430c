"""A backend's view of the block tables in the device state.

The core owns block ids and sends changes; how these are applied and looked up is the backend's. The
form that its kernels read (rectangle, compact window, flat lists) is made once per step by the
attention's `plan`.

Knows: rows, columns, block ids. Does not know: who owns a block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from vllm_core.ops.arrays import Array

if TYPE_CHECKING:
    from vllm_core.ops.interface import Ops


class BlockTables(ABC):
    """Tables of every KV group: [N+1, M_g] seen from the core."""

    @abstractmethod
    def alloc(self, num_rows: int, widths: tuple[int, ...]) -> tuple[Array, ...]:
        """Tables of N+1 rows (row N is scrap), all cells 0, the null block."""

    @abstractmethod
    def apply(self, tables: tuple[Array, ...], changes: tuple[Array, ...]) -> tuple[Array, ...]:
        """Per group [C, 3] (row, column, block); padding has row N. Consumes the tables."""

    @abstractmethod
    def lookup(self, tables: tuple[Array, ...], group: int, row: Array, column: Array) -> Array:
        """Block ids of cells; columns past the table read its last cell."""


class RectangleTables(BlockTables):
    """One int32 rectangle per group, in the framework's own arrays."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    def alloc(self, num_rows: int, widths: tuple[int, ...]) -> tuple[Array, ...]:
        return tuple(self.ops.full((num_rows + 1, width), 0, "int32") for width in widths)

    def apply(self, tables: tuple[Array, ...], changes: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(
            self.ops.put(table, (c[:, 0], c[:, 1]), c[:, 2])
            for table, c in zip(tables, changes, strict=True)
        )

    def lookup(self, tables: tuple[Array, ...], group: int, row: Array, column: Array) -> Array:
        table = tables[group]
        return table[row, self.ops.xp.clip(column, 0, table.shape[1] - 1)]

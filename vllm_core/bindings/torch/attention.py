"""Paged attention in plain torch: gathers the live blocks, then multiplies or calls torch's own.

Cache of a pool: [1 + num_blocks, layers, 2, Hkv, BT * D], so that one index_select of contiguous
rows yields [2, rows, Hkv, W, BT * D] without a transposition. Block i of the core is block i + 1
here, and the first one stays zero: cells that are dead (behind the window, before the first block)
read it, and the unused tail of a row's newest block is blanked in the gathered copy, so that
nothing that is not visible can reach an output, NaN included.

Shapes follow from host knowledge only (`plan_host`): rows that decode are batched in classes of
like length, rows with more tokens go one by one.

Knows: its layout, torch. Does not know: vendors, who owns a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vllm_core.backend import (
    KV,
    AttentionBackend,
    AttentionPlan,
    AttentionSpec,
    HostStep,
    KVGroup,
)
from vllm_core.bindings.torch.attention_math import scores, weigh
from vllm_core.bindings.torch.convert import dtype_of, from_host, to_host
from vllm_core.errors import InvalidArgument, NotSupported, OutOfMemory
from vllm_core.ops import BucketKey, DeviceState, HostArray, StepInput, StepView

Tensor = torch.Tensor

GATHER_BYTES = 16 << 20
"""Most bytes of K and V that a class of decoding rows gathers: what stays in a last-level cache."""
WASTED_BLOCKS = 64
"""Most blocks a class of decoding rows reads in vain."""
SCORE_ELEMENTS = 1 << 24
"""Most scores of a prefill that are written out at a time."""


@dataclass(frozen=True)
class Decode:
    """Rows of one class: one token each, gathered over the same number of blocks."""

    rows: Tensor | slice
    """[C] which rows, which are also their tokens."""
    gather: Any
    """What the layout needs to read the class's blocks."""
    mask: Tensor
    """[C, 1, 1, W * BT] float32, added to the scores: -inf where the row must not see."""
    tail: Tensor
    """[C, BT] bool, slots of the last block that hold nothing of the row."""


@dataclass(frozen=True)
class Prefill:
    """One row with several tokens."""

    begin: int
    end: int
    """Its tokens."""
    gather: Any
    """None: nothing is cached before its tokens, and K and V of the step are all it needs."""
    length: int
    """Keys behind the first gathered block's start."""
    visible: Tensor | None
    """[n, keys] bool; None: every query sees the keys up to its own, or all if not causal."""


@dataclass(frozen=True)
class PlanArrays:
    """Of one spec; the index tensors hold for layer 0, others read the cache from a later start."""

    slots: Any
    """What the layout needs to write the step's tokens."""
    decode: tuple[Decode, ...]
    prefill: tuple[Prefill, ...]
    num_decode: int
    num_tokens: int
    """Real ones; the rest of T is padding."""


class TorchAttention(AttentionBackend):
    """Any device. A subclass may change the layout and the way decoding rows are computed."""

    def __init__(
        self,
        device: torch.device,
        dtype: str,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        """synchronize: waits until the device has done what was submitted."""
        self.device = device
        self.dtype = dtype_of(dtype)
        self._synchronize = synchronize or (lambda: None)
        self.multiplies = device.type == "cpu"
        """Whether two products are faster than torch's attention where a query is one token."""

    # ---- the cache
    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        return (32, 16, 64, 8, 128, 4, 2, 1)

    def block_bytes(self, group: KVGroup) -> int:
        return _block_elements(group) * self.dtype.itemsize

    def alloc(self, groups: Sequence[KVGroup], num_blocks: dict[int, int]) -> KV:
        sizes = {group.pool: _block_elements(group) for group in groups}
        for group in groups:
            if group.spec.dim_v != group.spec.dim_qk:
                raise NotSupported("this layout needs V heads as wide as K heads")
            group.spec.kv.refuse_unless(str(self.dtype).removeprefix("torch."))
            if _block_elements(group) != sizes[group.pool]:
                raise InvalidArgument("groups of one pool must have blocks of one size")
        try:
            return tuple(
                torch.zeros(num_blocks[pool] + 1, sizes[pool], dtype=self.dtype, device=self.device)
                for pool in sorted(sizes)
            )
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            raise OutOfMemory(
                f"no memory for {num_blocks} KV blocks (by pool); lower num_kv_blocks or "
                "memory_utilization"
            ) from error

    def layout_fingerprint(self, group: KVGroup) -> str:
        spec = group.spec
        shape = (group.layers, 2, spec.num_kv_heads, group.block_tokens, spec.dim_qk)
        return f"block-layer-kv-head-token-dim {shape} {self.dtype}"

    def _keys_and_values(self, kv: KV, group: KVGroup) -> tuple[Tensor, Tensor]:
        """Views [num_blocks, layers, Hkv, BT, D] of the cache, by the core's block ids."""
        spec = group.spec
        view = kv[group.pool][1:].view(
            -1, group.layers, 2, spec.num_kv_heads, group.block_tokens, spec.dim_qk
        )
        return view[:, :, 0], view[:, :, 1]

    def export_blocks(self, kv: KV, group: KVGroup, ids: Sequence[int]) -> dict[str, HostArray]:
        self._synchronize()
        index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
        found = {}
        for name, view in zip("kv", self._keys_and_values(kv, group), strict=True):
            blocks = view[index].permute(1, 0, 3, 2, 4)  # [layers, blocks, BT, Hkv, D]
            found[name] = to_host(blocks.contiguous().to("cpu", copy=True))
        return found

    def import_blocks(
        self, kv: KV, group: KVGroup, ids: Sequence[int], arrays: dict[str, HostArray]
    ) -> KV:
        self._synchronize()
        index = torch.tensor(list(ids), dtype=torch.long, device=self.device)
        for name, view in zip("kv", self._keys_and_values(kv, group), strict=True):
            blocks = from_host(arrays[name]).to(self.device, self.dtype)
            view[index] = blocks.permute(1, 0, 3, 2, 4)
        return kv

    def copy_blocks(self, kv: KV, group: KVGroup, src: Tensor, dst: Tensor) -> KV:
        pool = kv[group.pool][1:]
        pool[dst] = pool[src]
        return kv

    # ---- once per step
    def plan_host(self, host: HostStep, key: BucketKey) -> dict[str, HostArray]:
        """Stays on the host: the lengths decide shapes."""
        return {
            "query_len": np.array(host.query_len, np.int64),
            "seq_len": np.array(host.seq_len, np.int64),
            "split": np.array(host.split, np.int64),
        }

    def plan(
        self,
        state: DeviceState,
        view: StepView,
        step: StepInput,
        key: BucketKey,
        host_part: Any,
        specs: tuple[AttentionSpec, ...],
        groups: tuple[KVGroup, ...],
    ) -> tuple[AttentionPlan, ...]:
        made: dict[tuple[int, int | None, bool], PlanArrays] = {}
        plans = []
        for spec in specs:
            if spec.chunk is not None or spec.alibi or not spec.writes_kv:
                raise NotSupported("chunked, ALiBi and borrowed attention are reserved")
            same = (spec.group, spec.window, spec.causal)
            if same not in made:
                made[same] = self._plan_group(state, view, step, host_part, spec, groups)
            plans.append(AttentionPlan(made[same], spec, groups[spec.group]))
        return tuple(plans)

    def _plan_group(
        self,
        state: DeviceState,
        view: StepView,
        step: StepInput,
        host_part: dict[str, HostArray],
        spec: AttentionSpec,
        groups: tuple[KVGroup, ...],
    ) -> PlanArrays:
        group = groups[spec.group]
        size = group.block_tokens
        query_len, seq_len = host_part["query_len"], host_part["seq_len"]
        num_decode = int(host_part["split"][0])
        tables = state.tables[spec.group][step.row].long()  # [S, M]
        classes = split_classes(
            _blocks_to_read(seq_len[:num_decode], spec.window, size),
            max(1, GATHER_BYTES * group.layers // self.block_bytes(group)),
        )
        decode = [
            self._plan_decode(rows, width, tables, view.seq_lens, spec, group)
            for rows, width in classes
        ]
        prefill = []
        ends = np.cumsum(query_len)
        for row in range(num_decode, len(query_len)):
            end = int(ends[row])
            begin = end - int(query_len[row])
            if begin < end:
                prefill.append(
                    self._plan_prefill(
                        begin, end, int(seq_len[row]), tables[row], view.positions, spec, group
                    )
                )
        return PlanArrays(
            self._slots(view.slots[spec.group].long(), group),
            tuple(decode),
            tuple(prefill),
            num_decode,
            int(ends[-1]) if len(ends) else 0,
        )

    def _plan_decode(
        self,
        rows: HostArray | slice,
        width: int,
        tables: Tensor,
        seq_lens: Tensor,
        spec: AttentionSpec,
        group: KVGroup,
    ) -> Decode:
        """Blocks stand to the right: a row's newest is in the last column, whatever its length."""
        size = group.block_tokens
        own: Tensor | slice
        own = rows if isinstance(rows, slice) else torch.from_numpy(rows).to(self.device)
        lengths, tables = seq_lens[own].long()[:, None], tables[own]
        last = torch.div(lengths - 1, size, rounding_mode="floor")
        column = last + torch.arange(1 - width, 1, device=self.device)  # [C, W]
        is_live = column >= 0
        if spec.window is not None:
            is_live &= (column + 1) * size > lengths - spec.window
        blocks = torch.where(is_live, tables.gather(1, column.clamp(0, tables.shape[1] - 1)), -1)
        position = (column[:, :, None] * size + torch.arange(size, device=self.device)).flatten(1)
        hidden = (position < 0) | (position >= lengths)
        if spec.window is not None:
            hidden |= position < lengths - spec.window
        tail = hidden[:, -size:] & (position[:, -size:] >= lengths)
        mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)
        gather = self._gather_decode(blocks, tail, group)
        return Decode(own, gather, mask[:, None, None], tail)

    def _plan_prefill(
        self,
        begin: int,
        end: int,
        seq_len: int,
        table: Tensor,
        positions: Tensor,
        spec: AttentionSpec,
        group: KVGroup,
    ) -> Prefill:
        """seq_len is exact, as such a row has no drafts: the keys are cut to it."""
        size, n = group.block_tokens, end - begin
        is_cached = seq_len > n
        reach = seq_len if spec.window is None else min(seq_len, n + spec.window - 1)
        first = (seq_len - reach) // size if is_cached else 0
        gather = None
        if is_cached:
            blocks = table[first : -(-seq_len // size)]
            gather = self._gather_rows(blocks[None], group)
        visible = None
        if is_cached or (spec.window is not None and spec.window < n):
            query = positions[begin:end, None]
            key = torch.arange(first * size, seq_len, device=self.device)
            visible = key <= query if spec.causal else (key >= 0).expand(n, -1)
            if spec.window is not None:
                visible = visible & (key > query - spec.window)
        return Prefill(begin, end, gather, seq_len - first * size, visible)

    # ---- the layout: subclasses replace these together
    def _gather_decode(self, blocks: Tensor, tail: Tensor, group: KVGroup) -> Any:
        """What `_decode` reads with; blocks [C, W], -1 the one that stays zero; tail [C, BT]."""
        return self._gather_rows(blocks, group)

    def _gather_rows(self, blocks: Tensor, group: KVGroup) -> Tensor:
        """[2 * C * Hkv * W] rows of BT * D elements, for layer 0."""
        heads = group.spec.num_kv_heads
        both = torch.arange(2, device=self.device).view(2, 1, 1, 1)
        head = torch.arange(heads, device=self.device).view(1, 1, heads, 1)
        row = ((blocks[None, :, None] + 1) * (group.layers * 2) + both) * heads + head
        return row.flatten()

    def _rows(self, kv: KV, group: KVGroup, layer: int, width: int) -> Tensor:
        """The pool in rows of `width` elements; indices made for layer 0 read `layer` in it."""
        start = layer * 2 * group.spec.num_kv_heads * group.block_tokens * group.spec.dim_qk
        flat: Tensor = kv[group.pool].view(-1, width)
        return flat[start // width :]

    def _read(self, kv: KV, group: KVGroup, layer: int, rows: Tensor, count: int) -> Tensor:
        """[2, C, Hkv, W * BT, D], a copy."""
        spec = group.spec
        width = group.block_tokens * spec.dim_qk
        found = self._rows(kv, group, layer, width).index_select(0, rows)
        return found.view(2, count, spec.num_kv_heads, -1, spec.dim_qk)

    def _slots(self, slots: Tensor, group: KVGroup) -> Any:
        """What `_write` writes with; slots [T]. Here: rows of D elements, K's before V's."""
        heads, size = group.spec.num_kv_heads, group.block_tokens
        block = torch.div(slots, size, rounding_mode="floor")[:, None] + 1
        head = torch.arange(heads, device=self.device)
        row = (block * (group.layers * 2 * heads) + head) * size + (slots % size)[:, None]
        return torch.cat((row, row + heads * size)).flatten()

    def _write(self, kv: KV, layer: int, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
        width = plan.spec.dim_qk
        rows = self._rows(kv, plan.group, layer, width)
        rows.index_copy_(0, plan.arrays.slots, torch.cat((k, v)).view(-1, width))

    # ---- per layer
    def attend(
        self,
        kv: KV,
        layer: Tensor | int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        *,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None, KV]:
        if return_lse and sinks is not None:
            raise InvalidArgument("return_lse with sinks: merge applies the sink, once")
        layer, arrays = int(layer), plan.arrays
        self._write(kv, layer, k, v, plan)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = None
        if return_lse:
            lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        if arrays.num_tokens < q.shape[0]:
            out[arrays.num_tokens :] = 0
        for part in arrays.decode:
            some, some_lse = self._decode(kv, layer, q[part.rows], part, plan, sinks, return_lse)
            out[part.rows] = some
            if lse is not None and some_lse is not None:
                lse[part.rows] = some_lse
        for row in arrays.prefill:
            here = slice(row.begin, row.end)
            keys, values = k[here], v[here]
            if row.gather is not None:
                keys, values = self._read_prefill(kv, layer, row, plan)
            some, some_lse = self._prefill(
                q[here], keys, values, row.visible, plan.spec, sinks, return_lse
            )
            out[here] = some
            if lse is not None and some_lse is not None:
                lse[here] = some_lse
        return out, lse, kv

    def _decode(
        self,
        kv: KV,
        layer: int,
        q: Tensor,
        part: Decode,
        plan: AttentionPlan,
        sinks: Tensor | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """q [C, Hq, D] -> out [C, Hq, D], lse [C, Hq]."""
        spec, group = plan.spec, plan.group
        count, heads, dim = q.shape[0], spec.num_kv_heads, spec.dim_qk
        both = self._read(kv, group, layer, part.gather, count)
        newest = both.view(2, count, heads, -1, group.block_tokens, dim)[:, :, :, -1]
        newest.masked_fill_(part.tail[:, None, :, None], 0)
        keys, values = both[0], both[1]
        grouped = q.view(count, heads, -1, dim)
        if _is_plain(spec, sinks, return_lse) and not self.multiplies:
            out = F.scaled_dot_product_attention(
                grouped, keys, values, attn_mask=part.mask.to(q.dtype), scale=spec.scale
            )
            return out.reshape(q.shape), None
        score = scores(grouped.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), spec.scale)
        p, lse = weigh(score.view(count, heads, -1, keys.shape[2]), part.mask, spec, sinks)
        out = torch.bmm(p.flatten(0, 1).to(values.dtype), values.flatten(0, 1))
        return out.view(q.shape).to(q.dtype), lse() if return_lse else None

    def _read_prefill(
        self, kv: KV, layer: int, row: Prefill, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """K and V [keys, Hkv, D] of one row, cut to what was written."""
        both = self._read(kv, plan.group, layer, row.gather, 1)[:, 0, :, : row.length]
        return both[0].transpose(0, 1), both[1].transpose(0, 1)

    def _prefill(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor | None,
        spec: AttentionSpec,
        sinks: Tensor | None,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """q [n, Hq, D], k and v [keys, Hkv, D] -> out [n, Hq, D], lse [n, Hq]."""
        n, heads, dim = q.shape[0], spec.num_kv_heads, spec.dim_qk
        # KV heads are the batch; the heads of a group share K and V by a stride of 0: no copies
        grouped = q.view(n, heads, -1, dim).permute(1, 2, 0, 3)  # [Hkv, G, n, D]
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, keys, D]
        if _is_plain(spec, sinks, return_lse):
            shape = (heads, grouped.shape[1], k.shape[0], dim)
            out = F.scaled_dot_product_attention(
                grouped,
                keys[:, None].expand(shape),
                values[:, None].expand(shape),
                attn_mask=visible,
                is_causal=visible is None and spec.causal,
                scale=spec.scale,
            )
            return out.permute(2, 0, 1, 3).reshape(q.shape), None
        if visible is None:
            visible = torch.ones(n, k.shape[0], dtype=torch.bool, device=q.device)
            visible = visible.tril() if spec.causal else visible
        outs, lses = [], []
        mask = torch.zeros(visible.shape, device=q.device).masked_fill_(~visible, -torch.inf)
        step = max(1, SCORE_ELEMENTS // (spec.num_q_heads * k.shape[0]))
        for begin in range(0, n, step):
            query, seen = grouped[:, :, begin : begin + step], mask[begin : begin + step]
            score = scores(query.flatten(1, 2), keys.transpose(1, 2), spec.scale)
            score = score.view(heads, -1, query.shape[2], k.shape[0]).transpose(1, 2)
            score = score.transpose(0, 1)  # [n, Hkv, G, keys]
            p, lse = weigh(score, seen[:, None, None], spec, sinks)
            p = p.permute(1, 2, 0, 3).flatten(1, 2)
            out = torch.bmm(p.to(values.dtype), values).view(query.shape).permute(2, 0, 1, 3)
            outs.append(out.reshape(-1, *q.shape[1:]).to(q.dtype))
            lses += [lse()] if return_lse else []
        return torch.cat(outs), torch.cat(lses) if return_lse else None


def split_classes(need: HostArray, limit: int) -> list[tuple[HostArray | slice, int]]:
    """Rows [n] by the blocks they need -> (rows, width) of each class, which reads rows * width.

    No class reads more than `limit`, unless one row does. A class costs some 50 us per layer, as
    much as a few dozen blocks: a row joins while the class wastes less than that.
    """
    if not len(need):
        return []
    width = int(need.max())
    if width * len(need) <= limit and width * len(need) - int(need.sum()) <= WASTED_BLOCKS:
        return [(slice(0, len(need)), width)]
    order = np.argsort(-need, kind="stable")
    classes: list[tuple[HostArray | slice, int]] = []
    begin, waste = 0, 0
    for place, row in enumerate(order):
        width = int(need[order[begin]])
        waste += width - int(need[row])
        if place > begin and (waste > WASTED_BLOCKS or width * (place + 1 - begin) > limit):
            classes.append((np.sort(order[begin:place]), width))
            begin, waste = place, 0
    classes.append((np.sort(order[begin:]), int(need[order[begin]])))
    return classes


def _blocks_to_read(seq_len: HostArray, window: int | None, size: int) -> HostArray:
    """[n] blocks that hold what the newest token of each row sees."""
    need = -(-seq_len // size)
    if window is not None:
        need = np.minimum(need, (window + size - 2) // size + 1)
    return need


def _block_elements(group: KVGroup) -> int:
    spec = group.spec
    return group.layers * 2 * spec.num_kv_heads * group.block_tokens * spec.dim_qk


def _is_plain(spec: AttentionSpec, sinks: Tensor | None, return_lse: bool) -> bool:
    """Whether torch's own attention computes it."""
    return spec.softcap is None and sinks is None and not return_lse

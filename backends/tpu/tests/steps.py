"""One layer of a step, as the kernel and as the binding's own text compute it.

Knows: caches, tables, plans. Does not know: kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vllm_core.backend import AttentionSpec, KVFormat, KVGroup
from vllm_core.bindings.jax import JaxAttention
from vllm_core.ops import BucketKey, StepInput, StepView

Host = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Rows of a step as (keys with those of the step, new tokens); what nobody wrote is NaN."""

    rows: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    dim: int
    block: int
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    padding: tuple[int, int] = (0, 0)
    """Tokens and rows that are nobody's."""
    lse: bool = False
    layers: int = 2
    seed: int = 0
    spoiled: bool = False
    """The first query is NaN."""

    def run(
        self, attention: JaxAttention, layer: int = 1
    ) -> tuple[Host, Host | None, dict[str, Host]]:
        """(outputs [T, heads, dim], LSE, the cache as exported) of the live tokens."""
        rng = np.random.default_rng(self.seed)
        spec = AttentionSpec(
            self.heads, self.kv_heads, self.dim, self.dim, self.dim**-0.5, KVFormat(self.dtype), 0,
            **self.options,
        )  # fmt: skip
        kind = "full" if spec.window is None else "window"
        group = KVGroup(0, kind, self.block, self.layers, spec, 0)  # type: ignore[arg-type]
        width = max(-(-length // self.block) for length, _ in self.rows) + 1
        num_rows, live = len(self.rows) + self.padding[1], len(self.rows)
        num_blocks = 1 + live * width
        tables = np.zeros((num_rows + 1, width), np.int32)
        tables[:live] = (rng.permutation(num_blocks - 1) + 1).reshape(live, width)
        kind_of = jnp.dtype(self.dtype)

        def draw(*shape: int) -> Host:
            drawn: Host = rng.standard_normal(shape, np.float32).astype(kind_of)
            return drawn

        shape = (self.layers, num_blocks, self.block, self.kv_heads, self.dim)
        cached = {name: np.full(shape, np.nan, kind_of) for name in "kv"}
        for row, (length, new) in enumerate(self.rows):
            at = np.arange(length - new)
            for x in cached.values():
                x[:, tables[row, at // self.block], at % self.block] = draw(
                    self.layers, len(at), *shape[3:]
                )
        ids = list(range(1, num_blocks))
        kv = attention.alloc((group,), {0: num_blocks})
        kv = attention.import_blocks(kv, group, ids, {n: x[:, 1:] for n, x in cached.items()})

        counts = [new for _, new in self.rows]
        used = sum(counts)
        tokens = used + self.padding[0]
        start = np.full(num_rows + 1, used, np.int32)
        start[: live + 1] = np.cumsum([0, *counts])
        sequence = np.zeros(tokens, np.int32)
        position, slots = np.zeros(tokens, np.int32), np.zeros(tokens, np.int32)
        lengths = np.zeros(num_rows, np.int32)
        for row, (length, new) in enumerate(self.rows):
            own = slice(start[row], start[row] + new)
            at = np.arange(length - new, length)
            sequence[own], position[own], lengths[row] = row, at, length
            slots[own] = tables[row, at // self.block] * self.block + at % self.block
        rows = np.where(np.arange(num_rows) < live, np.arange(num_rows), num_rows).astype(np.int32)
        nothing = jnp.zeros(0, jnp.int32)
        step = StepInput(rows, start, nothing, nothing, nothing, nothing, (nothing,), nothing)
        valid = np.arange(tokens) < used
        view = StepView(nothing, position, (slots,), sequence, nothing, valid, lengths)
        step, view = (jax.tree_util.tree_map(jnp.asarray, x) for x in (step, view))
        state: Any = SimpleNamespace(tables=(jnp.asarray(tables),))
        key = BucketKey(tokens, num_rows, (width,))
        sinks = jnp.asarray(draw(self.heads), jnp.float32) if spec.sinks else None

        def layer_of(kv: Any, q: Any, k: Any, v: Any) -> Any:
            (plan,) = attention.plan(state, view, step, key, None, (spec,), (group,))
            return attention.attend(kv, layer, q, k, v, plan, sinks=sinks, return_lse=self.lse)

        q, k, v = (draw(tokens, n, self.dim) for n in (self.heads, self.kv_heads, self.kv_heads))
        if self.spoiled:
            q[0] = np.nan
        out, lse, kv = jax.jit(layer_of)(kv, q, k, v)
        exported = attention.export_blocks(kv, group, ids)
        return (
            np.asarray(out, np.float32)[:used],
            None if lse is None else np.asarray(lse)[:used],
            {name: np.asarray(x, np.float32) for name, x in exported.items()},
        )

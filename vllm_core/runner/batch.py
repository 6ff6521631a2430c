"""Packs a plan into the one buffer of its bucket, and what does not fit into calls of `apply`.

Knows: padding. Does not know: programs, devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_core.backend import APPLY_ROWS, BucketPolicy, HostStep, StepLayout
from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, Features, HostArray
from vllm_core.plan import Plan


def exact_key(plan: Plan, block_tokens: tuple[int, ...]) -> BucketKey:
    """The smallest shapes that hold the plan."""
    longest = int((plan.start + plan.query_len).max())
    needs = plan.needs
    return BucketKey(
        tokens=len(plan.token_ids),
        rows=len(plan.rows),
        widths=tuple(-(-longest // size) for size in block_tokens),
        features=Features(
            draw=needs.draw,
            filters=needs.filters,
            penalties=needs.penalties,
            bias=needs.bias,
            logprobs=needs.logprobs,
            keep_hidden=bool(plan.prompt_targets),
        ),
    )


def cover(policy: BucketPolicy, key: BucketKey) -> BucketKey:
    """The declared bucket for a step."""
    found = policy.cover(key)
    if found is None:
        raise NotSupported(
            f"no declared shape holds a step of {key.tokens} tokens, {key.rows} rows, "
            f"{key.widths} blocks; lower max_num_batched_tokens, max_num_seqs or max_model_len"
        )
    return found


def build_step(plan: Plan, layout: StepLayout) -> tuple[HostArray, HostStep]:
    """The packed step and the host's knowledge of it. Changes must fit (`overflow` first)."""
    buffer = layout.template().copy()
    v = layout.views(buffer)
    n, total, num_rows = len(plan.rows), len(plan.token_ids), layout.key.rows
    end = np.cumsum(plan.query_len)
    v["row"][:n] = plan.rows
    v["query_start"][1 : n + 1] = end
    v["query_start"][n + 1 :] = total
    v["token_ids"][:total] = plan.token_ids
    v["logit_rows"][:n, 0] = end - 1
    v["logit_rows"][:n, 1] = np.where(plan.draws, np.arange(n), num_rows)
    v["split"][:] = split = (plan.num_single, plan.num_single, n)
    if len(plan.resets):
        v["resets"][: len(plan.resets)] = plan.resets
    size = layout.num_changes
    for g, changes in enumerate(plan.table_changes):
        _keep(v[f"table_changes{g}"], changes, size)
    _keep(v["history_changes"], plan.history_changes, size)
    return buffer, HostStep(plan.query_len, plan.start + plan.query_len, split)


def overflow(plan: Plan, layout: StepLayout) -> Iterator[tuple[HostArray, HostArray]]:
    """(tables [G, C, 3], history [C, 3]) for each call of `apply` that must go ahead of the
    step."""
    size = layout.num_changes
    scrap = (layout.num_rows, layout.num_history_slots)
    ahead = [_ahead(c, size) for c in plan.table_changes]
    history = _ahead(plan.history_changes, size)
    for at in range(0, max(len(history), *(len(c) for c in ahead)), APPLY_ROWS):
        part = slice(at, at + APPLY_ROWS)
        yield (
            np.stack([_padded(c[part], scrap[0]) for c in ahead]),
            _padded(history[part], scrap[1]),
        )


def _keep(view: HostArray, changes: HostArray, size: int) -> None:
    """The last changes stay in the step's buffer: all of them where they fit."""
    rest = changes[len(_ahead(changes, size)) :]
    view[: len(rest)] = rest


def _ahead(changes: HostArray, size: int) -> HostArray:
    """What does not fit into the step's buffer and must be applied before."""
    return changes[: max(0, len(changes) - size)]


def _padded(changes: HostArray, scrap: int) -> HostArray:
    out = np.zeros((APPLY_ROWS, 3), np.int32)
    out[:, 0] = scrap
    out[: len(changes)] = changes
    return out

"""Which tokens a request may draw from given logits: section 8 of the seam in float64.

Philox as Salmon et al. (SC11) print it, inverse CDF in order of id, filters by (logit descending,
id ascending). With an error of the logits the answer is a set.

Knows: sampling parameters. Does not know: models, engines, the core's sampler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.engine.request import Request

Numbers = NDArray[Any]

EDGE = 1e-6
"""Of an interval of the CDF: for exp and the 27 bits of a weight."""
MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Choice:
    """What may be drawn."""

    tokens: frozenset[int]
    expected: int
    is_strict: bool
    """No error within the noise could change the token."""


def philox_word(counter: Sequence[int], key: Sequence[int]) -> int:
    """Word 0 of Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (second >> 32) ^ c1 ^ k0,
            second & MASK,
            (first >> 32) ^ c3 ^ k1,
            first & MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0


def adjusted(x: Numbers, request: Request, so_far: Sequence[int]) -> tuple[Numbers, float]:
    """Logits [V] after bans, bias and penalties for the token behind `so_far`; and by how much an
    error of a logit may have grown."""
    p, x = request.params, x.copy()
    for token, bias in p.logit_bias.items():
        x[token] += bias
    if p.allowed_token_ids is not None:
        x[[token for token in range(len(x)) if token not in p.allowed_token_ids]] = -np.inf
    x[list(p.banned_token_ids)] = -np.inf
    if len(so_far) < p.min_tokens:
        x[request.stop_ids] = -np.inf
    for token in {*request.prompt, *so_far}:
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else (x[token] * p.repetition_penalty)
        )
    for token, count in Counter(so_far).items():
        x[token] -= count * p.frequency_penalty + p.presence_penalty
    return x, max(1.0, p.repetition_penalty, 1.0 / p.repetition_penalty)


def choices(x: Numbers, error: Numbers, request: Request, index: int, position: int) -> Choice:
    """x, error [V]: logits and how far each may be off. position: of the drawn token."""
    best = int(x.argmax())
    p = request.params
    if p.is_greedy:
        near = np.flatnonzero(x + error >= x[best] - error[best])
        return Choice(frozenset(near.tolist()), best, len(near) == 1)
    possible = np.isfinite(x)
    share = np.exp((x - x[best]) / p.temperature)
    likely = possible & (share > EDGE * share.sum())
    slack = 2 * float(error[likely].max()) / p.temperature
    surely, perhaps = _kept(x, share, error, request, slack)
    mass = np.where(perhaps, share, 0.0)
    edges = np.cumsum(mass) / mass.sum()
    word = philox_word((position, index, 0, 0), (request.seed & MASK, request.seed >> 32))
    u = word / 2.0**32
    expected = int(np.searchsorted(edges, u, side="right"))
    if (surely != perhaps).any():
        return Choice(frozenset(np.flatnonzero(perhaps).tolist()), expected, False)
    wide = min(1.0, slack) + EDGE
    near = np.flatnonzero(perhaps & (edges - mass / mass.sum() - wide <= u) & (u < edges + wide))
    return Choice(frozenset(near.tolist()), expected, len(near) == 1)


def _kept(
    x: Numbers, share: Numbers, error: Numbers, request: Request, slack: float
) -> tuple[Numbers, Numbers]:
    """[V] bool twice: what top-k, top-p and min-p keep, and what they might keep with errors."""
    p, size = request.params, len(x)
    order = np.lexsort((np.arange(size), -x))
    rank = np.empty(size, int)
    rank[order] = np.arange(size)

    def prefix(low: int, high: int) -> tuple[Numbers, Numbers]:
        """The first `low` tokens, less those that could fall behind the next one; the first `high`,
        and those that could get before the last of them."""
        tight = rank < low
        if low < size:
            tight &= x - error > x[order[low]] + error[order[low]]
        last = order[high - 1]
        return tight, (rank < high) | (x + error >= x[last] - error[last])

    surely = perhaps = np.isfinite(x)
    if 0 < p.top_k < size:
        tight, loose = prefix(p.top_k, p.top_k)
        surely, perhaps = surely & tight, perhaps & loose
    if p.top_p < 1:
        mass = np.where(perhaps, share, 0.0)[order]
        before = (np.cumsum(mass) - mass) / mass.sum()
        cut = slack + EDGE
        tight, loose = prefix(
            max(1, int((before + cut < p.top_p).sum())),
            max(1, int((before - cut < p.top_p).sum())),
        )
        surely, perhaps = surely & tight, perhaps & loose
    if p.min_p > 0:
        below, gap = (x.max() - x) / p.temperature, -np.log(p.min_p)
        surely = surely & (below <= gap - slack - EDGE)
        perhaps = perhaps & (below <= gap + slack + EDGE)
    return surely, perhaps

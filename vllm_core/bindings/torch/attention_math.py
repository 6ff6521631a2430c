"""Scores and their softmax in float32, with all that torch's own attention has no word for.

Knows: softcap, sinks, lse. Does not know: caches, layouts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_core.backend import AttentionSpec

Tensor = torch.Tensor


def scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q [B, M, D] @ k [B, D, L] in float32 or better.

    A product of 16-bit matrices is stored in 16 bits; on the CPU a second one, of what the first
    lost, restores it at a fraction of the cost of widening K.
    """
    if q.dtype in (torch.float32, torch.float64):
        return torch.bmm(q * scale, k)
    if q.device.type != "cpu":
        return torch.bmm(q.float() * scale, k.float())
    high = torch.bmm(q, k)
    low = torch.baddbmm(high, q, k, beta=-1)
    return high.float().add_(low).mul_(scale)


def weigh(
    score: Tensor, mask: Tensor, spec: AttentionSpec, sinks: Tensor | None
) -> tuple[Tensor, Callable[[], Tensor]]:
    """Softmax of score [C, Hkv, G, L], which is consumed, plus mask; how to get its lse [C, Hq]."""
    if spec.softcap is not None:
        score = score.div_(spec.softcap).tanh_().mul_(spec.softcap)
    score = score.add_(mask)
    if sinks is None:
        return torch.softmax(score, -1), lambda: torch.logsumexp(score, -1).flatten(1).float()
    sink = sinks.to(score.dtype).view(score.shape[1:3])[..., None].expand(*score.shape[:3], 1)
    p = torch.softmax(torch.cat((score, sink), -1), -1)[..., :-1]
    return p, lambda: torch.logsumexp(score, -1).flatten(1).float()

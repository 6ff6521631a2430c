"""Wrong routers and experts.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Param, reference
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.planted import Method, Numbers, Open, as_bfloat16, ops


# ---------------------------------------------------------------- the router
def _route(logits: Numbers, top_k: int, renormalize: bool, valid: Numbers, **wrong: Any) -> Any:
    """The router with wrong parts: share(logits) -> p, order(p) -> ids of all experts."""
    p = wrong.get("share", _softmax)(logits)
    order = wrong.get("order", lambda p: np.argsort(-p, -1, kind="stable"))(p)
    ids = order[:, wrong.get("first", 0) :][:, :top_k].astype(np.int32)
    weights = np.take_along_axis(p, ids, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    ids = np.where(valid[:, None], ids, logits.shape[-1]).astype(np.int32)
    return ids, np.where(valid[:, None], weights, 0).astype(logits.dtype)


def _softmax(x: Numbers) -> Numbers:
    p = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True))


def _router(**wrong: Any) -> Open:
    return ops(moe_route=lambda base, *args: _route(*args, **wrong))


def _padding_to_zero(base: Method, logits: Any, top_k: int, renormalize: bool, valid: Any) -> Any:
    ids, weights = base(logits, top_k, renormalize, valid)
    return np.where(valid[:, None], ids, 0).astype(np.int32), weights


def _padding_routed(base: Method, logits: Any, top_k: int, renormalize: bool, valid: Any) -> Any:
    return base(logits, top_k, renormalize, np.ones_like(valid))


def _one_too_far(base: Method, logits: Any, top_k: int, renormalize: bool, valid: Any) -> Any:
    ids, weights = base(logits, min(top_k + 1, logits.shape[-1]), renormalize, valid)
    keep = [*range(top_k - 1), ids.shape[1] - 1]
    return ids[:, keep], weights[:, keep]


def _ordered_by_id(base: Method, logits: Any, top_k: int, renormalize: bool, valid: Any) -> Any:
    """Ids sorted for the kernel; the weights stay in their old order."""
    ids, weights = base(logits, top_k, renormalize, valid)
    return np.sort(ids, -1), weights


def _no_maximum(x: Numbers) -> Numbers:
    p = np.exp(x)
    return np.asarray(p / p.sum(-1, keepdims=True))


def _weights_bfloat16(base: Method, *args: Any) -> Any:
    ids, weights = base(*args)
    return ids, weights.bfloat16().float()


def _always(base: Method, logits: Any, top_k: int, renormalize: bool, valid: Any) -> Any:
    return base(logits, top_k, True, valid)


def _never(base: Method, logits: Any, top_k: int, renormalize: bool, valid: Any) -> Any:
    return base(logits, top_k, False, valid)


# ---------------------------------------------------------------- the experts
def _experts(
    x: Numbers, ids: Numbers, weights: Numbers, gate_up: Param, down: Param, **wrong: Any
) -> Numbers:
    """A loop over experts with wrong parts: tokens_of, weight_of, act, join."""
    w1, w2 = gate_up["weight"], down["weight"]
    out = np.zeros((x.shape[0], w2.shape[1]), x.dtype)
    size = w1.shape[1] // 2
    for expert in range(wrong.get("count", w1.shape[0])):
        if expert >= w1.shape[0]:
            break
        token, place = np.nonzero(ids == expert)
        token, place = wrong.get("tokens_of", lambda t, p, e: (t, p))(token, place, ids)
        if not len(token):
            continue
        share = weights[token, place][:, None] ** wrong.get("power", 1)
        inner = x[token] * share if wrong.get("inside") else x[token]
        h = inner @ w1[expert].T
        h = wrong.get("act", lambda h, size: _silu(h[:, :size]) * h[:, size:])(h, size)
        y = h @ w2[expert].T
        y = y if wrong.get("inside") else y * share
        if wrong.get("join") == "last":
            out[token] = y
        elif wrong.get("join") == "half":
            out[token] = (out[token] + y).astype(np.float16)
        else:
            np.add.at(out, token, y)
    return out


def _silu(x: Numbers) -> Numbers:
    return np.asarray(x / (1 + np.exp(-x)))


def _mixed(**wrong: Any) -> Open:
    return ops(moe_experts=lambda base, *args: _experts(*args, **wrong))


def _capacity(token: Numbers, place: Numbers, ids: Numbers) -> tuple[Numbers, Numbers]:
    most = max(4, int(1.5 * ids.size / 8))
    return token[:most], place[:most]


def _odd_one_lost(token: Numbers, place: Numbers, ids: Numbers) -> tuple[Numbers, Numbers]:
    """Tiles of 16 tokens; the tail of a second one is not computed."""
    count = len(token) if len(token) < 16 else len(token) // 16 * 16
    return token[:count], place[:count]


def _used_only(base: Method, x: Any, ids: Any, weights: Any, gate_up: Param, down: Param) -> Any:
    """Counts the experts that have tokens, and indexes the weights with that count."""
    num_experts = gate_up["weight"].shape[0]
    used = np.unique(ids[ids < num_experts])
    place = np.full(num_experts + 1, num_experts, np.int32)
    place[used] = np.arange(len(used))
    return base(x, place[np.minimum(ids, num_experts)], weights, gate_up, down)


def _padding_clipped(base: Method, x: Any, ids: Any, weights: Any, gate: Param, down: Param) -> Any:
    """The expert that does not exist is the last one, with weight 0: NaN of padding stays NaN."""
    return base(x, np.minimum(ids, gate["weight"].shape[0] - 1), weights, gate, down)


def _last_place_lost(base: Method, x: Any, ids: Any, weights: Any, gate: Param, down: Param) -> Any:
    if ids.shape[1] <= 2:
        return base(x, ids, weights, gate, down)
    return base(x, ids[:, :-1], weights[:, :-1], gate, down)


def _shares_of_first_token(base: Method, x: Any, ids: Any, weights: Any, *rest: Any) -> Any:
    """The weights of the 64-token tile's first token serve its last one."""
    weights = weights.copy()
    weights[63::64] = weights[0 : len(weights[63::64]) * 64 : 64]
    return base(x, ids, weights, *rest)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "moe", says, open_wrong, worst)


def _by_highest_id(p: Numbers) -> Numbers:
    return np.asarray(p.shape[-1] - 1 - np.argsort(-p[:, ::-1], -1, kind="stable"))


FAULTS = (
    _wrong(
        "moe_padding_to_expert_zero",
        "padding goes to expert 0, with weight 0",
        ops(moe_route=_padding_to_zero),
    ),
    _wrong("moe_padding_routed", "padding is routed like a token", ops(moe_route=_padding_routed)),
    _wrong("moe_always_renormalised", "weights always sum to 1", ops(moe_route=_always)),
    _wrong("moe_never_renormalised", "renormalize is ignored", ops(moe_route=_never)),
    _wrong(
        "moe_sigmoid",
        "the router is a sigmoid",
        _router(share=lambda x: 1 / (1 + np.exp(-x))),
    ),
    _wrong("moe_no_maximum", "the router's softmax overflows", _router(share=_no_maximum)),
    _wrong(
        "moe_ties_high", "ties between experts go to the highest id", _router(order=_by_highest_id)
    ),
    _wrong(
        "moe_one_too_far", "the last chosen expert is the next one", ops(moe_route=_one_too_far)
    ),
    _wrong("moe_first_skipped", "the k experts after the best are chosen", _router(first=1)),
    _wrong("moe_ids_sorted", "ids are sorted, weights are not", ops(moe_route=_ordered_by_id)),
    _wrong(
        "moe_logits_bfloat16",
        "the router reads its logits as bfloat16",
        ops(moe_route=lambda base, logits, *rest: base(as_bfloat16(logits), *rest)),
    ),
    _wrong(
        "moe_weights_bfloat16",
        "the router's weights pass through bfloat16",
        ops("torch", moe_route=_weights_bfloat16),
    ),
    _wrong(
        "moe_ids_wide",
        "the router's ids are 64-bit integers",
        ops("torch", moe_route=lambda base, *args: (base(*args)[0].long(), base(*args)[1])),
    ),
    _wrong("moe_unweighted", "experts are added without weights", _mixed(power=0)),
    _wrong("moe_weighted_twice", "weights are applied twice", _mixed(power=2)),
    _wrong("moe_input_weighted", "weights scale the experts' input", _mixed(inside=True)),
    _wrong(
        "moe_last_wins", "the last expert of a token overwrites the others", _mixed(join="last")
    ),
    _wrong("moe_half_sums", "experts are added in 16 bits", _mixed(join="half")),
    _wrong("moe_eight_experts", "experts from the ninth on are not computed", _mixed(count=8)),
    _wrong(
        "moe_capacity",
        "an expert drops tokens beyond one and a half times its fair share of eight",
        _mixed(tokens_of=_capacity),
    ),
    _wrong(
        "moe_tile_tail",
        "an expert's tokens past a multiple of 16 are lost",
        _mixed(tokens_of=_odd_one_lost),
        worst=True,
    ),
    _wrong(
        "moe_halves_swapped",
        "experts gate with the second half",
        _mixed(act=lambda h, size: h[:, :size] * _silu(h[:, size:])),
    ),
    _wrong(
        "moe_gelu",
        "experts use gelu",
        _mixed(act=lambda h, size: reference.activation(h[:, :size], "gelu_tanh") * h[:, size:]),
    ),
    _wrong(
        "moe_used_only",
        "an expert without tokens shifts those behind it",
        ops(moe_experts=_used_only),
    ),
    _wrong(
        "moe_padding_clipped", "padding computes with weight 0", ops(moe_experts=_padding_clipped)
    ),
    _wrong(
        "moe_two_experts_most",
        "the last of more than two experts of a token is dropped",
        ops(moe_experts=_last_place_lost),
    ),
    _wrong(
        "moe_shares_of_tile",
        "the 64th token of a tile gets the weights of its first",
        ops(moe_experts=_shares_of_first_token),
    ),
)

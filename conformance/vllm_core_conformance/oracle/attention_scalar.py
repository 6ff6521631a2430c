"""The same as `attention`, number by number: loops over Python floats, for the suite's own tests.

Written apart from the vectorised oracle and from the same page: where they disagree, one is wrong.

Knows: the contract, a scene. Does not know: the other oracle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core_conformance.steps import Scene

Numbers = NDArray[Any]


def attention(scene: Scene) -> tuple[Numbers, Numbers]:
    """out [t, Hq, Dv], lse [t, Hq] (without the sink) of the real tokens."""
    shape = scene.shape
    dim_v = shape.dim_v or shape.dim
    out = np.zeros((scene.num_tokens, shape.num_q_heads, dim_v))
    lse = np.zeros((scene.num_tokens, shape.num_q_heads))
    for t in range(scene.num_tokens):
        for h in range(shape.num_q_heads):
            scores, values = _seen(scene, t, h)
            total = math.fsum(math.exp(s - max(scores)) for s in scores)
            lse[t, h] = math.log(total) + max(scores)
            whole = lse[t, h]
            if scene.sinks is not None:
                sink = float(scene.sinks[h])
                top = max(sink, whole)
                whole = top + math.log(math.exp(sink - top) + math.exp(lse[t, h] - top))
            weights = [math.exp(s - whole) for s in scores]
            for d in range(dim_v):
                out[t, h, d] = math.fsum(
                    w * float(value[d]) for w, value in zip(weights, values, strict=True)
                )
    return out, lse


def noise_16(scene: Scene) -> Numbers:
    """[t, Hq, Dv]: |o| + sqrt(sum p^2 v^2), which is the noise where u is much larger than u32."""
    shape = scene.shape
    out, lse = attention(scene)
    noise = np.abs(out)
    for t in range(scene.num_tokens):
        for h in range(shape.num_q_heads):
            scores, values = _seen(scene, t, h)
            extra = 0.0 if scene.sinks is None else math.exp(float(scene.sinks[h]) - lse[t, h])
            weights = [math.exp(s - lse[t, h]) / (1 + extra) for s in scores]
            for d in range(out.shape[2]):
                squares = ((w * float(x[d])) ** 2 for w, x in zip(weights, values, strict=True))
                noise[t, h, d] += math.sqrt(math.fsum(squares))
    return noise


def cache_after(scene: Scene) -> tuple[Numbers, Numbers]:
    """The cache after the step, token by token."""
    keys, values = scene.keys.copy(), scene.values.copy()
    for t in range(scene.num_tokens):
        i, position = _owner(scene, t)
        block, slot = divmod(position, scene.shape.block_tokens)
        block = int(scene.tables[i, block])
        for h in range(scene.shape.num_kv_heads):
            keys[block, scene.shape.layer, slot, h] = scene.k[t, h]
            values[block, scene.shape.layer, slot, h] = scene.v[t, h]
    return keys, values


def _owner(scene: Scene, t: int) -> tuple[int, int]:
    """Row and position of token t of the step."""
    begin = 0
    for i, count in enumerate(scene.query):
        if t < begin + int(count):
            seq_len = int(scene.cached[i]) + int(count)
            return i, seq_len - int(count) + (t - begin)
        begin += int(count)
    raise IndexError(t)


def _seen(scene: Scene, t: int, h: int) -> tuple[list[float], list[Numbers]]:
    """Scores and values of every token that query t of head h sees."""
    shape = scene.shape
    i, position = _owner(scene, t)
    seq_len, cached = int(scene.cached[i] + scene.query[i]), int(scene.cached[i])
    begin = int(scene.query[:i].sum())
    kv_head = h // (shape.num_q_heads // shape.num_kv_heads)
    scores, values = [], []
    for j in range(seq_len):
        if shape.causal and j > position:
            continue
        if shape.window is not None and j <= position - shape.window:
            continue
        if j >= cached:
            key, value = scene.k[begin + j - cached], scene.v[begin + j - cached]
        else:
            block = int(scene.tables[i, j // shape.block_tokens])
            where = (block, shape.layer, j % shape.block_tokens)
            key, value = scene.keys[where], scene.values[where]
        products = (float(a) * float(b) for a, b in zip(scene.q[t, h], key[kv_head], strict=True))
        score = shape.scale * math.fsum(products)
        if shape.softcap is not None:
            score = shape.softcap * math.tanh(score / shape.softcap)
        scores.append(score)
        values.append(value[kv_head])
    return scores, values

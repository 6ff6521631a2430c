"""The one decoder: every family is a walk through its spec.

Pure functions over ops: the same text runs on every binding, eagerly or traced.

Knows: the order of ops in a layer. Does not know: families, configs, weights' origin, frameworks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from vllm_core.backend import KV, AttentionPlan, Device
from vllm_core.models.spec import FFNSpec, LayerSpec, ModelSpec
from vllm_core.ops import Array, Ops, Param, StepInput, StepView

Params = dict[str, Any]
"""Nested dicts of Param; "layers" in the form that `Ops.layers` walks."""

RopeTable = tuple[Array, Array]


def forward(
    device: Device,
    spec: ModelSpec,
    params: Params,
    kv: KV,
    step: StepInput,
    view: StepView,
    plans: tuple[AttentionPlan, ...],
    keep_hidden: bool = False,
) -> tuple[Array, Array | None, KV]:
    """-> hidden [R, H] of the rows in step.logit_rows, hidden [T, H] of all tokens if kept, kv.

    Both after the final norm. plans: one per spec.attention_specs. Consumes kv.
    """
    ops = device.ops
    x = ops.embed(view.token_ids, params["embed"])
    if spec.embedding_scale != 1.0:
        x = x * spec.embedding_scale
    if spec.position_offset is not None:
        x = x + ops.embed(view.positions + spec.position_offset, params["positions"])
    tables = tuple(
        ops.rope_table(view.positions, np.array(rope.inverse_frequency, np.float32), rope.scale)
        for rope in spec.ropes
    )

    shared = (tables, plans, view.valid)
    x, kv = ops.layers(partial(_layer, device), x, kv, params["layers"], spec.layers, shared)
    rows = step.logit_rows[:, 0]
    if not keep_hidden:
        return _norm(ops, spec, x[rows], params["norm"]), None, kv
    hidden = _norm(ops, spec, x, params["norm"])
    return hidden[rows], hidden, kv


def logits(device: Device, spec: ModelSpec, params: Params, hidden: Array) -> Array:
    """[R, H] -> [R, V], float32 or better."""
    out = device.ops.logits(hidden, params["head"])
    if spec.logit_scale != 1.0:
        out = out * spec.logit_scale
    if spec.logit_softcap is not None:
        out = device.ops.xp.tanh(out / spec.logit_softcap) * spec.logit_softcap
    return out


def _layer(
    device: Device,
    x: Array,
    kv: KV,
    p: Params,
    spec: LayerSpec,
    layer: Array | int,
    tables: tuple[RopeTable, ...],
    plans: tuple[AttentionPlan, ...],
    valid: Array,
) -> tuple[Array, KV]:
    ops = device.ops
    table = None if spec.rope is None else tables[spec.rope]
    plan = plans[spec.attention_index]
    h = _norm(ops, spec, x, p["input_norm"])
    h, kv = _attention(device, spec, p, h, kv, layer, table, plan)
    if spec.is_sandwich:
        h = _norm(ops, spec, h, p["post_attention_norm"])
    if spec.norm == "rms":
        h, x = ops.add_rms_norm(h, x, p["ffn_norm"], spec.eps)
    else:
        x = x + h
        h = _norm(ops, spec, x, p["ffn_norm"])
    h = _ffn(ops, spec, p, h, valid)
    if spec.is_sandwich:
        h = _norm(ops, spec, h, p["post_ffn_norm"])
    return x + h, kv


def _norm(ops: Ops, spec: LayerSpec | ModelSpec, x: Array, param: Param) -> Array:
    if spec.norm == "rms":
        return ops.rms_norm(x, param, spec.eps)
    return ops.layer_norm(x, param, spec.eps)


def _attention(
    device: Device,
    spec: LayerSpec,
    p: Params,
    x: Array,
    kv: KV,
    layer: Array | int,
    table: RopeTable | None,
    plan: AttentionPlan,
) -> tuple[Array, KV]:
    ops, a = device.ops, spec.attention
    num_tokens = x.shape[0]
    q_size, k_size = a.num_q_heads * a.dim_qk, a.num_kv_heads * a.dim_qk
    qkv = ops.linear(x, p["qkv"])
    q = qkv[:, :q_size].reshape(num_tokens, a.num_q_heads, a.dim_qk)
    k = qkv[:, q_size : q_size + k_size].reshape(num_tokens, a.num_kv_heads, a.dim_qk)
    v = qkv[:, q_size + k_size :].reshape(num_tokens, a.num_kv_heads, a.dim_v)
    if spec.qk_norm:
        q, k = ops.rms_norm(q, p["q_norm"], spec.eps), ops.rms_norm(k, p["k_norm"], spec.eps)
    if table is not None:
        q, k = ops.rope(q, *table), ops.rope(k, *table)
    out, _, kv = device.attention.attend(kv, layer, q, k, v, plan)
    return ops.linear(out.reshape(num_tokens, a.num_q_heads * a.dim_v), p["output"]), kv


def _ffn(ops: Ops, spec: LayerSpec, p: Params, x: Array, valid: Array) -> Array:
    ffn = spec.ffn
    if not isinstance(ffn, FFNSpec):
        router = ops.linear(x, p["router"])
        ids, weights = ops.moe_route(router, ffn.top_k, ffn.renormalize, valid)
        return ops.moe_experts(x, ids, weights, p["gate_up"], p["down"])
    if not ffn.gated:
        return ops.linear(ops.activation(ops.linear(x, p["up"]), ffn.activation), p["down"])
    return ops.linear(ops.gated_linear(x, p["gate_up"], ffn.activation), p["down"])

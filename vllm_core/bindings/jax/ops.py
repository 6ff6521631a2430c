"""The op table on jax.numpy: values, 32-bit integers, float32 accumulation.

Knows: jax.numpy, lax. Does not know: buckets, attention, steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vllm_core.bindings.jax.layers import stack, walk
from vllm_core.errors import InvalidArgument
from vllm_core.ops import Array, HostArray, Ops, Param
from vllm_core.ops.interface import LayerBody

_MOE_TILE = 64
"""Most tokens that go through one expert's weights at once."""


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Contracts one axis of each in float32; float32 inputs never pass through tf32 or bfloat16."""
    axes = (((a_axis % a.ndim,), (b_axis % b.ndim,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


class JaxOps(Ops):
    """Portable ops. New arrays are made on `device`, uncommitted: no call compiles twice."""

    name = "jax"
    xp = jnp

    def __init__(self, device: jax.Device) -> None:
        self._device = device

    def asarray(self, host: HostArray) -> Array:
        with jax.default_device(self._device):
            # jnp.array(copy=True) would take its copy later, from memory that the caller has back
            return jax.device_put(np.array(host))

    def host(self, x: Array) -> HostArray:
        return np.array(x)  # np.asarray would hand out the device's own memory on a CPU

    def cast(self, x: Array, dtype: str) -> Array:
        return x.astype(jnp.dtype(dtype))

    def arange(self, count: int) -> Array:
        with jax.default_device(self._device):
            return jnp.arange(count, dtype=jnp.int32)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Array:
        with jax.default_device(self._device):
            return jnp.full(shape, value, jnp.dtype(dtype))

    def put(self, x: Array, index: tuple[Array, ...], value: Array | int | float) -> Array:
        return x.at[index].set(jnp.asarray(value).astype(x.dtype), mode="drop")

    def accumulate(self, x: Array, index: tuple[Array, ...], value: Array) -> Array:
        return x.at[index].add(jnp.asarray(value).astype(x.dtype), mode="drop")

    def amax(self, x: Array) -> Array:
        return jnp.max(x, -1)

    def top(self, x: Array, count: int) -> tuple[Array, Array]:
        values, ids = lax.top_k(jnp.where(x == 0, 0, x), count)  # -0.0 ties with 0.0
        return values, ids

    def bits(self, x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.int32)

    def floats(self, x: Array) -> Array:
        return lax.bitcast_convert_type(x, jnp.float32)

    def words(self, x: Array) -> Array:
        return x.astype(jnp.uint32)

    def word(self, value: int) -> Array:
        return np.uint32(value)  # a constant of the program, not a buffer on some device

    def stack_layers(self, layers: Sequence[Any], specs: Sequence[Any]) -> Any:
        return stack(layers, specs)

    def layers(
        self,
        body: LayerBody,
        x: Array,
        kv: Any,
        params: Any,
        specs: Sequence[Any],
        shared: tuple[Any, ...] = (),
    ) -> tuple[Array, Any]:
        def whole(*args: Any) -> tuple[Array, Any]:
            return body(*args, *shared)

        return walk(whole, x, kv, params, specs)

    def repeat(self, count: int, body: Callable[[Any], Any], carry: Any) -> Any:
        return lax.fori_loop(0, count, lambda _, values: body(values), carry)

    def embed(self, ids: Array, param: Param) -> Array:
        return param["weight"].at[ids].get(mode="clip")

    def linear(self, x: Array, param: Param) -> Array:
        return self.logits(x, param).astype(x.dtype)

    def logits(self, x: Array, param: Param) -> Array:
        out, bias = dot(x, param["weight"], -1, -1), param.get("bias")
        return out if bias is None else out + bias.astype(jnp.float32)

    def rms_norm(self, x: Array, param: Param, eps: float) -> Array:
        wide = x.astype(jnp.float32)
        wide = wide / jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
        return (wide * param["weight"].astype(jnp.float32)).astype(x.dtype)

    def add_rms_norm(
        self, x: Array, residual: Array, param: Param, eps: float
    ) -> tuple[Array, Array]:
        total = x + residual
        return self.rms_norm(total, param, eps), total

    def layer_norm(self, x: Array, param: Param, eps: float) -> Array:
        wide, bias = x.astype(jnp.float32), param.get("bias")
        centred = wide - jnp.mean(wide, -1, keepdims=True)
        out = centred / jnp.sqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
        out = out * param["weight"].astype(jnp.float32)
        return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)

    def rope_table(
        self, positions: Array, inverse_frequency: HostArray, scale: float
    ) -> tuple[Array, Array]:
        frequency = np.asarray(inverse_frequency, np.float32)
        angle = positions.astype(jnp.float32)[:, None] * frequency
        return jnp.cos(angle) * np.float32(scale), jnp.sin(angle) * np.float32(scale)

    def rope(self, x: Array, cos: Array, sin: Array) -> Array:
        half = cos.shape[-1]
        c, s, wide = cos[:, None], sin[:, None], x.astype(jnp.float32)
        a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
        return jnp.concatenate((a * c - b * s, b * c + a * s, rest), -1).astype(x.dtype)

    def silu_and_mul(self, x: Array) -> Array:
        return _gate(x, "silu")

    def gelu_and_mul(self, x: Array) -> Array:
        return _gate(x, "gelu_tanh")

    def activation(self, x: Array, kind: str) -> Array:
        return _activate(x.astype(jnp.float32), kind).astype(x.dtype)

    def moe_route(
        self, logits: Array, top_k: int, renormalize: bool, valid: Array
    ) -> tuple[Array, Array]:
        share = jax.nn.softmax(logits.astype(jnp.float32), -1)
        weights, ids = lax.top_k(share, top_k)
        if renormalize:
            weights = weights / jnp.sum(weights, -1, keepdims=True)
        ids = jnp.where(valid[:, None], ids, logits.shape[-1])
        return ids, jnp.where(valid[:, None], weights, 0.0)

    def moe_experts(
        self, x: Array, ids: Array, weights: Array, gate_up: Param, down: Param
    ) -> Array:
        """Tokens sorted by expert, in tiles of one expert each; loops over the tiles in use."""
        up_weight, down_weight = gate_up["weight"], down["weight"]
        num_experts, count = up_weight.shape[0], ids.size
        tile = _tile_size(count, num_experts)
        flat = ids.reshape(-1)
        order = jnp.argsort(flat, stable=True)  # [T·k] places of the tokens, expert by expert
        expert = jnp.arange(num_experts, dtype=jnp.int32)
        first = jnp.searchsorted(flat[order], expert).astype(jnp.int32)
        after = jnp.searchsorted(flat[order], expert, side="right").astype(jnp.int32)
        last_tile = jnp.cumsum((after - first + tile - 1) // tile)  # inclusive, per expert

        def one_tile(i: Array, out: Array) -> Array:
            e = jnp.searchsorted(last_tile, i, side="right")
            before = last_tile[e] - (after[e] - first[e] + tile - 1) // tile
            place = first[e] + (i - before) * tile + jnp.arange(tile)
            source = order.at[place].get(mode="clip")
            h = dot(x[source // ids.shape[1]], up_weight[e], -1, -1)
            y = dot(_gate(h, "silu"), down_weight[e].astype(jnp.float32), -1, -1)
            return out.at[jnp.where(place < after[e], source, count)].set(y, mode="drop")

        out = jnp.zeros((count, x.shape[-1]), jnp.float32)
        out = lax.fori_loop(0, last_tile[-1], one_tile, out).reshape(*ids.shape, -1)
        return jnp.sum(out * weights.astype(jnp.float32)[..., None], 1).astype(x.dtype)


def _tile_size(count: int, num_experts: int) -> int:
    """The power of two at or above the mean number of tokens per expert."""
    mean = -(-count // num_experts)
    return min(_MOE_TILE, 1 << (mean - 1).bit_length())


def _gate(x: Array, kind: str) -> Array:
    half, wide = x.shape[-1] // 2, x.astype(jnp.float32)
    return (_activate(wide[..., :half], kind) * wide[..., half:]).astype(x.dtype)


def _activate(x: Array, kind: str) -> Array:
    if kind == "relu":
        return jax.nn.relu(x)
    if kind == "silu":
        return jax.nn.silu(x)
    if kind in ("gelu", "gelu_tanh"):
        return jax.nn.gelu(x, approximate=kind == "gelu_tanh")
    raise InvalidArgument(f"unknown activation {kind!r}; known are relu, gelu, gelu_tanh, silu")

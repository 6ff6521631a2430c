"""Every op in plain torch, for any device that torch drives.

Where a host may look at device values for free (the CPU), two ops take the shorter way: experts
get their own tokens, and filters look at candidates first.

Knows: torch. Does not know: vendors, models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from vllm_core.bindings.torch import packing
from vllm_core.bindings.torch.convert import dtype_of, from_host, to_host
from vllm_core.errors import InvalidArgument
from vllm_core.ops import HostArray, Ops, Param
from vllm_core.ops.interface import LayerBody
from vllm_core.ops.sampling import LOW, Mass

Tensor = torch.Tensor

CANDIDATES = 1024
"""How many of the largest logits a filter looks at before it sorts them all."""
LOGIT_CHUNK = 1 << 24
"""Weights of 16 bits that are widened at a time, in elements."""


class TorchOps(Ops):
    """The op table on one device."""

    name = "torch"
    xp = torch

    def __init__(self, device: torch.device, synchronize: Callable[[], None] | None = None) -> None:
        """synchronize: waits until the device has done what was submitted."""
        self.device = device
        self.host_reads_are_free = device.type == "cpu"
        self._synchronize = synchronize or (lambda: None)
        self._tables: deque[tuple[Tensor, Tensor, Tensor, Tensor]] = deque(maxlen=4)

    # ---- array vocabulary
    def asarray(self, host: HostArray) -> Tensor:
        return from_host(host).to(self.device, copy=True)

    def host(self, x: Tensor) -> HostArray:
        self._synchronize()
        return to_host(x.detach().to("cpu", copy=True))

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(dtype_of(dtype))

    def arange(self, count: int) -> Tensor:
        return torch.arange(count, dtype=torch.int32, device=self.device)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Tensor:
        return torch.full(shape, value, dtype=dtype_of(dtype), device=self.device)

    def put(self, x: Tensor, index: tuple[Tensor, ...], value: Tensor | int | float) -> Tensor:
        x[index] = value
        return x

    def accumulate(self, x: Tensor, index: tuple[Tensor, ...], value: Tensor) -> Tensor:
        return x.index_put_(index, value, accumulate=True)

    def amax(self, x: Tensor) -> Tensor:
        return x.amax(-1)

    def top(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float32:
            values, ids = torch.sort(x, dim=-1, descending=True, stable=True)
            return values[..., :count], ids[..., :count].int()
        ids = _ids(torch.topk(_keys(x), count).values, x.shape[-1])
        return x.gather(-1, ids), ids.int()

    def bits(self, x: Tensor) -> Tensor:
        return x.contiguous().view(torch.int32)

    def floats(self, x: Tensor) -> Tensor:
        return x.contiguous().view(torch.float32)

    def words(self, x: Tensor) -> Tensor:
        return x.long() & 0xFFFFFFFF

    def word(self, value: int) -> Tensor | int:
        return value

    def stack_layers(self, layers: Sequence[Any], specs: Sequence[Any]) -> Any:
        return list(layers)

    def layers(
        self,
        body: LayerBody,
        x: Tensor,
        kv: Any,
        params: Any,
        specs: Sequence[Any],
        shared: tuple[Any, ...] = (),
    ) -> tuple[Tensor, Any]:
        for layer, spec in zip(params, specs, strict=True):
            x, kv = body(x, kv, layer, spec, spec.kv_layer, *shared)
        return x, kv

    # ---- fused ops of models
    def embed(self, ids: Tensor, param: Param) -> Tensor:
        return F.embedding(ids, param["weight"])

    def linear(self, x: Tensor, param: Param) -> Tensor:
        arrays = param.arrays
        packed = arrays.get("packed")
        if packed is not None:
            return packing.packed_linear(x, packed, arrays.get("bias"))
        return F.linear(x, arrays["weight"], arrays.get("bias"))

    def logits(self, x: Tensor, param: Param) -> Tensor:
        arrays = param.arrays
        if "packed" not in arrays:
            # a tied embedding: its use as a head is what makes the blocked copy worth its memory
            arrays["packed"] = packing.pack(arrays["weight"])
        if arrays["packed"] is not None:
            return packing.packed_logits(x, arrays["packed"], arrays.get("bias"))
        weight, bias = arrays["weight"], arrays.get("bias")
        if x.dtype in (torch.float32, torch.float64):
            return F.linear(x, weight, bias)
        rows = max(1, LOGIT_CHUNK // weight.shape[1])
        wide = x.float()
        parts = [F.linear(wide, chunk.float()) for chunk in weight.split(rows)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if bias is None else out + bias.float()

    def rms_norm(self, x: Tensor, param: Param, eps: float) -> Tensor:
        weight = param["weight"]
        if x.dtype == weight.dtype:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        return F.rms_norm(x.to(weight.dtype), x.shape[-1:], weight, eps).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, param: Param, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, param, eps), total

    def layer_norm(self, x: Tensor, param: Param, eps: float) -> Tensor:
        weight = param["weight"]
        wide = x.to(weight.dtype)
        return F.layer_norm(wide, x.shape[-1:], weight, param.get("bias"), eps).to(x.dtype)

    def rope_table(
        self, positions: Tensor, inverse_frequency: HostArray, scale: float
    ) -> tuple[Tensor, Tensor]:
        frequency = from_host(inverse_frequency).to(self.device, torch.float32)
        angle = positions.float()[:, None] * frequency
        cos, sin = angle.cos() * scale, angle.sin() * scale
        both = torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
        self._tables.append((cos, sin, *both))
        return cos, sin

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = 2 * cos.shape[-1]
        c, s = self._doubled(cos, sin)
        y = x[..., :size]
        out = torch.addcmul(y * c, y.roll(size // 2, -1), s).to(x.dtype)
        return out if size == x.shape[-1] else torch.cat((out, x[..., size:]), -1)

    def _doubled(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, cos) and (-sin, sin): made with the table, as every layer asks for them."""
        for known, known_sin, c, s in self._tables:
            if known is cos and known_sin is sin:
                return c, s
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def silu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        if x.dtype in (torch.float32, torch.float64):
            return F.silu(gate).mul_(up)
        return (F.silu(gate.float()) * up).to(x.dtype)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        if x.dtype in (torch.float32, torch.float64):
            return F.gelu(gate, approximate="tanh").mul_(up)
        return (F.gelu(gate.float(), approximate="tanh") * up).to(x.dtype)

    def activation(self, x: Tensor, kind: str) -> Tensor:
        if kind == "relu":
            return F.relu(x)
        if kind == "silu":
            return F.silu(x)
        if kind in ("gelu", "gelu_tanh"):
            return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
        raise InvalidArgument(
            f"unknown activation {kind!r}; known are relu, gelu, gelu_tanh and silu"
        )

    # ---- experts
    def moe_route(
        self, logits: Tensor, top_k: int, renormalize: bool, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        p = torch.softmax(wide, -1)
        weights, ids = torch.sort(p, dim=-1, descending=True, stable=True)
        weights, ids = weights[:, :top_k], ids[:, :top_k].int()
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        valid = valid[:, None]
        return torch.where(valid, ids, logits.shape[-1]), torch.where(valid, weights, 0.0)

    def moe_experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Param, down: Param
    ) -> Tensor:
        w1, w2 = gate_up["weight"], down["weight"]
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        out = torch.zeros(x.shape[0], w2.shape[1], dtype=wide, device=x.device)

        def expert(index: int, tokens: Tensor) -> Tensor:
            hidden = self.silu_and_mul(F.linear(tokens, w1[index]))
            return F.linear(hidden, w2[index]).to(wide)

        if self.host_reads_are_free:
            flat = ids.reshape(-1).long()
            order = torch.argsort(flat, stable=True)
            counts = torch.bincount(flat, minlength=w1.shape[0] + 1).tolist()
            places = torch.split_with_sizes(order, counts)
            for index, place in enumerate(places[: w1.shape[0]]):
                if len(place):
                    token = place // ids.shape[1]
                    share = weights.reshape(-1)[place, None].to(wide)
                    out.index_add_(0, token, expert(index, x[token]).mul_(share))
            return out.to(x.dtype)

        share = torch.zeros(x.shape[0], w1.shape[0] + 1, dtype=wide, device=x.device)
        share.scatter_add_(1, ids.long(), weights.to(wide))
        for index in range(w1.shape[0]):  # every token meets every expert: shapes stay static
            own = share[:, index, None]
            out += torch.where(own != 0, expert(index, x) * own, 0.0)
        return out.to(x.dtype)

    # ---- sampling
    def keep_top(self, z: Tensor, w: Tensor, unit: Tensor, need: Mass) -> Tensor:
        """As sampling.keep_top, by sorting; `w` is 0 wherever `unit` is 0, as in all its uses."""
        limit = (need[0] << LOW) + need[1]
        keys = _keys(z)
        if not self.host_reads_are_free:
            return _keep_prefix(torch.sort(keys, -1, descending=True).values, w, unit, limit)[0]
        rows = torch.nonzero(limit < unit.sum(-1) - 1).squeeze(-1)  # the others keep everything
        if not len(rows):
            return w
        result, some = w.clone(), (w[rows], unit[rows], limit[rows])
        top = torch.topk(keys[rows], min(CANDIDATES, z.shape[-1])).values
        kept, is_exact = _keep_prefix(top, *some)
        result[rows] = kept
        rest = torch.nonzero(~is_exact).squeeze(-1)
        if len(rest):
            every = torch.sort(keys[rows[rest]], -1, descending=True).values
            result[rows[rest]] = _keep_prefix(every, *(x[rest] for x in some))[0]
        return result


def _keys(x: Tensor) -> Tensor:
    """Distinct integers in the order of (value descending, id ascending) when sorted descending."""
    bits = (x + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = x.shape[-1] - 1
    return (order.long() << 32) + torch.arange(last, -1, -1, device=x.device)


def _ids(keys: Tensor, vocab: int) -> Tensor:
    return (vocab - 1) - (keys & 0xFFFFFFFF)


def _keep_prefix(keys: Tensor, w: Tensor, unit: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps what stands at most `limit` behind the first; whether the keys reached that far."""
    ids = _ids(keys, unit.shape[-1])
    mass = unit.gather(-1, ids)
    prefix = mass.cumsum(-1)
    is_kept = prefix - mass <= limit[:, None]
    result = torch.zeros_like(w)
    result.scatter_(-1, ids, torch.where(is_kept, w.gather(-1, ids), 0))
    return result, prefix[:, -1] > limit

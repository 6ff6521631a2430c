"""The op table with our own kernels, where they take the dtype; torch's ops for the rest.

Knows: which op goes where. Does not know: instruction sets, models.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof
from typing import Any

import torch

from vllm_core.bindings.torch.ops import TorchOps
from vllm_core.errors import InvalidArgument
from vllm_core.ops import NUM_COLUMNS, Features, Logprobs, Param
from vllm_core.ops.interface import LayerBody
from vllm_core.ops.sampling import check_vocab
from vllm_core_cpu import native
from vllm_core_cpu.memory import Empty
from vllm_core_cpu.recorded import MAX_TOKENS, WalkRecorder
from vllm_core_cpu.weights import DTYPES, EPILOGUES, Packed, unpack

Tensor = torch.Tensor


class CpuOps(TorchOps):
    """Of one runtime: the records that calls fill are its own, and programs run one at a time."""

    name = "cpu"

    def __init__(self, kernels: native.Native, empty: Empty, *more: Any) -> None:
        """empty: where outputs get their memory."""
        super().__init__(*more)
        self.kernels = kernels
        self.empty = empty
        self.walks: WalkRecorder | None = None
        self._rows = native.Rows()
        self._rows_address = addressof(self._rows)
        self._rope = native.Rope()
        self._rope_address = addressof(self._rope)

    # ---- products
    def embed(self, ids: Tensor, param: Param) -> Tensor:
        facts = param.static
        if not isinstance(facts, Packed):
            return super().embed(ids, param)
        return unpack(self.kernels, facts, ids.to(torch.int32).contiguous())

    def linear(self, x: Tensor, param: Param) -> Tensor:
        facts = param.static
        if not isinstance(facts, Packed):
            return super().linear(x, param)
        return self._product(x, facts, "plain", facts.n, facts.dtype)

    def logits(self, x: Tensor, param: Param) -> Tensor:
        facts = param.static
        if not isinstance(facts, Packed):
            return super().logits(x, param)
        return self._product(x, facts, "wide", facts.n, torch.float32)

    def gated_linear(self, x: Tensor, param: Param, kind: str) -> Tensor:
        facts = param.static
        if not isinstance(facts, Packed) or kind not in facts.gates:
            plain: Tensor = super().gated_linear(x, param, kind)
            return plain
        return self._product(x, facts, kind, facts.n // 2, facts.dtype)

    def _product(self, x: Tensor, facts: Packed, kind: str, n: int, dtype: torch.dtype) -> Tensor:
        count = x.shape[0]
        if x.dtype != facts.dtype or x.stride(-1) != 1:
            x = x.to(facts.dtype).contiguous()
        out = self.empty((count, n), dtype)
        to, width = out.data_ptr(), out.itemsize
        for piece in facts.pieces:
            self.kernels.linear(
                piece.addresses[kind], x.data_ptr(), x.stride(0), to + piece.first * width, count
            )
        return out

    def layers(
        self,
        body: LayerBody,
        x: Tensor,
        kv: Any,
        params: Any,
        specs: Sequence[Any],
        shared: tuple[Any, ...] = (),
    ) -> tuple[Tensor, Any]:
        is_small = isinstance(x, Tensor) and x.dim() == 2 and 0 < len(x) <= MAX_TOKENS
        if self.walks is None or not is_small or x.dtype not in DTYPES:
            return super().layers(body, x, kv, params, specs, shared)
        return self.walks.run(body, x, kv, params, specs, shared)

    # ---- the step
    def sample(
        self,
        logits: Tensor,
        params: Tensor,
        positions: Tensor,
        history: Tensor,
        bias: Tensor,
        features: Features,
    ) -> tuple[Tensor, Tensor]:
        if logits.numel() == 0:
            return super().sample(logits, params, positions, history, bias, features)
        rows, size = logits.shape
        check_vocab(size)
        params = _ints("params", params, rows, NUM_COLUMNS)
        positions = _ints("positions", positions, rows)
        x = logits.float().contiguous()
        x = self._adjusted(x, params, positions, history, bias, features)
        token, fault = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.int32)
        if not features.draw:
            best = torch.empty(rows)
            self.kernels.largest(x.data_ptr(), rows, size, token.data_ptr(), best.data_ptr())
            return token, (~torch.isfinite(best)).to(torch.int32)
        record = native.Sample(
            x.data_ptr(), params.data_ptr(), positions.data_ptr(), token.data_ptr(),
            fault.data_ptr(), rows, size, params.shape[1], features.filters,
        )  # fmt: skip
        self.kernels.sample(addressof(record))
        return token, fault

    def _adjusted(
        self,
        x: Tensor,
        params: Tensor,
        positions: Tensor,
        history: Tensor,
        bias: Tensor,
        features: Features,
    ) -> Tensor:
        """sampling.adjusted of float32 logits; they, params and positions are dense and fit."""
        if not (features.bias or features.penalties):
            return x
        if features.bias:
            bias = _fitting("bias", bias, None, x.shape[1]).float().contiguous()
        if features.penalties:
            history = _ints("history", history, None, history.shape[-1])
        out = self.empty(x.shape, x.dtype)
        record = native.Adjust(
            x.data_ptr(), bias.data_ptr() if features.bias else None,
            history.data_ptr() if features.penalties else None,
            params.data_ptr(), positions.data_ptr(), out.data_ptr(), *x.shape, params.shape[1],
            len(bias), *history.shape,
        )  # fmt: skip
        self.kernels.adjust(addressof(record))
        return out

    def logprobs(self, logits: Tensor, targets: Tensor, count: int) -> Logprobs:
        rows, size = logits.shape
        if logits.numel() == 0 or count > size:
            return super().logprobs(logits, targets, count)
        x, targets = logits.float().contiguous(), _ints("targets", targets, rows)
        ids = torch.empty(rows, 1 + count, dtype=torch.int32)
        values, rank = torch.empty(rows, 1 + count), torch.empty(rows, dtype=torch.int32)
        record = native.Logprobs(
            x.data_ptr(), targets.data_ptr(), ids.data_ptr(), values.data_ptr(), rank.data_ptr(),
            rows, size, count,
        )  # fmt: skip
        self.kernels.logprobs(addressof(record))
        return Logprobs(ids, values, rank)

    # ---- rows
    def _fill(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The record for a norm of a dense x; what is not set here is set by the caller."""
        out = self.empty(x.shape, x.dtype)
        size = x.shape[-1]
        rows = self._rows
        rows.x, rows.out, rows.weight = x.data_ptr(), out.data_ptr(), weight.data_ptr()
        rows.rows, rows.size, rows.x_stride, rows.out_stride = x.numel() // size, size, size, size
        rows.eps, rows.dtype = eps, DTYPES[x.dtype]
        return out

    def rms_norm(self, x: Tensor, param: Param, eps: float) -> Tensor:
        weight = param.arrays["weight"]
        if x.dtype not in DTYPES or weight.dtype != torch.float32:
            return super().rms_norm(x, param, eps)
        x = x.contiguous()
        out = self._fill(x, weight, eps)
        self._rows.residual = None
        self.kernels.rms_norm(self._rows_address)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, param: Param, eps: float
    ) -> tuple[Tensor, Tensor]:
        weight = param.arrays["weight"]
        same = x.dtype == residual.dtype and x.shape == residual.shape
        if x.dtype not in DTYPES or weight.dtype != torch.float32 or not same:
            return super().add_rms_norm(x, residual, param, eps)
        x, residual = x.contiguous(), residual.contiguous()
        out, total = self._fill(x, weight, eps), self.empty(x.shape, x.dtype)
        self._rows.residual, self._rows.total = residual.data_ptr(), total.data_ptr()
        self.kernels.rms_norm(self._rows_address)
        return out, total

    def layer_norm(self, x: Tensor, param: Param, eps: float) -> Tensor:
        weight, bias = param.arrays["weight"], param.arrays.get("bias")
        wide = all(a is None or a.dtype == torch.float32 for a in (weight, bias))
        if x.dtype not in DTYPES or not wide:
            return super().layer_norm(x, param, eps)
        x = x.contiguous()
        out = self._fill(x, weight, eps)
        self._rows.bias = None if bias is None else bias.data_ptr()
        self.kernels.layer_norm(self._rows_address)
        return out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        return self._gate(x, "silu") if x.dtype in DTYPES else super().silu_and_mul(x)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        return self._gate(x, "gelu_tanh") if x.dtype in DTYPES else super().gelu_and_mul(x)

    def _gate(self, x: Tensor, kind: str) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1] // 2
        out = self.empty((*x.shape[:-1], size), x.dtype)
        rows = self._rows
        rows.x, rows.out, rows.dtype = x.data_ptr(), out.data_ptr(), DTYPES[x.dtype]
        rows.rows, rows.size, rows.x_stride, rows.out_stride = (
            out.numel() // max(size, 1), size, 2 * size, size,
        )  # fmt: skip
        self.kernels.gate(self._rows_address, EPILOGUES[kind])
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if x.dtype not in DTYPES or cos.dtype != torch.float32 or x.stride(-1) != 1:
            return super().rope(x, cos, sin)
        tokens, heads, dim = x.shape
        if heads > 1 and x.stride(1) != dim:
            x = x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        out = self.empty((tokens, heads, dim), x.dtype)
        rope = self._rope
        rope.x, rope.cos, rope.sin = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
        rope.out, rope.tokens, rope.heads, rope.dim = out.data_ptr(), tokens, heads, dim
        rope.half, rope.x_stride, rope.dtype = cos.shape[-1], x.stride(0), DTYPES[x.dtype]
        self.kernels.rope(self._rope_address)
        return out


def _fitting(name: str, x: Tensor, *shape: int | None) -> Tensor:
    """x. InvalidArgument where it has another shape (None: any but 0): kernels get an address, and
    would read on."""
    fits = len(x.shape) == len(shape) and all(
        size > 0 if wanted is None else size == wanted
        for size, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("1 or more" if size is None else str(size) for size in shape)
        raise InvalidArgument(
            f"{name} must be [{wanted}] for these logits, not {list(x.shape)}; give arrays of the "
            "shapes of the logits' rows and vocabulary"
        )
    return x


def _ints(name: str, x: Tensor, *shape: int | None) -> Tensor:
    """As `_fitting`, as dense int32."""
    return _fitting(name, x, *shape).to(torch.int32).contiguous()

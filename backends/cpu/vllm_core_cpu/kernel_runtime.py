"""The torch binding's runtime with weights packed for our kernels, and ops and attention on them.

Knows: what is packed, and when the portable ops must do. Does not know: layouts, instruction sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from vllm_core.backend import OpenConfig, RectangleTables, Runtime
from vllm_core.bindings import torch as binding
from vllm_core.bindings.parts import dense_tensors, stored_parts
from vllm_core.bindings.torch import TorchRuntime
from vllm_core.bindings.torch.convert import dtype_of, from_host, to_host
from vllm_core.errors import OutOfMemory, WeightError
from vllm_core.ops import HostArray, Param, ParamSpec, Part, quantized
from vllm_core_cpu import native
from vllm_core_cpu.attention import KV_DTYPES, CpuAttention
from vllm_core_cpu.memory import Buffers
from vllm_core_cpu.ops import CpuOps
from vllm_core_cpu.recorded import WalkRecorder
from vllm_core_cpu.weights import Codes, Packed, pack, pack_codes, quantize, unpack

DTYPES = ("float32", "bfloat16")
"""What the kernels compute in; other models take the portable ops."""


def open_runtime(config: OpenConfig) -> Runtime:
    """With our kernels where they are built."""
    kernels, _ = native.load()
    if kernels is None:
        return binding.open_runtime(config)
    return CpuRuntime(
        kernels,
        torch.device("cpu"),
        config.dtype,
        config.threads,
        checkpoint_dtype=config.checkpoint_dtype,
    )


class CpuRuntime(TorchRuntime):
    """One process's CPUs; as the binding has it for the dtypes that our kernels do not take."""

    def __init__(self, kernels: native.Native, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._kernels = kernels
        self._buffers = Buffers()
        if self.dtype not in DTYPES:
            return
        kernels.set_threads(self.threads)
        # OpenMP threads beside those of the kernels would spin in their way (prompts: a fifth)
        self.use_threads(1)
        self.caps = replace(
            self.caps, native_schemes=frozenset(quantized.BITS), kv_dtypes=KV_DTYPES
        )
        empty = self._buffers.empty
        self.ops = CpuOps(kernels, empty, self.torch_device, self.synchronize)
        self.attention = CpuAttention(kernels, empty, self.dtype, self.synchronize)
        self.ops.walks = WalkRecorder(kernels, self.ops, self.attention)
        self.block_tables = RectangleTables(self.ops)

    def _load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        is_product = spec.role in ("linear", "embedding") and len(spec.shape) == 2
        if self.dtype not in DTYPES or not is_product:
            return super()._load(spec, parts)
        try:
            if all((spec.scheme if x.scheme == "dense" else x.scheme) != "dense" for x in parts):
                return self._load_codes(spec, parts)
            found = dense_tensors(spec, parts)
            rows = self._numbers(found["weight"])
            for some in rows:
                spec.check((sum(map(len, rows)), *some.shape[1:]))
            bias = self._joined(found.get("bias"))
            return Param(*pack(self._kernels, rows, bias))
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(f"no memory for the weight {spec.name} {list(spec.shape)}") from error

    def _numbers(self, arrays: Sequence[HostArray]) -> list[torch.Tensor]:
        return [from_host(x).to(dtype_of(self.dtype)) for x in arrays]

    def _joined(self, arrays: Sequence[HostArray] | None) -> torch.Tensor | None:
        return torch.cat(self._numbers(arrays)) if arrays else None

    def _load_codes(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        """Parts that come in codes, or are to be quantised."""
        codes, biases = [], []
        for part in stored_parts(spec, parts, partial(quantize, self._kernels)):
            bias = part.tensors.pop("bias", None)
            biases += [] if bias is None else [bias]
            codes.append(Codes(part.scheme, part.tensors))
        if len(biases) not in (0, len(parts)):
            raise WeightError(f"{spec.name}: {len(biases)} of {len(parts)} parts have a bias")
        dtype = dtype_of(self.dtype)
        arrays, facts = pack_codes(self._kernels, codes, self._joined(biases), dtype)
        spec.check((facts.n, facts.k))
        return Param(arrays, facts)

    def close(self) -> None:
        super().close()
        self._buffers.forget()
        if isinstance(self.ops, CpuOps) and self.ops.walks is not None:
            self.ops.walks.forget()

    def unload(self, param: Param) -> dict[str, HostArray]:
        facts = param.static
        if not isinstance(facts, Packed):
            return super().unload(param)
        self.synchronize()
        found = {"weight": to_host(unpack(self._kernels, facts))}
        bias = param.get("bias")
        if bias is not None:
            found["bias"] = to_host(bias.to(facts.dtype, copy=True))
        return found

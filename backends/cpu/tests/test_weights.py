"""Weights in codes: the kernel's quantiser gives the bits of the law, pieces lie one below the
other, and a walk that was recorded gives the numbers of one that was not.

Knows: the law in vllm_core.ops.quantized, packed weights. Does not know: layouts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_core.bindings.torch.convert import to_host
from vllm_core.errors import InvalidArgument, WeightError
from vllm_core.ops import ParamSpec, Part, quantized
from vllm_core_cpu import native, weights
from vllm_core_cpu.kernel_runtime import CpuRuntime

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "neon_bf16"])
def kernels(
    library: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> native.Native:
    best = native.find(library)
    assert isinstance(best, native.Native)
    if request.param not in best.usable:
        pytest.skip(f"NOT CHECKED on {request.param}: this processor or build lacks it")
    monkeypatch.setenv("VLLM_CORE_CPU_ISA", request.param)
    found = native.find(library)
    assert isinstance(found, native.Native)
    found.set_threads(1)
    return found


def weight_of(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    rng = np.random.default_rng([rows, size])
    found = torch.from_numpy(rng.standard_normal((rows, size)).astype(np.float32))
    found[1, :32] = 0
    found[2, 40] = 1e-38
    return found.to(dtype)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [896, 96, 192])
def test_the_kernel_quantises_as_the_law_does(
    kernels: native.Native, scheme: str, dtype: torch.dtype, size: int
) -> None:
    weight, bits = weight_of(65, size, dtype), quantized.BITS[scheme]
    group = quantized.group_for(bits, size, 128)
    assert group is not None
    law = quantized.quantize(weight.float().numpy(), bits, group)
    found = weights.quantize(kernels, to_host(weight), bits, group)
    for name, expected in law.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)


def test_a_weight_with_nan_is_not_quantised(kernels: native.Native) -> None:
    weight = weight_of(4, 64, torch.float32)
    weight[3, 63] = float("nan")
    with pytest.raises(WeightError, match="NaN"):
        weights.quantize(kernels, weight.numpy(), 8, 32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_in_other_codes_lie_one_below_the_other(
    kernels: native.Native, dtype: torch.dtype
) -> None:
    dense = [weight_of(rows, 128, dtype) for rows in (70, 64, 30)]
    schemes = ("int4", "int4", "int8")
    parts = [
        weights.Codes(s, weights.quantize(kernels, to_host(w), quantized.BITS[s], 64))
        for w, s in zip(dense, schemes, strict=True)
    ]
    bias = torch.arange(164, dtype=torch.float32)
    _, packed = weights.pack_codes(kernels, parts, bias, dtype)
    assert [(piece.first, piece.rows) for piece in packed.pieces] == [(0, 134), (134, 30)]
    values = [quantized.dequantize(part.tensors, quantized.BITS[part.scheme]) for part in parts]
    expected = torch.from_numpy(np.concatenate(values)).to(dtype)
    assert torch.equal(weights.unpack(kernels, packed), expected)
    ids = torch.tensor([163, 0, 70, 134], dtype=torch.int32)
    assert torch.equal(weights.unpack(kernels, packed, ids), expected[ids.long()])
    x = weight_of(5, 128, dtype)
    out = torch.full((5, 164), float("nan"))
    for piece in packed.pieces:
        kernels.linear(
            piece.addresses["wide"], x.data_ptr(), 128, out.data_ptr() + 4 * piece.first, 5
        )
    laws = [quantized.product(x.float().numpy(), part.tensors, part.scheme) for part in parts]
    torch.testing.assert_close(
        out, torch.from_numpy(np.concatenate(laws, 1)) + bias, rtol=1e-5, atol=1e-3
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_model_is_quantised_in_the_group_that_was_asked_for(
    kernels: native.Native, dtype: str, group: int
) -> None:
    dense = weight_of(65, 256, torch.float32).numpy()
    spec = ParamSpec("w", (65, 256), "linear", scheme="int4", group=group)
    runtime = CpuRuntime(kernels, torch.device("cpu"), dtype, threads=1)
    try:
        param = runtime.load(spec, [Part("dense", {"weight": dense}, 65)])
        (piece,) = param.static.pieces  # type: ignore[attr-defined]
        assert piece.plain.group == group
        values = quantized.dequantize(quantized.quantize(dense, 4, group), 4)
        found = torch.from_numpy(np.asarray(runtime.unload(param)["weight"], np.float32))
        assert torch.equal(found, torch.from_numpy(values).to(getattr(torch, dtype)).float())
    finally:
        runtime.close()


@pytest.mark.parametrize("group", [48, 64])
def test_a_group_that_the_law_does_not_know_is_refused(library: Path, group: int) -> None:
    kernels = native.find(library)
    assert isinstance(kernels, native.Native)
    dense = weight_of(65, 96, torch.float32).numpy()
    spec = ParamSpec("w", (65, 96), "linear", scheme="int8", group=group)
    runtime = CpuRuntime(kernels, torch.device("cpu"), "float32", threads=1)
    try:
        with pytest.raises(InvalidArgument, match=f"w: 96 inputs .* groups of {group}"):
            runtime.load(spec, [Part("dense", {"weight": dense}, 65)])
    finally:
        runtime.close()

"""The law of the 8-bit KV cache, by numbers that one can check by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from vllm_core.ops import HostArray
from vllm_core.ops.quantized_kv import dequantize_kv, quantize_kv


def test_the_largest_magnitude_has_code_127_and_ties_go_to_even() -> None:
    codes, scales = quantize_kv(np.array([127.0, 2.5, -3.5, -0.4, 126.5], np.float32))
    assert codes.tolist() == [127, 2, -4, 0, 126] and codes.dtype == np.int8
    assert scales == 1.0 and scales.dtype == np.float32
    assert quantize_kv(np.array([-10.0, 5.0]))[0].tolist() == [-127, 64]


def test_each_vector_has_a_scale_of_its_own() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 16)).astype(np.float32)
    x *= 10.0 ** np.arange(-7, 8).reshape(5, 3, 1)
    codes, scales = quantize_kv(x)
    assert codes.shape == x.shape and scales.shape == (5, 3)
    assert (np.abs(codes).max(-1) == 127).all()
    wrong = np.abs(dequantize_kv(codes, scales) - x) / np.abs(x).max(-1, keepdims=True)
    assert 0.4 / 127 < wrong.max() <= 0.5001 / 127


def test_zeros_have_scale_0_and_so_has_what_no_scale_reaches() -> None:
    for value in (0.0, -0.0, 1e-45):
        codes, scales = quantize_kv(np.full(4, value, np.float32))
        assert scales == 0 and not codes.any()
        assert not np.signbit(dequantize_kv(codes, scales)).any()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300])
def test_what_is_not_a_number_spoils_its_vector_and_no_other(odd: float) -> None:
    x = np.ones((2, 2, 4))
    x[0, 1, 2] = odd
    values = dequantize_kv(*quantize_kv(x))
    assert np.isnan(values[0, 1]).all()
    values[0, 1] = 1
    assert (values == 1).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_short_dtypes_are_widened_first(dtype: type) -> None:
    x: HostArray = np.random.default_rng(1).normal(size=(50, 8)).astype(dtype)
    codes, scales = quantize_kv(x)
    wide, wide_scales = quantize_kv(x.astype(np.float32))
    assert (codes == wide).all() and (scales == wide_scales).all()


def test_what_the_cache_gave_back_is_stored_without_loss() -> None:
    x = np.random.default_rng(2).normal(size=(4000, 8)).astype(np.float32)
    codes, scales = quantize_kv(x)
    again, _ = quantize_kv(dequantize_kv(codes, scales))
    assert (again == codes).all()

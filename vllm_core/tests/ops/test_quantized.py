"""The law of weights of few bits, against scalar loops and what is known of rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vllm_core.errors import InvalidArgument, WeightError
from vllm_core.ops import HostArray, quantized

f = np.float32
RNG = np.random.default_rng(4)


def weight(rows: int = 6, size: int = 128) -> HostArray:
    w: HostArray = RNG.standard_normal((rows, size)).astype(f) * f(10) ** RNG.integers(-3, 3)
    w[0, : size // 2] = 0
    w[1, 5] = 40 * np.abs(w).max()  # an outlier
    return w


def group_by_hand(values: HostArray, bits: int) -> tuple[list[int], Any]:
    """One group in scalar float32, in the order of the docstring."""
    extreme = max(values.tolist(), key=abs)  # the first of the largest
    if bits == 8:
        scale = f(abs(extreme)) / f(127)
        return [int(np.rint(w / scale)) + 128 for w in values], scale
    found = []
    for divisor in (-8, -9):
        scale = f(extreme) / f(divisor)
        codes = [min(15, max(0, int(np.rint(w / scale)) + 8)) for w in values]
        sums = [f(0)] * 16
        for i, (w, code) in enumerate(zip(values, codes)):
            wrong = w - scale * f(code - 8)
            sums[i % 16] = sums[i % 16] + wrong * wrong
        for half in (8, 4, 2, 1):
            sums = [sums[i] + sums[i + half] for i in range(half)]
        found.append((sums[0], codes, scale))
    best = found[1] if found[1][0] < found[0][0] else found[0]
    return best[1], best[2]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_codes_and_scales_are_those_of_scalar_arithmetic(bits: int, group: int) -> None:
    w = weight()
    tensors = quantized.quantize(w, bits, group)
    for row in range(2, len(w)):
        for at in range(0, w.shape[1], group):
            codes, scale = group_by_hand(w[row, at : at + group], bits)
            assert tensors["scales"][row, at // group] == scale
            assert tensors["codes"][row, at : at + group].tolist() == codes


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_have_scale_0_and_come_back_as_zeros(bits: int) -> None:
    w = weight()
    w[0, 64:] = 1e-37  # too small for a scale of its own
    tensors = quantized.quantize(w, bits, 32)
    assert not tensors["scales"][0].any()
    assert (tensors["codes"][0] == quantized.zero_of(bits)).all()
    assert not quantized.dequantize(tensors, bits)[0].any()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_error_is_at_most_half_a_step_of_8_bits(dtype: str) -> None:
    w = weight().astype(dtype)
    tensors = quantized.quantize(w, 8, 64)
    wrong = np.abs(quantized.dequantize(tensors, 8) - w.astype(f))
    assert (wrong <= 0.5001 * np.repeat(tensors["scales"], 64, -1)).all()
    assert tensors["codes"].min() >= 1


def test_4_bits_are_at_least_as_good_as_the_plain_way_and_better_on_average() -> None:
    w = RNG.standard_normal((64, 512)).astype(f)
    groups = w.reshape(64, -1, 128)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = extreme / f(-8)
    plain = np.clip(np.rint(groups / scale), -8, 7) * scale
    found = quantized.dequantize(quantized.quantize(w, 4, 128), 4).reshape(groups.shape)
    errors = ((found - groups) ** 2).sum(-1), ((plain - groups) ** 2).sum(-1)
    assert (errors[0] <= errors[1] * 1.0001).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


def test_many_rows_are_worked_on_in_pieces_with_the_same_result() -> None:
    w = RNG.standard_normal((40, 65536)).astype(f)
    tensors = quantized.quantize(w, 4, 128)
    last = quantized.quantize(w[-3:], 4, 128)
    assert (tensors["codes"][-3:] == last["codes"]).all()
    values = quantized.dequantize(last, 4)
    assert (quantized.dequantize(tensors, 4)[-3:] == values).all()


def test_mins_move_a_group() -> None:
    codes = np.array([[0, 15] * 8 + [3, 4] * 8], np.uint8)
    tensors: Any = {
        "codes": codes,
        "scales": np.array([[0.5, 2]], f),
        "mins": np.array([[-1, 7]], f),
    }
    values = quantized.dequantize(tensors, 4)[0]
    assert values[:2].tolist() == [-1, 6.5] and values[16:18].tolist() == [13, 15]


@pytest.mark.parametrize(
    ("size", "group"), [(896, 128), (576, 64), (96, 32), (48, None), (33, None), (1, None)]
)
def test_a_dense_weight_gets_the_largest_group_that_divides_it(
    size: int, group: int | None
) -> None:
    assert quantized.group_for(8, size) == quantized.group_for(4, size, 128) == group
    for largest in (32, 64):
        assert quantized.group_for(8, size, largest) == (group and min(group, largest))


def test_the_group_of_4_bits_is_64_where_none_is_asked_for() -> None:
    assert [quantized.group_for(4, size) for size in (896, 192, 96)] == [64, 64, 32]


@pytest.mark.parametrize(("size", "group"), [(128, 48), (100, 32), (48, 16), (64, 0), (64, 8)])
def test_other_groups_are_refused(size: int, group: int) -> None:
    with pytest.raises(InvalidArgument, match="inputs"):
        quantized.quantize(np.ones((2, size), f), 8, group)


def test_numbers_that_are_none_are_refused() -> None:
    w = weight()
    w[3, 3] = np.nan
    with pytest.raises(WeightError, match="NaN"):
        quantized.quantize(w, 8, 32)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": np.zeros((4, 64), np.int8)}, "must be uint8"),
        ({"codes": np.zeros((4, 32), np.uint8)}, "must be uint8"),
        ({"codes": np.full((4, 64), 16, np.uint8)}, "15 is the largest"),
        ({"scales": np.ones((4, 2), np.float64)}, "scales .* must be float32"),
        ({"scales": np.ones((3, 2), f)}, "scales .* must be float32"),
        ({"scales": np.ones((4, 3), f)}, "do not divide"),
        ({"scales": np.ones((4, 8), f)}, "groups of 8"),
        ({"mins": np.ones((4, 1), f)}, "mins .* must be float32"),
    ],
)
def test_tensors_that_are_no_codes_are_refused_in_words(
    change: dict[str, HostArray], said: str
) -> None:
    right: Any = {"codes": np.zeros((4, 64), np.uint8), "scales": np.ones((4, 2), f)}
    quantized.check(right, "int4", 4, 64)
    with pytest.raises(WeightError, match=said):
        quantized.check(right | change, "int4", 4, 64)
    with pytest.raises(WeightError, match="lacks its scales"):
        quantized.check({"codes": right["codes"]}, "int4", 4, 64)


def test_inputs_are_quantised_by_token_and_group() -> None:
    x = RNG.standard_normal((5, 96)).astype(f)
    x[2, :32], x[3] = 0, 1e-38
    x[1, 40] = 300
    codes, scales = quantized.quantize_inputs(x, 16)
    assert codes.shape == x.shape and scales.shape == (5, 3)  # 32 inputs at least share a scale
    amax = np.abs(x[1, 32:64]).max()
    assert scales[1, 1] == amax / f(127)
    assert (codes[1, 32:64] == np.rint(x[1, 32:64] * (f(127) / amax))).all()
    assert not codes[3].any() and not scales[3].any() and scales[2, 0] == 0
    back = codes * np.repeat(scales, 32, -1)
    assert (np.abs(back - x) <= 0.5001 * np.repeat(scales, 32, -1) + 1e-37).all()


@pytest.mark.parametrize("scheme", quantized.BITS)
@pytest.mark.parametrize("has_mins", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, 192])
def test_a_product_is_that_of_what_the_codes_are_worth(
    scheme: str, has_mins: bool, group: int
) -> None:
    bits, rows, size = quantized.BITS[scheme], 7, 192
    tensors: Any = {
        "codes": RNG.integers(0, 1 << bits, (rows, size), dtype=np.uint8),
        "scales": RNG.standard_normal((rows, size // group)).astype(f),
    }
    if has_mins:
        tensors["mins"] = RNG.standard_normal((rows, size // group)).astype(f)
    x = RNG.standard_normal((4, size)).astype(f)
    exact = x.astype(np.float64)
    if not quantized.is_weight_only(scheme):
        codes, scales = quantized.quantize_inputs(x, group)
        exact = codes * np.repeat(scales, size // scales.shape[1], -1).astype(np.float64)
    want = exact @ quantized.dequantize(tensors, bits).astype(np.float64).T
    found = quantized.product(x, tensors, scheme)
    assert found.dtype == f
    np.testing.assert_allclose(found, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_a_token_that_is_no_number_gives_none_and_leaves_the_others() -> None:
    tensors = quantized.quantize(weight(), 4, 32)
    x = RNG.standard_normal((4, 128)).astype(f)
    want = quantized.product(x, tensors, "int4")
    x[1, 3], x[2, 70] = np.nan, -np.inf
    found = quantized.product(x, tensors, "int4")
    assert np.isnan(found[1:3]).all()
    assert (found[[0, 3]] == want[[0, 3]]).all()


def test_bytes_are_counted_by_bits_and_scales() -> None:
    assert quantized.num_bytes("int8", 10, 256, 128) == 10 * (256 + 8)
    assert quantized.num_bytes("int4-weight-only", 10, 256, 32, has_mins=True) == 10 * (128 + 64)

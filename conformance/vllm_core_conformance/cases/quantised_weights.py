"""Cases: weights of few bits, in every declared scheme.

Groups of 16, 32, 64, 128 and of a whole row; mins, biases, fused parts of different schemes; as
many rows and tokens as make kernels change their way; a dense weight that is quantised at load.

Knows: sizes, which op takes what. Does not know: any backend's kernels, how a result is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Ops, ParamSpec, Part
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.ops_call import Activation, Bench, Fixed, Loaded, regimes, rng_of
from vllm_core_conformance.cases.quantised_products import (
    BITS,
    Codes,
    Weight,
    judge,
    make_bias,
    make_codes,
    quiet_inputs,
)
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.oracle import quantised as law
from vllm_core_conformance.score import ROUNDOFF, SMALLEST_NORMAL
from vllm_core_conformance.target import Target, calling, numpy_dtype, wide

Numbers = NDArray[Any]

TOKENS = (1, 2, 6, 8, 13, 33, 97)
SIZE, ROWS = 256, 80
GROUPS = (16, 32, 64, 128, SIZE)
SHAPES: tuple[tuple[int, int, int, tuple[int, ...], bool], ...] = (
    (128, 37, 128, (1, 33), True),
    (32, 3, 32, (2,), False),
    (1152, 200, 128, (1, 8, 97), True),
    (576, 64, 64, (13,), False),
)
"""(inputs, rows, group, tokens, bias): one group a row, fewer rows than a tile, groups of no power
of two."""


def linear(scheme: str, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(f"quantised.linear.{scheme}", seed), Bench(target)
    for group in GROUPS:
        for has_mins in (False, True):
            codes = make_codes(rng, scheme, ROWS, SIZE, group, has_mins=has_mins)
            _product(bench, rng, Weight(bench, [codes]), TOKENS)
    for size, rows, group, tokens, has_bias in SHAPES:
        bias = make_bias(bench, rng, rows) if has_bias else None
        has_mins = bool(rng.integers(2))
        codes = make_codes(rng, scheme, rows, size, group, has_mins=has_mins, bias=bias)
        _product(bench, rng, Weight(bench, [codes]), tokens)
    return bench.done()


def _product(
    bench: Bench, rng: np.random.Generator, weight: Weight, tokens: tuple[int, ...]
) -> None:
    stored = weight.stored()
    for count in tokens:
        x = bench.round(regimes(rng, count, weight.parts[0].size, bench.target.dtype))
        x = quiet_inputs(weight, x)
        (out,) = bench.call("quantised linear", _linear, [Activation(x), Loaded(weight.param)])
        judge(bench, "linear", out, weight, x, stored)


def _linear(ops: Ops, x: Any, param: Any) -> tuple[Any, ...]:
    return (ops.linear(x, param),)


def parts(target: Target, seed: int) -> Evidence:
    """Parts of both schemes and of other groups, and a dense one; their biases too."""
    rng, bench = rng_of("quantised.linear.parts", seed), Bench(target)
    for turn in range(3):
        kinds = np.roll(["int4", "int8", "int4", "int8"], turn).tolist()
        rows = rng.permutation([64, 5, 1, 39]).tolist()
        split = [
            make_codes(
                rng,
                kind,
                count,
                SIZE,
                int(rng.choice([16, 32, 128])),
                has_mins=kind == "int4" and place > 1,
                bias=make_bias(bench, rng, count) if turn else None,
            )
            for place, (kind, count) in enumerate(zip(kinds, rows))
        ]
        _product(bench, rng, Weight(bench, split), (1, 13, 97))
    _beside_dense(bench, rng)
    return bench.done()


def _beside_dense(bench: Bench, rng: np.random.Generator) -> None:
    """A dense part beside codes is multiplied as every dense one."""
    target = bench.target
    codes = make_codes(rng, "int8-weight-only", 45, SIZE, 64)
    dense = bench.round(rng.normal(size=(64, SIZE)) / 16)
    given = [codes.part(), Part("dense", {"weight": dense.astype(np.float32)}, 64)]
    param = target.load(ParamSpec("w", (109, SIZE), "linear"), given)
    x = bench.round(rng.normal(size=(13, SIZE)))
    (out,) = bench.call("quantised linear", _linear, [Activation(x), Loaded(param)])
    require(
        np.asarray(out).shape == (13, 109),
        f"a product with a part of codes and a dense part has shape {list(np.asarray(out).shape)}, "
        "expected [13, 109]",
    )
    alone = Weight(bench, [codes])
    judge(bench, "linear", np.ascontiguousarray(out[:, :45]), alone, x, alone.stored())
    bench.judge(
        "linear",
        np.ascontiguousarray(out[:, 45:]),
        oracle.linear(x, dense),
        oracle.noise_linear(x, dense, ratio=bench.ratio),
        where="of dense rows beside rows in codes",
        axes=("token", "output"),
        by_class=True,
    )


def not_numbers(target: Target, seed: int) -> Evidence:
    """A token that holds NaN or infinity has no result that is a number; the others keep theirs."""
    rng, bench = rng_of("quantised.linear.not_numbers", seed), Bench(target)
    for scheme in BITS:
        weight = Weight(bench, [make_codes(rng, scheme, ROWS, SIZE, 32)])
        stored = weight.stored()
        for count in (2, 13, 97):
            x = bench.round(regimes(rng, count, SIZE, target.dtype))
            x = quiet_inputs(weight, x)
            bad = int(rng.integers(count))
            x[bad, rng.integers(SIZE)] = rng.choice([np.nan, np.inf, -np.inf])
            (out,) = bench.call("quantised linear", _linear, [Activation(x), Loaded(weight.param)])
            require(
                not np.isfinite(wide(out)[bad]).any(),
                f"{weight.what}: one input of token {bad} of {count} is {x[bad].sum()}, and its "
                "results are numbers: the fault would not be noticed",
            )
            rest = np.arange(count) != bad
            judge(bench, "linear", np.asarray(out)[rest], weight, x[rest], stored)
    return bench.done()


def fused_gates(target: Target, seed: int) -> Evidence:
    """The gate in other codes than what it gates."""
    rng, bench = rng_of("quantised.parts.gated", seed), Bench(target)
    for kinds in (("int4", "int8"), ("int8", "int4")):
        halves = [make_codes(rng, kind, 64, SIZE, 32, has_mins=kind == "int4") for kind in kinds]
        weight = Weight(bench, halves)
        stored = weight.stored()
        for count in (1, 8, 33):
            x = quiet_inputs(weight, bench.round(rng.normal(size=(count, SIZE))))
            args = [Activation(x), Loaded(weight.param)]
            (out,) = bench.call("quantised gated_linear silu", _gated["silu"], args)
            judge(bench, "gated_linear:silu", out, weight, x, stored)
    return bench.done()


def gated(scheme: str, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(f"quantised.gated.{scheme}", seed), Bench(target)
    for group, inner, has_bias, tokens in ((32, 64, False, (1, 8, 33)), (128, 21, True, (2, 13))):
        for kind in ("silu", "gelu_tanh"):
            halves = []
            for scale in (4.0, 1.0):  # some gates are far out
                bias = make_bias(bench, rng, inner) if has_bias else None
                codes = make_codes(rng, scheme, inner, SIZE, group, has_mins=has_bias, bias=bias)
                for name in ("scales", "mins"):
                    if name in codes.tensors:
                        codes.tensors[name] = codes.tensors[name] * np.float32(scale)
                halves.append(codes)
            weight = Weight(bench, halves)
            stored = weight.stored()
            for count in tokens:
                x = quiet_inputs(weight, bench.round(rng.normal(size=(count, SIZE))))
                fn = _gated[kind]
                tag = f"quantised gated_linear {kind}"
                (out,) = bench.call(tag, fn, [Activation(x), Loaded(weight.param)])
                judge(bench, f"gated_linear:{kind}", out, weight, x, stored)
    return bench.done()


_gated: dict[str, Callable[..., tuple[Any, ...]]] = {
    "silu": lambda ops, x, param: (ops.gated_linear(x, param, "silu"),),
    "gelu_tanh": lambda ops, x, param: (ops.gated_linear(x, param, "gelu_tanh"),),
}


VOCAB, WIDTH = 515, 192


def head(scheme: str, target: Target, seed: int) -> Evidence:
    """A head of its own, and a table that is looked up and multiplied with, in either order."""
    rng, bench = rng_of(f"quantised.head.{scheme}", seed), Bench(target)
    for role, group, has_mins in (("linear", 64, False), ("embedding", 32, True)):
        codes = make_codes(rng, scheme, VOCAB, WIDTH, group, has_mins=has_mins)
        weight = Weight(bench, [codes], role)
        stored = weight.stored()
        for count in (1, 6, 33):
            if role == "embedding":
                _look_up(bench, rng, weight, 13)
            x = quiet_inputs(weight, bench.round(rng.normal(size=(count, WIDTH)) * 4))
            args = [Activation(x), Loaded(weight.param)]
            (out,) = bench.call("quantised logits", _logits, args)
            judge(bench, "logits", out, weight, x, stored)
        x[0, rng.integers(WIDTH)] = np.nan
        (out,) = bench.call("quantised logits", _logits, [Activation(x), Loaded(weight.param)])
        require(
            bool(np.isnan(wide(out)[0]).all() and np.isfinite(wide(out)[1:]).all()),
            f"logits of {weight.what}: NaN in token 0 must give NaN for that token, and only there",
        )
    return bench.done()


def _logits(ops: Ops, x: Any, param: Any) -> tuple[Any, ...]:
    return (ops.logits(x, param),)


def embed(scheme: str, target: Target, seed: int) -> Evidence:
    rng, bench = rng_of(f"quantised.embed.{scheme}", seed), Bench(target)
    for group in (16, 32, 64, WIDTH):
        for has_mins in (False, True):
            codes = make_codes(rng, scheme, VOCAB, WIDTH, group, has_mins=has_mins)
            weight = Weight(bench, [codes], "embedding")
            weight.stored()
            for count in (1, 13, 97):
                _look_up(bench, rng, weight, count)
    return bench.done()


def _look_up(bench: Bench, rng: np.random.Generator, weight: Weight, count: int) -> None:
    ids = rng.integers(0, VOCAB, count).astype(np.int32)
    ids[-1] = VOCAB - 1
    (rows,) = bench.call("quantised embed", _embed, [Fixed(ids), Loaded(weight.param)])
    got, values, dtype = wide(rows), weight.values(), bench.target.dtype
    first, second = (np.abs(term[ids]) for term in weight.terms())
    room = 1.01 * ROUNDOFF[dtype] * np.abs(values[ids]) + SMALLEST_NORMAL[dtype]
    room += 4 * ROUNDOFF["float32"] * (first + second)
    require(
        np.asarray(rows).dtype == numpy_dtype(dtype) and got.shape == (count, WIDTH),
        f"embed of {weight.what} gave {np.asarray(rows).dtype} {list(got.shape)}, expected {dtype} "
        f"{[count, WIDTH]}",
    )
    wrong = np.abs(got - values[ids]) > room
    wrong |= np.isnan(got)
    bench.evidence.checks += got.size
    if not wrong.any():
        return
    token, place = (int(i) for i in np.argwhere(wrong)[0])
    near = int(np.argmin(np.abs(values - got[token]).sum(-1)))
    hint = f"; that is row {near}" if near != ids[token] else ""
    raise Failed(
        f"embed of {weight.what}: row {ids[token]}, place {place} is {got[token, place]:.6g}, "
        f"expected {values[ids[token], place]:.6g}{hint}"
    )


def _embed(ops: Ops, ids: Any, param: Any) -> tuple[Any, ...]:
    return (ops.embed(ids, param),)


# ---------------------------------------------------------------- quantised at load
DENSE = (
    (SIZE, ROWS, None, {8: 128, 4: 64}),
    (192, 70, None, {8: 64, 4: 64}),
    (96, 33, None, {8: 32, 4: 32}),
    (SIZE, 40, 32, {8: 32, 4: 32}),
)
"""(inputs, rows, the group that is asked for, the one that the contract wants by bits)."""


MOST_STEPS = 1.85
"""Of 4 bits, in eighths of the extreme: over -9, what is as large on the other side loses two."""


def from_dense(scheme: str, target: Target, seed: int) -> Evidence:
    """What dense rows become is within what rounding to the codes of each group may change, as
    near on the whole as the contract's quantiser, and the same where codes hold the numbers."""
    rng, bench = rng_of(f"quantised.dense.{scheme}", seed), Bench(target)
    for size, rows, asked, groups in DENSE:
        group = groups[BITS[scheme]]
        for host in ("float32", "bfloat16"):
            dense, exact_rows = _dense(rng, BITS[scheme], size, rows, group)
            dense = dense.astype(numpy_dtype(host))
            cut = int(rng.integers(1, rows))
            bias = make_bias(bench, rng, rows)
            given = [
                Part("dense", {"weight": w, "bias": b.astype(np.float32)}, len(w))
                for w, b in ((dense[:cut], bias[:cut]), (dense[cut:], bias[cut:]))
            ]
            spec = ParamSpec("w", (rows, size), "linear", scheme=scheme, group=asked)
            param = target.load(spec, given)
            with calling("unload"):
                found = target.runtime.unload(param)
            got = wide(np.asarray(found["weight"]))
            what = f"a dense {host} weight [{rows}, {size}] quantised to {scheme} at load"
            what += f" in groups of {group}"
            _judge_quantiser(bench, got, wide(dense), scheme, group, exact_rows, what)
            _judge_product(bench, rng, param, got, wide(dense), bias, scheme, group, what)
    return bench.done()


def _dense(
    rng: np.random.Generator, bits: int, size: int, rows: int, group: int
) -> tuple[Numbers, slice]:
    """Normal rows whose groups differ by powers of ten, outliers, zeros; some rows that codes hold
    as they are, with every step of theirs."""
    w = rng.normal(size=(rows, size // group, group))
    w *= 10.0 ** rng.integers(-3, 2, (rows, size // group, 1))
    w[1, :, 5] *= 30
    w[2, 0] = 0
    kept = slice(4, 12)
    low = -127 if bits == 8 else -8
    steps = rng.integers(low, -low, w[kept].shape)
    steps[..., 3] = low
    signs = rng.choice([-1.0, 1.0], (8, size // group, 1))
    w[kept] = steps * signs * 2.0 ** rng.integers(-9, 3, (8, size // group, 1))
    return w.reshape(rows, size).astype(np.float32), kept


def _judge_quantiser(
    bench: Bench,
    got: Numbers,
    dense: Numbers,
    scheme: str,
    group: int,
    exact_rows: slice,
    what: str,
) -> None:
    bits, dtype = BITS[scheme], bench.target.dtype
    require(got.shape == dense.shape, f"{what}: unload gave {list(got.shape)}")
    target = law.quantised(dense, bits, group)
    parts = dense.reshape(len(dense), -1, group)
    amax = np.abs(parts).max(-1, keepdims=True)
    step = amax / (127 if bits == 8 else 8)
    wrong = np.abs(got - dense).reshape(parts.shape)
    stored = 1.01 * ROUNDOFF[dtype] * np.abs(parts) + SMALLEST_NORMAL[dtype]
    room = step * (0.51 if bits == 8 else MOST_STEPS) + 2 * stored
    at = np.unravel_index(int(np.argmax(wrong / room)), parts.shape)
    row, place = int(at[0]), int(at[1] * group + at[2])
    require(
        bool((wrong <= room).all()),
        f"{what}: row {row}, input {place} became {got[row, place]:.6g} of {dense[row, place]:.6g}"
        f", {_steps(wrong[at], step[at[:2]][0])} steps of its group of {group} away",
    )
    best = np.abs(target - dense).reshape(parts.shape)
    mean, least = (np.sqrt((e**2).mean(-1)) for e in (wrong, best))
    limit = 1.15 * least + 1.5 * stored.max(-1)
    place = int(np.argmax((mean - limit).ravel()))
    require(
        bool((mean <= limit).all()),
        f"{what}: group {place % mean.shape[1]} of row {place // mean.shape[1]} is off by "
        f"{mean.ravel()[place]:.4g} (root mean square), the contract's quantiser by "
        f"{least.ravel()[place]:.4g}",
    )
    same = np.abs(got - dense)[exact_rows] <= 1.01 * stored.reshape(dense.shape)[exact_rows]
    require(bool(same.all()), f"{what}: rows that codes hold as they are came back changed")
    bench.evidence.checks += 2 * got.size


def _steps(wrong: float, step: float) -> str:
    return f"{wrong / step:.2f}" if step > 0 else "many"


def _judge_product(
    bench: Bench,
    rng: np.random.Generator,
    param: Any,
    stored: Numbers,
    dense: Numbers,
    bias: Numbers,
    scheme: str,
    group: int,
    what: str,
) -> None:
    """With the values that unload tells; where it may have rounded those of the contract's
    quantiser, with these."""
    rows, size = stored.shape
    exact, dtype = law.quantised(dense, BITS[scheme], group), bench.target.dtype
    is_same = np.abs(stored - exact) <= 1.01 * ROUNDOFF[dtype] * np.abs(exact)
    values = np.where(is_same, exact, stored)
    shape = rows, size // group
    codes = {"codes": np.zeros((rows, size), np.uint8), "scales": np.zeros(shape, np.float32)}
    weight = _Stored(bench, [Codes(scheme, codes, bias)], values_=values, param_=param)
    x = quiet_inputs(weight, bench.round(rng.normal(size=(13, size))))
    (out,) = bench.call("quantised linear", _linear, [Activation(x), Loaded(param)])
    judge(bench, "linear", out, weight, x, stored, where=what)


class _Stored(Weight):
    """A weight of which only the values are known."""

    def __init__(self, bench: Bench, parts: list[Codes], *, values_: Numbers, param_: Any) -> None:
        self.bench, self.parts, self.role = bench, parts, "linear"
        self.param, self._values = param_, values_

    def values(self) -> Numbers:
        return self._values

    def terms(self) -> tuple[Numbers, Numbers]:
        part = self.parts[0]
        amax = np.abs(self._values).reshape(part.rows, -1, part.group).max(-1)
        return self._values, law.spread(amax, part.size)


# ---------------------------------------------------------------- cases
_PROFILE = frozenset({"quantised"})
_SAYS: dict[str, tuple[Callable[[str, Target, int], Evidence], str]] = {
    "linear": (linear, "multiplies {} codes by the contract's values, for any group and row count"),
    "gated": (gated, "gates products with {} codes"),
    "head": (head, "makes logits with {} codes, tied or not"),
    "embed": (embed, "looks up rows of {} codes"),
    "dense": (from_dense, "quantises a dense weight to {} as well as the contract does"),
}


def _case(name: str, scheme: str) -> Case:
    run, says = _SAYS[name]
    return Case(
        f"quantised.{name}.{scheme}",
        says.format(scheme),
        partial(run, scheme),
        _PROFILE,
        needs=(f"scheme:{scheme}",),
        every_dtype=True,
    )


_ALL = tuple(f"scheme:{scheme}" for scheme in BITS)

CASES: tuple[Case, ...] = (
    *(_case(name, scheme) for scheme in BITS for name in _SAYS),
    Case(
        "quantised.parts.mixed",
        "joins parts of different schemes and groups in their order",
        parts,
        _PROFILE,
        needs=_ALL,
        every_dtype=True,
    ),
    Case(
        "quantised.parts.gated",
        "gates what is in one scheme with what is in another",
        fused_gates,
        _PROFILE,
        needs=_ALL,
        every_dtype=True,
    ),
    Case(
        "quantised.linear.not_numbers",
        "gives no numbers for a token that holds none, and leaves the others alone",
        not_numbers,
        _PROFILE,
        needs=_ALL,
        every_dtype=True,
    ),
)

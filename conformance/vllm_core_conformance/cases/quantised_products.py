"""Products with weights of few bits: how one is made, judged, and what a wrong one looks like.

A result must fit one of the laws that the contract allows: the values of the codes, as they are, as
the model dtype holds them, or as `unload` says they are stored; and inputs as they are or, where
the scheme quantises them, as their codes.

Knows: schemes, laws, usual mistakes. Does not know: which sizes are tried, any backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Param, ParamSpec, Part
from vllm_core_conformance.case import Failed, require
from vllm_core_conformance.cases.ops_call import Bench
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.oracle import quantised as law
from vllm_core_conformance.score import ROUNDOFF, SMALLEST_NORMAL, z_of
from vllm_core_conformance.target import calling, round_to, wide

Numbers = NDArray[Any]

BITS = {"int8": 8, "int4": 4, "int8-weight-only": 8, "int4-weight-only": 4}


# ---------------------------------------------------------------- weights
@dataclass
class Codes:
    """Some rows in codes, and what they are worth."""

    scheme: str
    tensors: dict[str, Numbers]
    bias: Numbers | None = None

    @property
    def bits(self) -> int:
        return BITS[self.scheme]

    @property
    def rows(self) -> int:
        return len(self.tensors["codes"])

    @property
    def size(self) -> int:
        return int(self.tensors["codes"].shape[1])

    @property
    def group(self) -> int:
        return self.size // int(self.tensors["scales"].shape[1])

    def part(self) -> Part:
        more = {} if self.bias is None else {"bias": self.bias.astype(np.float32)}
        return Part(self.scheme, self.tensors | more, self.rows)


def make_bias(bench: Bench, rng: np.random.Generator, rows: int) -> Numbers:
    """Exact in the model dtype and in float32."""
    return bench.round(rng.normal(size=rows) * 3).astype(np.float32).astype(np.float64)


def make_codes(
    rng: np.random.Generator,
    scheme: str,
    rows: int,
    size: int,
    group: int,
    *,
    has_mins: bool = False,
    bias: Numbers | None = None,
) -> Codes:
    """Codes of every value, scales of both signs and of sizes that differ from group to group."""
    bits = BITS[scheme]
    codes = rng.integers(0, 1 << bits, (rows, size), dtype=np.uint8)
    codes.flat[:2] = 0, (1 << bits) - 1
    shape = rows, size // group
    scales = np.exp(rng.normal(size=shape) * 0.7) * rng.choice([-1.0, 1.0, 1.0], shape)
    scales *= 1.5 / (2.0**bits * np.sqrt(size))
    tensors = {"codes": codes, "scales": scales.astype(np.float32)}
    if has_mins:
        mins = -(2.0 ** (bits - 1)) * scales * rng.uniform(0.85, 1.15, shape)
        tensors["mins"] = mins.astype(np.float32)
    return Codes(scheme, tensors, bias)


@dataclass
class Weight:
    """One parameter on the device, of one part or several."""

    bench: Bench
    parts: Sequence[Codes]
    role: str = "linear"
    param: Param = field(init=False)

    def __post_init__(self) -> None:
        rows = sum(part.rows for part in self.parts)
        spec = ParamSpec("w", (rows, self.parts[0].size), self.role)
        self.param = self.bench.target.load(spec, [part.part() for part in self.parts])

    @property
    def what(self) -> str:
        first = self.parts[0]
        kinds = " + ".join(
            f"{p.scheme} of groups of {p.group}" + (" with mins" if "mins" in p.tensors else "")
            for p in self.parts
        )
        rows = sum(part.rows for part in self.parts)
        return f"{kinds}, {first.size} -> {rows}" + (" + bias" if self.bias is not None else "")

    @property
    def bias(self) -> Numbers | None:
        if self.parts[0].bias is None:
            return None
        return np.concatenate([np.asarray(part.bias, np.float64) for part in self.parts])

    def values(self) -> Numbers:
        return np.concatenate([law.values(part.tensors, part.bits) for part in self.parts])

    def terms(self) -> tuple[Numbers, Numbers]:
        first, second = zip(*(law.terms(part.tensors, part.bits) for part in self.parts))
        return np.concatenate(first), np.concatenate(second)

    def stored(self) -> Numbers:
        """As unload tells it: within a rounding of the values of the codes."""
        target = self.bench.target
        with calling("unload"):
            found = target.runtime.unload(self.param)
        named = {"weight"} | (set() if self.bias is None else {"bias"})
        require(
            set(found) == named,
            f"{self.what}: unload gave {sorted(found)}, expected {sorted(named)}: the values of "
            "the codes, in the model dtype or float32",
        )
        got, exact = wide(np.asarray(found["weight"])), self.values()
        first, second = self.terms()
        room = 1.01 * ROUNDOFF[target.dtype] * np.abs(exact)
        room += 4 * ROUNDOFF["float32"] * (np.abs(first) + np.abs(second))
        room += SMALLEST_NORMAL[target.dtype]
        what = f"{self.what}: unload does not give back the values of the codes"
        require(
            got.shape == exact.shape,
            f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}",
        )
        over = np.nan_to_num(np.abs(got - exact) - room, nan=np.inf)
        row, column = np.unravel_index(int(np.argmax(over)), exact.shape)
        require(
            bool((over <= 0).all()),
            f"{what}: row {row}, input {column} is {got[row, column]:.6g}, "
            f"expected {exact[row, column]:.6g}",
        )
        self.bench.evidence.checks += exact.size
        return got


# ---------------------------------------------------------------- laws and suspects
def _inputs(weight: Weight, x: Numbers, group: Callable[[Codes], int]) -> list[Numbers]:
    """Quantised inputs as each part's rows see them."""
    return [law.coded_inputs(x, min(group(part), part.size)) for part in weight.parts]


def _input_group(part: Codes) -> int:
    return law.input_group(part.group, part.size)


def quiet_inputs(weight: Weight, x: Numbers) -> Numbers:
    """x without values that honest arithmetic might round to either of two codes."""
    for part in weight.parts:
        if not part.scheme.endswith("-weight-only"):
            x = law.without_ties(x, _input_group(part))
    return x


Inputs = Sequence[Numbers]
"""x for each part."""


def laws(weight: Weight, x: Numbers, stored: Numbers) -> Iterator[tuple[Inputs, Numbers]]:
    """(inputs of each part, weight) of what the contract allows."""
    plain: Inputs = [x] * len(weight.parts)
    values, dtype = weight.values(), weight.bench.target.dtype
    kinds = [values, stored]
    for kind in (*kinds, round_to(values, dtype)):
        yield plain, kind
    coded = [
        x if part.scheme.endswith("-weight-only") else own
        for part, own in zip(weight.parts, _inputs(weight, x, _input_group))
    ]
    for kind in kinds:
        yield coded, kind


def suspects(weight: Weight, x: Numbers) -> Iterator[tuple[str, Inputs, Numbers]]:
    """(what went wrong, inputs of each part, weight): mistakes that are made with codes."""
    plain: Inputs = [x] * len(weight.parts)
    both: list[tuple[str, Inputs]] = [("", plain), ("", _inputs(weight, x, _input_group))]
    for says, change in MISTAKES.items():
        wrong = [dict(part.tensors) for part in weight.parts]
        for tensors, part in zip(wrong, weight.parts):
            tensors.update(change(part))
        changed = np.concatenate(
            [law.values(tensors, part.bits) for tensors, part in zip(wrong, weight.parts)]
        )
        for _, inputs in both:
            yield says, inputs, changed
    values = weight.values()
    yield (
        "inputs are quantised with one scale per token, not one per group",
        _inputs(weight, x, lambda part: part.size),
        values,
    )
    if x.shape[1] % 128 == 0:
        yield "inputs are quantised in groups of 128", _inputs(weight, x, lambda part: 128), values
    last = values.copy()
    last[:, -weight.parts[-1].group :] = 0
    for _, inputs in both:
        yield "the last group of inputs is left out", inputs, last


def _swapped(codes: Numbers) -> Numbers:
    pairs = codes.reshape(len(codes), -1, 2)
    return pairs[..., ::-1].reshape(codes.shape)


def _halves_swapped(part: Codes) -> Numbers:
    parts = part.tensors["codes"].reshape(part.rows, -1, 2, part.group // 2)
    return parts[:, :, ::-1].reshape(part.rows, -1)


MISTAKES: Mapping[str, Callable[[Codes], Mapping[str, Numbers]]] = {
    "mins are ignored": lambda p: {"mins": 0 * p.tensors["mins"]} if "mins" in p.tensors else {},
    "codes are taken without their zero point": lambda p: (
        {} if "mins" in p.tensors else {"mins": 0 * p.tensors["scales"]}
    ),
    "the two codes of a pair are swapped": lambda p: {"codes": _swapped(p.tensors["codes"])},
    "the two halves of a group are swapped": lambda p: {"codes": _halves_swapped(p)},
    "scales are those of the next row": lambda p: {"scales": np.roll(p.tensors["scales"], -1, 0)},
    "scales are those of the row before": lambda p: {"scales": np.roll(p.tensors["scales"], 1, 0)},
    "scales are those of the next group": lambda p: {"scales": np.roll(p.tensors["scales"], -1, 1)},
    "a row's first scale is used for all its groups": lambda p: {
        "scales": np.broadcast_to(p.tensors["scales"][:, :1], p.tensors["scales"].shape)
    },
    "scales lost their sign": lambda p: {"scales": np.abs(p.tensors["scales"])},
}


# ---------------------------------------------------------------- judgement
def _linear(
    weight: Weight, inputs: Inputs, matrix: Numbers, ratio: float
) -> tuple[Numbers, Numbers]:
    """(exact, noise) of the plain product with its bias."""
    outs, at = [], 0
    for part, x in zip(weight.parts, inputs):
        outs.append(oracle.times(x, matrix[at : at + part.rows]))
        at += part.rows
    exact, bias = np.concatenate(outs, 1), weight.bias
    if bias is not None:
        exact = exact + bias
    largest = np.max([np.abs(x) for x in inputs], 0)
    return exact, law.noise_product(exact, largest, weight.terms(), bias, ratio=ratio)


def judge(
    bench: Bench, op: str, out: Any, weight: Weight, x: Numbers, stored: Numbers, where: str = ""
) -> None:
    """op: linear, logits, or gated_linear:KIND. Judged by the law that fits best."""
    name, _, kind = op.partition(":")
    is_single = name == "logits"

    def exact_of(inputs: Inputs, matrix: Numbers) -> tuple[Numbers, Numbers]:
        exact, noise = _linear(weight, inputs, matrix, 1.0 if is_single else bench.ratio)
        if kind:
            gate = oracle.noise_gated_of(exact, noise, kind, ratio=bench.ratio)
            return oracle.gated(exact, kind), gate
        if is_single and bench.is_16_bit:
            noise = noise + (oracle.SIXTEEN_BITS - 1) * np.abs(exact)
        return exact, noise

    dtype = "float32" if is_single else bench.target.dtype
    got = wide(np.asarray(out))

    def distance(found: tuple[Numbers, Numbers]) -> float:
        if got.shape != found[0].shape:
            return np.inf
        z = z_of(got, *found, dtype, 1.0)
        return float(np.sqrt(np.mean(np.minimum(z, 1e30) ** 2)))

    candidates = []
    for law_of in laws(weight, x, stored):
        candidates.append(exact_of(*law_of))
        if distance(candidates[-1]) < 0.2:  # of roundings: that is the one
            break
    best = min(candidates, key=distance)
    where = f"of {where or weight.what}, {len(x)} tokens"
    full = f"{name}/16" if is_single and bench.is_16_bit else name
    options: dict[str, Any] = {"axes": ("token", "output"), "single": is_single, "by_class": True}
    try:
        bench.judge(full, out, *best, where=where, **options)
    except Failed as failure:
        raise Failed(
            f"{failure.sentence}{_hint(weight, x, exact_of, distance, distance(best))}",
            **failure.details,
        ) from None


def _hint(
    weight: Weight,
    x: Numbers,
    exact_of: Callable[[Inputs, Numbers], tuple[Numbers, Numbers]],
    distance: Callable[[tuple[Numbers, Numbers]], float],
    found: float,
) -> str:
    """Which mistake explains it, if one leaves a tenth of the error at most."""
    for says, inputs, matrix in suspects(weight, x):
        if distance(exact_of(inputs, matrix)) < found / 10:
            return f"; it fits when {says}"
    return ""

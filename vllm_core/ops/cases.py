"""Inputs that hurt, for every op that computes with numbers.

Knows: shapes, values, how a case is rounded to a dtype. Does not know: laws, noise, bindings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from vllm_core.ops.arrays import HostArray

DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
}


@dataclass(frozen=True)
class Activation:
    """An array in the model's dtype."""

    value: HostArray


@dataclass(frozen=True)
class Fixed:
    """An array on the device in its own dtype: ids, angles, routing weights."""

    value: HostArray


@dataclass(frozen=True)
class Weights:
    """Dense tensors that `Runtime.load` makes a Param of."""

    role: str
    tensors: Mapping[str, HostArray]


@dataclass(frozen=True)
class Case:
    """One call. Arguments of other types than the three above are passed as they are."""

    name: str
    args: tuple[Any, ...]

    def rounded(self, dtype: str) -> Case:
        """The same case on numbers that `dtype` holds exactly."""

        def nearest(x: HostArray) -> HostArray:
            return x.astype(DTYPES[dtype]).astype(np.float64)

        def one(arg: Any) -> Any:
            if isinstance(arg, Activation):
                return Activation(nearest(arg.value))
            if isinstance(arg, Weights):
                return replace(arg, tensors={k: nearest(v) for k, v in arg.tensors.items()})
            return arg

        return replace(self, args=tuple(one(arg) for arg in self.args))

    def host(self) -> tuple[Any, ...]:
        """Arguments of the law: float64 arrays, integers as they are, weights as {name: array}."""

        def one(arg: Any) -> Any:
            if isinstance(arg, Weights):
                return dict(arg.tensors)
            if isinstance(arg, (Activation, Fixed)):
                x = arg.value
                return x.astype(np.float64) if x.dtype.kind == "f" else x
            return arg

        return tuple(one(arg) for arg in self.args)


def awkward(rng: np.random.Generator, rows: int, width: int) -> HostArray:
    """[rows, width]: normal, an outlier channel x 1000, denormal, zero, large, an offset that
    dwarfs the rest."""
    x = rng.normal(size=(rows, width))
    x[1::6, width // 2] *= 1000
    x[2::6] *= 1e-40
    x[3::6] = 0
    x[4::6] *= 100
    x[5::6] += 30
    return np.asarray(x)


def _weight(rng: np.random.Generator, *shape: int) -> HostArray:
    return np.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]))


SIZES = ((1, 1, 1), (7, 5, 3), (17, 129, 65), (12, 768, 48))
"""(tokens, inputs, outputs): ones, odd, no powers of two, and one of a model's size."""


def embed_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, width, vocab in SIZES:
        ids = rng.integers(0, vocab, tokens).astype(np.int32)
        weight = Weights("embedding", {"weight": awkward(rng, vocab, width)})
        yield Case(f"{tokens} of {vocab} x {width}", (Fixed(ids), weight))


def linear_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, width, out in (*SIZES, (0, 8, 8)):
        tensors = {"weight": _weight(rng, out, width)}
        if width % 3:  # with and without
            tensors["bias"] = rng.normal(size=out)
        x = Activation(awkward(rng, tokens, width))
        yield Case(f"{tokens} x {width} -> {out}", (x, Weights("linear", tensors)))


def norm_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for (tokens, width, _), eps in zip((*SIZES, (0, 8, 8)), (1e-5, 1e-6, 1e-5, 1e-12, 1e-5)):
        weight = Weights("norm", {"weight": 1 + 0.3 * rng.normal(size=width)})
        yield Case(
            f"{tokens} x {width}, eps {eps}", (Activation(awkward(rng, tokens, width)), weight, eps)
        )


def add_norm_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for case in norm_inputs(rng):
        x, weight, eps = case.args
        residual = Activation(rng.normal(size=x.value.shape) * 3)
        yield Case(case.name, (x, residual, weight, eps))


def layer_norm_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for case in norm_inputs(rng):
        x, weight, eps = case.args
        width = x.value.shape[1]
        if width % 3:
            weight = Weights("norm", {**weight.tensors, "bias": rng.normal(size=width)})
        yield Case(case.name, (x, weight, eps))


def rope_table_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, half, base, scale in ((1, 1, 1e4, 1.0), (19, 32, 1e4, 1.0), (64, 48, 1e6, 1.2079)):
        positions = rng.integers(0, 2**17, tokens).astype(np.int32)
        positions[:2] = (0, 131_071)[:tokens]
        frequency = (base ** -(np.arange(half) / half)).astype(np.float32)
        yield Case(f"{tokens} positions, base {base:.0e}", (Fixed(positions), frequency, scale))


def rope_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, heads, dim, half in ((1, 1, 2, 1), (7, 3, 16, 8), (9, 2, 80, 16), (5, 6, 64, 32)):
        angle = rng.uniform(0, 7, (tokens, half))
        cos, sin = (Fixed(f(angle).astype(np.float32)) for f in (np.cos, np.sin))
        x = awkward(rng, tokens * heads, dim).reshape(tokens, heads, dim)
        yield Case(f"{tokens} x {heads} x {dim}, {2 * half} rotate", (Activation(x), cos, sin))


def gated_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, width, _ in (*SIZES, (0, 8, 8)):
        yield Case(f"{tokens} x {2 * width}", (Activation(awkward(rng, tokens, 2 * width)),))


def gated_linear_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for case in linear_inputs(rng):
        x, weights = case.args
        rows = len(weights.tensors["weight"]) // 2 * 2
        if not rows:
            continue
        tensors = {name: tensor[:rows] for name, tensor in weights.tensors.items()}
        for kind in ("silu", "gelu_tanh"):
            yield Case(f"{case.name}, {kind}", (x, Weights("linear", tensors), kind))
    x = Activation(rng.normal(size=(7, 64)))
    yield Case(
        "7 x 64 -> 256, silu", (x, Weights("linear", {"weight": _weight(rng, 256, 64)}), "silu")
    )


def activation_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for kind in ("relu", "gelu", "gelu_tanh", "silu"):
        yield Case(kind, (Activation(awkward(rng, 13, 65)), kind))


def route_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, experts, top_k, renormalize in (
        (1, 1, 1, True),
        (9, 5, 3, False),
        (33, 60, 4, True),
    ):
        # steps of 1/8 within +-12: no two experts are apart by rounding alone, and many tie
        logits = np.clip(np.round(rng.normal(size=(tokens, experts)) * 32) / 8, -12, 12)
        logits[1::4] = np.round(logits[1::4] / 4)
        valid = np.arange(tokens) < max(1, tokens - 3)
        name = f"{top_k} of {experts}, {'' if renormalize else 'not '}renormalized"
        yield Case(name, (Activation(logits), top_k, renormalize, Fixed(valid)))


def expert_inputs(rng: np.random.Generator) -> Iterator[Case]:
    for tokens, width, inner, experts, top_k in (
        (1, 3, 1, 1, 1),
        (9, 24, 17, 5, 2),
        (21, 64, 48, 12, 4),
    ):
        used = max(1, experts - 2)  # some experts get no token
        ids = np.array([rng.permutation(used)[:top_k] for _ in range(tokens)], np.int32)
        shares = rng.dirichlet(np.ones(top_k), tokens).astype(np.float32)
        ids[max(1, tokens - 2) :], shares[max(1, tokens - 2) :] = experts, 0  # padding
        gate_up = Weights("experts", {"weight": _weight(rng, experts, 2 * inner, width)})
        down = Weights("experts", {"weight": _weight(rng, experts, width, inner)})
        x = Activation(rng.normal(size=(tokens, width)))
        yield Case(f"{top_k} of {experts}", (x, Fixed(ids), Fixed(shares), gate_up, down))

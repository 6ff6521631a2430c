"""Cases: all ops of a decoder block in one program, each twice on operands of one shape, as layers
call them: what one call keeps, overwrites or takes from another shows.

Operands are columns of wider arrays; no op reads what another computed, so that a compiler that
keeps more precision between two ops stays honest.

Knows: sizes of a block that hurt, rows that hurt. Does not know: what any op computes (oracle).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases.ops_activations import arguments
from vllm_core_conformance.cases.ops_call import (
    Activation,
    Arg,
    Bench,
    Fixed,
    Weights,
    rng_of,
    weight,
)
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.target import Target, wide

Numbers = NDArray[Any]

TOKENS, HEADS, DIM, HALF = 70, 12, 10, 4
"""More than a tile of 64, more heads than 8, dims that do not all rotate."""
HIDDEN = HEADS * DIM
LONG, INNER, EXPERTS, TOP_K, FEW = 300, 37, 12, 3, 4
VOCAB, IDS = 139, 33_011
EPS = (3e-4, 2e-5)
PADDING = 6
"""Tokens at the end that are not valid; they hold NaN and Inf."""


@dataclass
class Block:
    """Arguments by name, and what must come out."""

    bench: Bench
    rng: np.random.Generator
    args: dict[str, Arg] = field(default_factory=dict)

    def rows(self, name: str, width: int) -> Numbers:
        """[TOKENS, width] of many sizes in the model dtype; the last PADDING rows are broken."""
        rng = self.rng
        sizes = [1e-3, 1, 1, 1, 40] + ([] if self.bench.target.dtype == "float16" else [3e5])
        x = rng.normal(size=(TOKENS, width)) * rng.choice(sizes, (TOKENS, 1))
        return self._kept(name, x)

    def gates(self, name: str, width: int) -> Numbers:
        """Arguments of activations, far out on both sides."""
        x = np.clip(arguments(self.rng, TOKENS, width, "float16"), -240, 240)
        return self._kept(name, x)

    def _kept(self, name: str, x: Numbers) -> Numbers:
        x[-PADDING:] = np.array([np.nan, np.inf, -np.inf])[np.arange(PADDING) % 3, None]
        x = self.bench.round(x)
        self.args[name] = Activation(x)
        return x

    def weights(self, name: str, role: str, *shape: int, bias: bool = False) -> dict[str, Numbers]:
        rng, bench = self.rng, self.bench
        if role == "norm":
            made = (1 + 0.4 * rng.normal(size=shape)) * rng.choice([1, 1, 1, -1], shape)
        else:
            made = weight(rng, *shape)
        tensors = {"weight": bench.round(made)}
        if bias:
            tensors["bias"] = bench.round(rng.normal(size=shape[0]) * 3)
        self.args[name] = Weights(role, tensors)
        return tensors

    def fixed(self, name: str, value: Numbers) -> Numbers:
        self.args[name] = Fixed(value)
        return value

    def call(self, tag: str, fn: Callable[[Ops, dict[str, Any]], tuple[Any, ...]]) -> Any:
        """fn(ops, values by name) as one program; its results."""
        names = list(self.args)

        def program(ops: Ops, *values: Any) -> tuple[Any, ...]:
            return fn(ops, dict(zip(names, values)))

        return self.bench.call(("block", tag), program, self.args.values())

    def judge(
        self, op: str, out: Any, exact: Numbers, noise: Numbers, where: str, **how: Any
    ) -> None:
        """Of the sound rows."""
        size = min(len(exact), TOKENS - PADDING)
        with np.errstate(invalid="ignore"):
            self.bench.judge(op, out[:size], exact[:size], noise[:size], where=where, **how)


def _sound(x: Numbers) -> Numbers:
    return x[: TOKENS - PADDING]


# ---------------------------------------------------------------- embeddings and products
def products(target: Target, seed: int) -> Evidence:
    block = Block(Bench(target), rng_of("ops.block.products", seed))
    rng, ratio = block.rng, block.bench.ratio
    x = block.rows("x", LONG + HIDDEN)
    left, right = x[:, 5 : 5 + HIDDEN], x[:, -HIDDEN:]
    square = [block.weights(f"w{i}", "linear", HIDDEN, HIDDEN, bias=True) for i in range(2)]
    long = block.weights("long", "linear", 41, LONG)
    head = block.weights("head", "linear", VOCAB, HIDDEN, bias=True)
    table = np.outer(rng.normal(size=IDS), rng.normal(size=3)) + rng.normal(size=(IDS, 1))
    table = block.bench.round(table)
    block.args["table"] = Weights("embedding", {"weight": table})
    ids = [block.fixed(f"ids{i}", rng.integers(0, IDS, TOKENS).astype(np.int32)) for i in range(2)]
    ids[0][:2], ids[1][-1] = (IDS - 1, 32_768), 0

    def fn(ops: Ops, v: dict[str, Any]) -> tuple[Any, ...]:
        a, b = v["x"][:, 5 : 5 + HIDDEN], v["x"][:, -HIDDEN:]
        return (
            *(ops.embed(v[name], v["table"]) for name in ("ids0", "ids1")),
            *(ops.linear(y, v[name]) for name in ("w0", "w1") for y in (a, b)),
            *(ops.linear(a[:n], v["w0"]) for n in range(1, FEW + 1)),
            *(ops.linear(y, v["long"]) for y in (v["x"][:, :LONG], v["x"][:, 7 : 7 + LONG])),
            *(ops.logits(y, v["head"]) for y in (a, b)),
        )

    found = list(block.call("products", fn))
    for which in ids:
        block.bench.equal(
            found.pop(0), table[which], f"embed from {IDS} rows", axes=("token", "dim")
        )

    def linear(y: Numbers, own: dict[str, Numbers], where: str) -> None:
        y, pair = _sound(y), (own["weight"], own.get("bias"))
        exact, noise = oracle.linear(y, *pair), oracle.noise_linear(y, *pair, ratio=ratio)
        block.judge("linear", found.pop(0), exact, noise, where, by_class=True, axes=_OUTPUTS)

    for own in square:
        for name, y in (("first", left), ("last", right)):
            linear(y, own, f"of the {name} columns by square weights with a bias")
    for n in range(1, FEW + 1):
        linear(left[:n], square[0], f"of {n} rows with a bias")
    for at in (0, 7):
        linear(x[:, at : at + LONG], long, f"of {LONG} columns from {at}")
    for y in (left, right):
        y, is_16_bit = _sound(y), block.bench.is_16_bit
        exact = oracle.linear(y, head["weight"], head["bias"])
        noise = oracle.noise_logits(y, head["weight"], head["bias"], is_16_bit=is_16_bit)
        op = "logits/16" if is_16_bit else "logits"
        how = {"single": True, "by_class": True, "axes": _OUTPUTS}
        block.judge(op, found.pop(0), exact, noise, "of columns, with a bias", **how)
    return block.bench.done()


_OUTPUTS = ("token", "output")


# ---------------------------------------------------------------- norms and rotations
FREQUENCIES = tuple(
    (base ** -(np.arange(HALF) / HALF)).astype(np.float32) for base in (1e4, 5e5, 1e4)
)
SCALES = (1.0, 1.0, float(np.float32(1.2079)))


def rows(target: Target, seed: int) -> Evidence:
    """Norms of tokens and of heads, and rotations of heads by three tables of one length."""
    block = Block(Bench(target), rng_of("ops.block.rows", seed))
    x, residual = block.rows("x", 2 * HIDDEN + 9), block.rows("residual", HIDDEN + 1)
    scales = [block.weights(f"n{i}", "norm", HIDDEN)["weight"] for i in range(2)]
    heads = [block.weights(f"h{i}", "norm", DIM)["weight"] for i in range(2)]
    layers = [block.weights(f"l{i}", "norm", HIDDEN, bias=True) for i in range(2)]
    positions = block.rng.integers(0, 131_072, TOKENS).astype(np.int32)
    positions[[3, 64]] = 131_071, 4096
    block.fixed("positions", positions)
    parts = (slice(0, HIDDEN), slice(HIDDEN + 5, 2 * HIDDEN + 5))

    def fn(ops: Ops, v: dict[str, Any]) -> tuple[Any, ...]:
        one, two = (v["x"][:, part] for part in parts)
        three = [y.reshape(TOKENS, HEADS, DIM) for y in (one, two)]
        r = v["residual"][:, 1:]
        tables = [ops.rope_table(v["positions"], f, s) for f, s in zip(FREQUENCIES, SCALES)]
        added = [ops.add_rms_norm(y, r, v[f"n{i}"], EPS[i]) for i, y in enumerate((one, two))]
        return (
            *(ops.rms_norm(y, v[f"n{i}"], EPS[i]) for i, y in enumerate((one, two))),
            *(ops.rms_norm(y, v[f"h{i}"], EPS[i]) for i, y in enumerate(three)),
            *(part for pair in added for part in pair),
            *(ops.layer_norm(y, v[f"l{i}"], EPS[i]) for i, y in enumerate((one, two))),
            *(part for pair in tables for part in pair),
            *(ops.rope(y, *tables[t]) for t in (1, 0, 2) for y in three),
        )

    found = list(block.call("rows", fn))
    ratio = block.bench.ratio
    both = [_sound(x[:, part]) for part in parts]
    three = [y.reshape(len(y), HEADS, DIM) for y in both]

    def judge(op: str, exact: Any, noise: Any, where: str, **how: Any) -> None:
        block.judge(op, found.pop(0), exact, noise, where, **how)

    for y, scale, eps in (*zip(both, scales, EPS), *zip(three, heads, EPS)):
        given = y, scale, eps
        exact, noise = oracle.rms_norm(*given), oracle.noise_rms_norm(*given, ratio=ratio)
        judge("rms_norm", exact, noise, f"of columns, {'by head' if y.ndim == 3 else 'by token'}")
    for y, scale, eps in zip(both, scales, EPS):
        more = y, _sound(residual[:, 1:]), scale, eps
        pair = oracle.add_rms_norm(*more), oracle.noise_add_rms_norm(*more, ratio=ratio)
        for op, exact, noise in zip(("add_rms_norm", "residual_sum"), *pair):
            judge(op, exact, noise, "of columns")
    for y, own, eps in zip(both, layers, EPS):
        args = y, own["weight"], own["bias"], eps
        judge(
            "layer_norm",
            oracle.layer_norm(*args),
            oracle.noise_layer_norm(*args, ratio=ratio),
            "of columns",
        )
    _judge_rotations(block, found, positions, three)
    return block.bench.done()


def _judge_rotations(
    block: Block, found: list[Any], positions: Numbers, heads: list[Numbers]
) -> None:
    """Three tables, then the heads of both columns by each."""
    tables = [[found.pop(0) for _ in range(2)] for _ in SCALES]
    for table, f, s in zip(tables, FREQUENCIES, SCALES):
        angles = positions, f, s
        pairs = zip(table, oracle.rope_table(*angles), oracle.noise_rope_table(*angles))
        for out, exact, noise in pairs:
            block.judge("rope_table", out, exact, noise, "one of three", single=True)
    for t in (1, 0, 2):
        cos, sin = (_sound(wide(part)) for part in tables[t])
        for y in heads:
            exact = oracle.rope(y, cos, sin)
            noise = oracle.noise_rope(y, cos, sin, ratio=block.bench.ratio)
            where, axes = f"by table {t} of three", ("token", "head", "dim")
            block.judge("rope", found.pop(0), exact, noise, where, axes=axes)


# ---------------------------------------------------------------- activations and experts
def experts(target: Target, seed: int) -> Evidence:
    """Activations alone and gated; routes and experts of two layers. Padding holds NaN."""
    block = Block(Bench(target), rng_of("ops.block.experts", seed))
    rng, ratio, live = block.rng, block.bench.ratio, TOKENS - PADDING
    gates, x = block.gates("gates", 4 * INNER + 3), block.rows("x", 48)
    x = block.bench.round(np.where(np.abs(x) > 100, x / 3e4, x))
    block.args["x"] = Activation(x)
    routers = [_router(block, f"r{i}") for i in range(2)]
    valid = block.fixed("valid", np.arange(TOKENS) < live)
    ids, shares = [], []
    for i in range(2):
        chosen = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
        own = rng.dirichlet(np.ones(TOP_K), TOKENS).astype(np.float32)
        chosen[live:], own[live:] = EXPERTS, 0
        ids.append(block.fixed(f"ids{i}", chosen.astype(np.int32)))
        shares.append(block.fixed(f"shares{i}", own))
    up = [block.weights(f"up{i}", "experts", EXPERTS, 34, 24)["weight"] for i in range(2)]
    down = [block.weights(f"down{i}", "experts", EXPERTS, 24, 17)["weight"] for i in range(2)]
    parts = (slice(1, 1 + 2 * INNER), slice(2 * INNER + 2, 4 * INNER + 2))

    def fn(ops: Ops, v: dict[str, Any]) -> tuple[Any, ...]:
        some = [v["gates"][:, part] for part in parts]
        routes = [ops.moe_route(v[f"r{i}"], TOP_K, i == 0, v["valid"]) for i in range(2)]
        mixed = [
            ops.moe_experts(
                v["x"][:, 24 * i : 24 * i + 24],
                v[f"ids{i}"],
                v[f"shares{i}"],
                v[f"up{i}"],
                v[f"down{i}"],
            )
            for i in range(2)
        ]
        return (
            *(ops.silu_and_mul(y) for y in some),
            *(ops.gelu_and_mul(y) for y in some),
            *(ops.activation(y, kind) for kind in oracle.KINDS for y in some),
            *(part for pair in routes for part in pair),
            *mixed,
        )

    found = list(block.call("experts", fn))
    _judge_gates(block, found, [_sound(gates[:, part]) for part in parts])
    for i, logits in enumerate(routers):
        want, p = oracle.moe_route(logits, TOP_K, i == 0, valid)
        chosen = found.pop(0)
        told = f"moe_route {i}: ids are {chosen.dtype}, promised is int32"
        require(chosen.dtype.name == "int32", told)
        block.bench.equal(chosen, want, f"moe_route {i}: experts", axes=("token", "choice"))
        noise = oracle.noise_moe_route(logits, p)
        block.bench.judge("moe_route", found.pop(0), p, noise, where=f"{i}", single=True)
    for i in range(2):
        given = (
            x[:live, 24 * i : 24 * i + 24],
            ids[i][:live],
            wide(shares[i])[:live],
            up[i],
            down[i],
        )
        exact, noise = oracle.moe_experts(*given), oracle.noise_moe_experts(*given, ratio=ratio)
        out = found.pop(0)
        none = np.zeros((PADDING, out.shape[1]))
        what = f"moe_experts {i}: tokens of no expert, whose inputs are NaN or Inf, get 0"
        block.bench.equal(out[live:], none, what, axes=("padding token", "channel"))
        block.judge("moe_experts", out, exact, noise, f"of layer {i}", by_class=True)
    return block.bench.done()


def _judge_gates(block: Block, found: list[Any], some: list[Numbers]) -> None:
    """Takes its results from the front of `found`."""
    ratio = block.bench.ratio
    for op, kind in (("silu_and_mul", "silu"), ("gelu_and_mul", "gelu_tanh")):
        for y in some:
            exact, noise = oracle.gated(y, kind), oracle.noise_gated(y, kind, ratio=ratio)
            block.judge(op, found.pop(0), exact, noise, "of columns")
    for kind in oracle.KINDS:
        for y in some:
            exact, noise = oracle.activation(y, kind), oracle.noise_activation(y, kind, ratio=ratio)
            block.judge("activation", found.pop(0), exact, noise, f"{kind} of columns")


def _router(block: Block, name: str) -> Numbers:
    """Logits of full mantissas, none near another; some rows tie, and some stand above 88, where
    exp overflows."""
    rng = block.rng
    x = np.stack([rng.permutation(EXPERTS) for _ in range(TOKENS)]) * 0.7
    x = x + rng.uniform(-0.2, 0.2, x.shape) - 4
    x[::5] = np.round(x[::5] / 3)
    x[2::7] += rng.choice([104, -150])
    x = block.bench.round(x)
    block.args[name] = Activation(x)
    return x


_CORE = frozenset({"core"})

CASES: tuple[Case, ...] = (
    Case(
        "ops.block.products",
        "multiplies and embeds twice in one program, square and few-row products too",
        products,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.block.rows",
        "norms and rotates columns twice in one program, twelve heads by three tables",
        rows,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.block.experts",
        "activates, routes and mixes experts twice in one program; padding holds NaN",
        experts,
        _CORE,
        every_dtype=True,
    ),
)

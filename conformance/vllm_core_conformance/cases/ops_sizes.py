"""Cases: every op of a decoder block at the sizes where devices change their way: one token, two, a
prompt of more than one tile or grid of rows; rows wider than a group of threads; hundreds of
experts.

Small steps call each op several times on other rows, so that the error that a row has in common
evens out.

Knows: sizes at which kernels switch. Does not know: what any op computes (oracle).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence
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

EPS = 1e-5
EXPERT_INNER = 9


@dataclass(frozen=True)
class Size:
    """One step, and how often each op is called on rows of its own."""

    name: str
    says: str
    tokens: int
    calls: int
    width: int
    inner: int
    outputs: int
    heads: int
    dim: int
    experts: int
    top_k: int
    mixed: int
    """Width of what the experts mix."""

    @property
    def rows(self) -> int:
        return self.tokens * self.calls

    def parts(self, x: Any) -> list[Any]:
        """The rows of each call."""
        return [x[i : i + self.tokens] for i in range(0, self.rows, self.tokens)]


SIZES = (
    Size("one_token", "one token", 1, 8, 1100, 1063, 70, 33, 64, 260, 8, 26),
    Size("two_tokens", "two tokens", 2, 5, 4104, 4111, 33, 40, 72, 60, 4, 1100),
    Size("prompt", "a prompt of 301 tokens", 301, 1, 104, 75, 41, 6, 32, 33, 6, 44),
    Size("long_prompt", "a prompt of 1,031 tokens", 1031, 1, 40, 33, 19, 3, 16, 9, 2, 23),
)


class Step:
    """Arguments of one size on the host, in the order of the program."""

    def __init__(self, target: Target, size: Size, rng: np.random.Generator) -> None:
        self.bench, self.size, self.rng = Bench(target), size, rng
        bench, n = self.bench, size.rows
        most = target.caps.max_logit_rows or size.tokens
        self.logit_rows = min(most, size.tokens)
        scales = rng.choice([1e-2, 1.0, 1.0, 30.0], (n, 1))
        self.x = bench.round(rng.normal(size=(n, size.width)) * scales)
        self.residual = bench.round(rng.normal(size=(n, size.width)) * scales)
        gates = np.clip(arguments(rng, n, 2 * size.inner, "float16"), -240, 240)
        self.gates = bench.round(gates)
        self.heads = bench.round(rng.normal(size=(n, size.heads, size.dim)))
        self.positions = rng.integers(0, 131_072, n).astype(np.int32)
        frequency = 5e5 ** -(np.arange(size.dim // 2) / (size.dim // 2))
        self.frequency = frequency.astype(np.float32)
        self.ids = rng.integers(0, size.outputs, n).astype(np.int32)
        order = np.stack([rng.permutation(size.experts) for _ in range(n)])
        logits = order * 0.09 + rng.uniform(-0.02, 0.02, order.shape)
        # a step of 16 bits between any two of them
        self.router = bench.round(np.round(logits * 64) / 64 if bench.is_16_bit else logits)
        self.chosen = order[:, : size.top_k].astype(np.int32)
        self.shares = rng.dirichlet(np.ones(size.top_k), n).astype(np.float32)
        self.mixed = bench.round(rng.normal(size=(n, size.mixed)))
        self.linear = self._tensors(size.outputs, size.width, bias=True)
        self.table = self._tensors(size.outputs, size.width)
        self.norm = bench.round(1 + 0.4 * rng.normal(size=size.width))
        self.norm_bias = bench.round(rng.normal(size=size.width))
        self.up = bench.round(weight(rng, size.experts, 2 * EXPERT_INNER, size.mixed))
        self.down = bench.round(weight(rng, size.experts, size.mixed, EXPERT_INNER))

    def _tensors(self, rows: int, columns: int, *, bias: bool = False) -> dict[str, Numbers]:
        tensors = {"weight": self.bench.round(weight(self.rng, rows, columns))}
        if bias:
            tensors["bias"] = self.bench.round(self.rng.normal(size=rows))
        return tensors

    def arguments(self) -> dict[str, Arg]:
        norm = {"weight": self.norm}
        return {
            "x": Activation(self.x),
            "residual": Activation(self.residual),
            "gates": Activation(self.gates),
            "heads": Activation(self.heads),
            "positions": Fixed(self.positions),
            "ids": Fixed(self.ids),
            "router": Activation(self.router),
            "valid": Fixed(np.ones(self.size.rows, bool)),
            "chosen": Fixed(self.chosen),
            "shares": Fixed(self.shares),
            "mixed": Activation(self.mixed),
            "linear": Weights("linear", self.linear),
            "table": Weights("embedding", self.table),
            "norm": Weights("norm", norm),
            "layer_norm": Weights("norm", norm | {"bias": self.norm_bias}),
            "up": Weights("experts", {"weight": self.up}),
            "down": Weights("experts", {"weight": self.down}),
        }

    # ---- on the device
    def run(self) -> dict[str, list[Any]]:
        """Results by op, those of its calls joined."""
        size, args = self.size, self.arguments()
        names, num_logits, frequency = list(args), self.logit_rows, self.frequency

        def fn(ops: Ops, *values: Any) -> tuple[Any, ...]:
            v = dict(zip(names, values))
            calls = zip(*(size.parts(v[name]) for name in PER_TOKEN))
            found: list[Any] = []
            for own in calls:
                found += _call(ops, dict(zip(PER_TOKEN, own)), v, frequency, num_logits, size.top_k)
            return tuple(found)

        # the frequencies are the size's own, and so is the number of logit rows the backend's
        found = self.bench.call(("sizes", size.name), fn, args.values())
        each = len(found) // size.calls
        columns = [found[i::each] for i in range(each)]
        joined = [np.concatenate([np.asarray(part) for part in column]) for column in columns]
        return {name: [joined.pop(0) for _ in range(count)] for name, count in RESULTS.items()}

    # ---- judgement
    def exact(self) -> Iterator[tuple[str, str, Numbers, Numbers]]:
        """(op, its name in the limits, exact, noise) of the results that are judged alike."""
        ratio, size = self.bench.ratio, self.size
        product = self.x, self.linear["weight"], self.linear["bias"]
        yield (
            "linear",
            "linear",
            oracle.linear(*product),
            oracle.noise_linear(*product, ratio=ratio),
        )
        scaled = self.x, self.norm, EPS
        exact, noise = oracle.rms_norm(*scaled), oracle.noise_rms_norm(*scaled, ratio=ratio)
        yield "rms_norm", "rms_norm", exact, noise
        layer = self.x, self.norm, self.norm_bias, EPS
        exact, noise = oracle.layer_norm(*layer), oracle.noise_layer_norm(*layer, ratio=ratio)
        yield "layer_norm", "layer_norm", exact, noise
        for op, kind in (("silu_and_mul", "silu"), ("gelu_and_mul", "gelu_tanh")):
            exact = oracle.gated(self.gates, kind)
            yield op, op, exact, oracle.noise_gated(self.gates, kind, ratio=ratio)
        for kind in oracle.KINDS:
            exact = oracle.activation(self.gates, kind)
            noise = oracle.noise_activation(self.gates, kind, ratio=ratio)
            yield kind, "activation", exact, noise
        given = self.mixed, self.chosen, wide(self.shares), self.up, self.down
        exact, noise = oracle.moe_experts(*given), oracle.noise_moe_experts(*given, ratio=ratio)
        yield f"{size.top_k} of {size.experts} experts", "moe_experts", exact, noise

    def judge(self) -> Evidence:
        bench, size, found = self.bench, self.size, self.run()
        axes = ("token", "channel")
        for name, op, exact, noise in self.exact():
            key = op if op != "activation" else name
            where, by_class = f"{name} of {size.says}", op in ("linear", "moe_experts")
            bench.judge(op, found[key][0], exact, noise, where=where, axes=axes, by_class=by_class)
        what = f"embed of {size.says}, rows of {size.width}"
        bench.equal(found["embed"][0], self.table["weight"][self.ids], what, axes=axes)
        self._judge_added(*found["add_rms_norm"])
        self._judge_logits(found["logits"][0])
        self._judge_rotation(*found["rope_table"], *found["rope"])
        self._judge_route(*found["moe_route"])
        return bench.done()

    def _judge_added(self, out: Any, total: Any) -> None:
        """The norm is of the sum as the device has it, which its compiler may hold unrounded."""
        given = self.x, self.residual, self.norm, EPS
        exact = oracle.add_rms_norm(*given)
        noise = oracle.noise_add_rms_norm(*given, ratio=self.bench.ratio)
        for op, got, e, n in zip(("add_rms_norm", "residual_sum"), (out, total), exact, noise):
            self.bench.judge(op, got, e, n, where=f"of {self.size.says}", axes=("token", "channel"))

    def _judge_logits(self, out: Any) -> None:
        rows = np.concatenate([part[: self.logit_rows] for part in self.size.parts(self.x)])
        bench, product = self.bench, (rows, self.linear["weight"], self.linear["bias"])
        noise = oracle.noise_logits(*product, is_16_bit=bench.is_16_bit)
        bench.judge(
            "logits/16" if bench.is_16_bit else "logits",
            out,
            oracle.linear(*product),
            noise,
            where=f"of {self.size.says}",
            axes=("token", "output"),
            single=True,
            by_class=True,
        )

    def _judge_rotation(self, cos: Any, sin: Any, out: Any) -> None:
        angles = self.positions, self.frequency, 1.0
        exact, noise = oracle.rope_table(*angles), oracle.noise_rope_table(*angles)
        for got, e, n in zip((cos, sin), exact, noise):
            where = f"of {self.size.says}"
            self.bench.judge("rope_table", got, e, n, where=where, single=True)
        table = wide(cos), wide(sin)
        exact_out = oracle.rope(self.heads, *table)
        noise_out = oracle.noise_rope(self.heads, *table, ratio=self.bench.ratio)
        where, axes = f"of {self.size.says}", ("token", "head", "dim")
        self.bench.judge("rope", out, exact_out, noise_out, where=where, axes=axes)

    def _judge_route(self, chosen: Any, shares: Any) -> None:
        size, valid = self.size, np.ones(self.size.rows, bool)
        want, exact = oracle.moe_route(self.router, size.top_k, True, valid)
        what = f"moe_route of {size.says}: {size.top_k} of {size.experts} experts"
        self.bench.equal(chosen, want, what, axes=("token", "choice"))
        noise = oracle.noise_moe_route(self.router, exact)
        self.bench.judge("moe_route", shares, exact, noise, where=f"of {size.says}", single=True)


PER_TOKEN = (
    "x residual gates heads positions ids router valid chosen shares mixed".split()
)  # arguments with a row per token
RESULTS = {
    "embed": 1,
    "linear": 1,
    "logits": 1,
    "rms_norm": 1,
    "add_rms_norm": 2,
    "layer_norm": 1,
    "rope_table": 2,
    "rope": 1,
    "silu_and_mul": 1,
    "gelu_and_mul": 1,
    **dict.fromkeys(oracle.KINDS, 1),
    "moe_route": 2,
    "moe_experts": 1,
}
"""Op -> how many results, in the order of a call."""


def _call(
    ops: Ops, own: dict[str, Any], v: dict[str, Any], frequency: Numbers, logits: int, top_k: int
) -> list[Any]:
    """Each op once, on a call's own rows."""
    x, gates = own["x"], own["gates"]
    table = ops.rope_table(own["positions"], frequency, 1.0)
    return [
        ops.embed(own["ids"], v["table"]),
        ops.linear(x, v["linear"]),
        ops.logits(x[:logits], v["linear"]),
        ops.rms_norm(x, v["norm"], EPS),
        *ops.add_rms_norm(x, own["residual"], v["norm"], EPS),
        ops.layer_norm(x, v["layer_norm"], EPS),
        *table,
        ops.rope(own["heads"], *table),
        ops.silu_and_mul(gates),
        ops.gelu_and_mul(gates),
        *(ops.activation(gates, kind) for kind in oracle.KINDS),
        *ops.moe_route(own["router"], top_k, True, own["valid"]),
        ops.moe_experts(own["mixed"], own["chosen"], own["shares"], v["up"], v["down"]),
    ]


def _case(size: Size) -> Case:
    case_id = f"ops.sizes.{size.name}"

    def run(target: Target, seed: int) -> Evidence:
        return Step(target, size, rng_of(case_id, seed)).judge()

    says = f"each op is right on {size.says}, in rows of {size.width}"
    return Case(case_id, says, run, frozenset({"core"}), every_dtype=True)


CASES: tuple[Case, ...] = tuple(_case(size) for size in SIZES)

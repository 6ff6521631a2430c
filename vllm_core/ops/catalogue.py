"""Every op that carries numbers: its law, inputs that hurt, and how much noise is honest.

Tests, the conformance suite and docs/ops.md derive from `OPS`. An error is judged in units of the
op's own first-order
noise: z = |o - o64| / (u * n), with o64 the law in float64 on exactly the bits that the binding
consumed, u the unit roundoff of the output's dtype and n the op's noise at that element. Results
below the smallest normal number may be flushed to 0, so that much is added to u * n.

Knows: ops, inputs, noise, limits. Does not know: bindings, test frameworks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from vllm_core.ops import cases, reference, sampling, stepping
from vllm_core.ops.arrays import HostArray
from vllm_core.ops.cases import Case
from vllm_core.ops.interface import Ops

ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
}


@dataclass(frozen=True)
class Limits:
    """Largest z, and root of the mean square of z over all cases of an op."""

    rms: float
    max: float


Law = Callable[..., tuple[HostArray, ...]]
"""reference(*host arguments) -> results; noise(ratio, *host arguments) -> n of each result, ratio =
u32 / u."""


@dataclass(frozen=True)
class Op:
    """One op of the contract. Integer results are compared exactly; so are ops without limits."""

    name: str
    owner: str = "Ops"
    """Which interface it is a method of."""
    reference: Law | None = None
    inputs: Callable[[np.random.Generator], Iterator[Case]] | None = None
    noise: Law | None = None
    noise_text: str = "exact"
    limits: Limits | None = None
    limits_16: Limits | None = None
    """Where they differ for models of 16 bits."""
    float32_out: bool = False
    """Its results are float32 whatever the model's dtype."""
    tested_in: str = "bindings/test_catalogue.py"
    """Below vllm_core/tests."""

    @property
    def doc(self) -> str:
        """The method's docstring, or that of the function which it calls."""
        text = inspect.getdoc(getattr(Ops, self.name, None)) or ""
        if text.startswith("See "):
            module, _, name = text.split()[1].rstrip(".;").partition(".")
            text = (
                inspect.getdoc(getattr({"sampling": sampling, "stepping": stepping}[module], name))
                or ""
            )
        return text

    def limits_for(self, dtype: str) -> Limits | None:
        """In a model of this dtype."""
        return (
            self.limits_16 if self.limits_16 and dtype in ("bfloat16", "float16") else self.limits
        )


def z_of(out: HostArray, exact: HostArray, noise: HostArray, dtype: str) -> HostArray:
    """Errors in units of the noise; NaN equals nothing and is infinitely wrong."""
    error = np.abs(out.astype(np.float64) - exact)
    z = error / (ROUNDOFF[dtype] * noise + SMALLEST_NORMAL[dtype])
    same = (out == exact) | (np.isnan(out) & np.isnan(exact))
    return np.where(same, 0.0, np.where(np.isnan(z), np.inf, z))


# ---------------------------------------------------------------- laws and their noise
def _of(params: Mapping[str, HostArray]) -> tuple[HostArray, HostArray | None]:
    return params["weight"], params.get("bias")


def _embed(ids: HostArray, params: Mapping[str, HostArray]) -> tuple[HostArray, ...]:
    return (params["weight"][ids],)


def _linear(x: HostArray, params: Mapping[str, HostArray]) -> tuple[HostArray, ...]:
    return (reference.linear(x, *_of(params)),)


def _linear_noise(
    ratio: float, x: HostArray, params: Mapping[str, HostArray]
) -> tuple[HostArray, ...]:
    out = np.abs(_linear(x, params)[0])
    return (out + ratio * _sum_noise(x, params["weight"]),)


def _sum_noise(x: HostArray, weight: HostArray) -> HostArray:
    """Of a float32 sum of k products: sqrt(k) * sqrt(sum a^2 b^2)."""
    return np.asarray(np.sqrt(x.shape[-1] * ((x * x) @ (weight * weight).T)))


def _rms_norm(x: HostArray, params: Mapping[str, HostArray], eps: float) -> tuple[HostArray, ...]:
    return (reference.rms_norm(x, params["weight"], eps),)


FLUSHED = 2.0**-102
"""(u32/u) times this is what an input may lose that is flushed to 0, in units of u."""


def _rms_norm_noise(
    ratio: float, x: HostArray, params: Mapping[str, HostArray], eps: float
) -> tuple[HostArray, ...]:
    scale = np.abs(params["weight"]) / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    return (np.abs(x) * scale + ratio * FLUSHED * scale,)


def _add_rms_norm(
    x: HostArray, residual: HostArray, params: Mapping[str, HostArray], eps: float
) -> tuple[HostArray, ...]:
    total = x + residual
    return reference.rms_norm(total, params["weight"], eps), total


def _add_rms_norm_noise(
    ratio: float, x: HostArray, residual: HostArray, params: Mapping[str, HostArray], eps: float
) -> tuple[HostArray, ...]:
    total = x + residual
    return (*_rms_norm_noise(ratio, total, params, eps), np.abs(total))


def _layer_norm(x: HostArray, params: Mapping[str, HostArray], eps: float) -> tuple[HostArray, ...]:
    return (reference.layer_norm(x, *_of(params), eps),)


def _layer_norm_noise(
    ratio: float, x: HostArray, params: Mapping[str, HostArray], eps: float
) -> tuple[HostArray, ...]:
    weight, bias = _of(params)
    scale = np.abs(weight) / np.sqrt(np.var(x, -1, keepdims=True) + eps)
    offset = np.mean(np.abs(x), -1, keepdims=True)  # the mean is subtracted in float32
    out = np.abs(_layer_norm(x, params, eps)[0]) + ratio * (offset + FLUSHED) * scale
    return (out if bias is None else out + np.abs(bias),)


def _rope_table(positions: HostArray, frequency: HostArray, scale: float) -> tuple[HostArray, ...]:
    angle = (positions.astype(np.float32)[:, None] * frequency).astype(np.float64)
    factor = np.float64(np.float32(scale))
    return np.cos(angle) * factor, np.sin(angle) * factor


def _rope_table_noise(
    ratio: float, positions: HostArray, frequency: HostArray, scale: float
) -> tuple[HostArray, ...]:
    n = np.full((len(positions), len(frequency)), scale)
    return n, n


def _rope(x: HostArray, cos: HostArray, sin: HostArray) -> tuple[HostArray, ...]:
    return (reference.rope(x, cos, sin),)


def _rope_noise(
    ratio: float, x: HostArray, cos: HostArray, sin: HostArray
) -> tuple[HostArray, ...]:
    half, x = cos.shape[-1], np.abs(x)
    c, s = np.abs(cos)[:, None], np.abs(sin)[:, None]
    a, b = x[..., :half], x[..., half : 2 * half]
    return (np.concatenate((a * c + b * s, b * c + a * s, x[..., 2 * half :]), -1),)


def _slope(x: HostArray, kind: str) -> HostArray:
    """f'(x) by a central difference: noise needs two digits."""
    step = 1e-5 * np.maximum(1, np.abs(x))
    high, low = reference.activation(x + step, kind), reference.activation(x - step, kind)
    return np.asarray((high - low) / (2 * step))


def _activation(x: HostArray, kind: str) -> tuple[HostArray, ...]:
    with np.errstate(over="ignore"):
        return (reference.activation(x, kind),)


def _activation_noise(ratio: float, x: HostArray, kind: str) -> tuple[HostArray, ...]:
    with np.errstate(over="ignore"):
        n = np.abs(reference.activation(x, kind)) + ratio * np.abs(x * _slope(x, kind))
    if kind.startswith("gelu"):
        n = n + ratio * np.abs(x) / 2  # 1 + erf and 1 + tanh cancel below 0
    return (n + ratio * FLUSHED * (1 + np.abs(x)),)  # exp(x) may be flushed before it meets x


def _gated(kind: str) -> Law:
    def law(x: HostArray) -> tuple[HostArray, ...]:
        half = x.shape[-1] // 2
        return (_activation(x[:, :half], kind)[0] * x[:, half:],)

    return law


def _gated_noise(kind: str) -> Law:
    def noise(ratio: float, x: HostArray) -> tuple[HostArray, ...]:
        half = x.shape[-1] // 2
        return (_activation_noise(ratio, x[:, :half], kind)[0] * np.abs(x[:, half:]),)

    return noise


def _gated_linear(
    x: HostArray, params: Mapping[str, HostArray], kind: str
) -> tuple[HostArray, ...]:
    return _gated(kind)(_linear(x, params)[0])


def _gated_linear_noise(
    ratio: float, x: HostArray, params: Mapping[str, HostArray], kind: str
) -> tuple[HostArray, ...]:
    """Of gate and up, each rounded or not, through the gate."""
    both, noise = _linear(x, params)[0], _linear_noise(ratio, x, params)[0]
    half = both.shape[-1] // 2
    with np.errstate(over="ignore"):
        gate, slope = reference.activation(both[:, :half], kind), _slope(both[:, :half], kind)
    of_gate = np.abs(slope * both[:, half:]) * noise[:, :half]
    return (_gated_noise(kind)(ratio, both)[0] + of_gate + np.abs(gate) * noise[:, half:],)


def _moe_route_noise(
    ratio: float, logits: HostArray, top_k: int, renormalize: bool, valid: HostArray
) -> tuple[HostArray, ...]:
    ids, shares = reference.moe_route(logits, top_k, renormalize, valid)
    depth = 1 + np.ptp(logits, -1, keepdims=True)
    return ids, shares * depth


def _moe_experts(
    x: HostArray,
    ids: HostArray,
    shares: HostArray,
    gate_up: Mapping[str, HostArray],
    down: Mapping[str, HostArray],
) -> tuple[HostArray, ...]:
    return (reference.moe_experts(x, ids, shares, gate_up["weight"], down["weight"]),)


def _moe_experts_noise(
    ratio: float,
    x: HostArray,
    ids: HostArray,
    shares: HostArray,
    gate_up: Mapping[str, HostArray],
    down: Mapping[str, HostArray],
) -> tuple[HostArray, ...]:
    """Gate, up and the hidden values may be rounded to the model's dtype on the way."""
    n = np.zeros_like(x)
    for token, place in zip(*np.nonzero(ids < len(down["weight"]))):
        w1, w2 = (p["weight"][ids[token, place]] for p in (gate_up, down))
        row, half = x[token : token + 1], len(w1) // 2
        both = reference.linear(row, w1)
        error = np.abs(both) + ratio * _sum_noise(row, w1)
        gate, up = both[:, :half], both[:, half:]
        act = np.abs(reference.activation(gate, "silu"))
        hidden = _gated("silu")(both)[0]
        spread = (
            np.abs(hidden)
            + np.abs(_slope(gate, "silu") * up) * error[:, :half]
            + act * error[:, half:]
        )
        out = np.abs(reference.linear(hidden, w2)) + ratio * _sum_noise(hidden, w2)
        n[token] += shares[token, place] * (out + np.sqrt((spread**2) @ (w2**2).T))[0]
    return (n,)


# ---------------------------------------------------------------- the table
def _numeric(
    name: str,
    law: Law,
    inputs: Callable[[np.random.Generator], Iterator[Case]],
    noise: Law,
    text: str,
    limits: tuple[float, float],
    *,
    float32_out: bool = False,
    limits_16: Limits | None = None,
) -> Op:
    return Op(
        name,
        reference=law,
        inputs=inputs,
        noise=noise,
        noise_text=text,
        limits=Limits(*limits),
        limits_16=limits_16,
        float32_out=float32_out,
    )


SUM_NOISE = "|c| + (u32/u) sqrt(k) sqrt(sum a^2 b^2)"
TWO_HALVES = Limits(8, 128)
"""Logits of 16-bit operands may be kept as the sum of two 16-bit numbers: 16 bits of a float32, |c|
2^-17 off."""

# Limits fitted 2026-11 on numpy 2 (float32), torch 2.13 CPU and jax 0.10 CPU (float32 and
# bfloat16), x86-64, about one and a half times the worst of the five. Seen, rms / max: linear 0.34
# / 1.2, rms_norm 1.1 / 4.2, add_rms_norm 0.8 / 4.1, layer_norm 0.5 / 3.1, rope_table 0.4 / 1.4,
# rope 0.4 / 1.7, silu_and_mul 0.3 / 2.7, gelu_and_mul 0.3 / 2.6, activation 0.25 / 1.7, moe_route
# 0.1 / 0.4, moe_experts 0.16 / 0.6, logprobs max 0.6. Attention's are those of the design.
_NUMERIC = (
    Op("embed", reference=_embed, inputs=cases.embed_inputs),
    _numeric("linear", _linear, cases.linear_inputs, _linear_noise, SUM_NOISE, (0.5, 2.5)),
    _numeric(
        "logits",
        _linear,
        cases.linear_inputs,
        _linear_noise,
        SUM_NOISE,
        (0.5, 2.5),
        float32_out=True,
        limits_16=TWO_HALVES,
    ),
    _numeric("rms_norm", _rms_norm, cases.norm_inputs, _rms_norm_noise, "|y|", (1.5, 6)),
    _numeric(
        "add_rms_norm",
        _add_rms_norm,
        cases.add_norm_inputs,
        _add_rms_norm_noise,
        "|y|; |x + r|",
        (1.2, 6),
    ),
    _numeric(
        "layer_norm",
        _layer_norm,
        cases.layer_norm_inputs,
        _layer_norm_noise,
        "|y| + |bias| + (u32/u) mean|x| |weight| / deviation",
        (0.8, 5),
    ),
    _numeric(
        "rope_table",
        _rope_table,
        cases.rope_table_inputs,
        _rope_table_noise,
        "scale",
        (0.6, 2.5),
        float32_out=True,
    ),
    _numeric("rope", _rope, cases.rope_inputs, _rope_noise, "|x1 cos| + |x2 sin|", (0.6, 2.5)),
    _numeric(
        "silu_and_mul",
        _gated("silu"),
        cases.gated_inputs,
        _gated_noise("silu"),
        "(|f| + (u32/u) |x f'|) |up|",
        (0.5, 4),
    ),
    _numeric(
        "gelu_and_mul",
        _gated("gelu_tanh"),
        cases.gated_inputs,
        _gated_noise("gelu_tanh"),
        "(|f| + (u32/u) (|x f'| + |x| / 2)) |up|",
        (0.5, 4),
    ),
    _numeric(
        "gated_linear",
        _gated_linear,
        cases.gated_linear_inputs,
        _gated_linear_noise,
        "as the gate's, + |f' up| n(gate) + |f| n(up), n as of linear",
        (0.5, 4),
    ),
    _numeric(
        "activation",
        _activation,
        cases.activation_inputs,
        _activation_noise,
        "|f| + (u32/u) |x f'|, for gelu also (u32/u) |x| / 2",
        (0.42, 3),
    ),
    _numeric(
        "moe_route",
        reference.moe_route,
        cases.route_inputs,
        _moe_route_noise,
        "ids exact; p (1 + range of the logits)",
        (0.2, 1),
        float32_out=True,
    ),
    _numeric(
        "moe_experts",
        _moe_experts,
        cases.expert_inputs,
        _moe_experts_noise,
        "of both sums and of the hidden values rounded between them",
        (0.3, 1.5),
    ),
)

_STEPPING, _SAMPLING = "ops/test_stepping.py", "ops/test_sampling.py"
_ELSEWHERE = (
    Op(
        "attention",
        owner="AttentionBackend",
        noise_text="|o| + sqrt(sum p^2 v^2)",
        limits=Limits(0.42, 2.5),
        tested_in="bindings/test_*_attention.py",
    ),
    Op("expand", tested_in=_STEPPING),
    Op("apply", tested_in=_STEPPING),
    Op("advance", tested_in=_STEPPING),
    Op("sample", tested_in=_SAMPLING),
    Op("keep_top", tested_in=_SAMPLING),
    Op(
        "logprobs",
        noise_text="1 + |logit| + |lse|, in nats",
        limits=Limits(0.5, 2),
        float32_out=True,
        tested_in="ops/test_logprobs.py",
    ),
)

OPS: dict[str, Op] = {op.name: op for op in (*_NUMERIC, *_ELSEWHERE)}


def page() -> str:
    """The text of docs/ops.md."""
    lines = [
        "# Ops",
        "",
        "Made from the catalogue by `python -m vllm_core.ops.catalogue > docs/ops.md`.",
        "",
        "The error of a result is judged as z = |o - o64| / (u n): o64 the law in float64 on the",
        "bits that the binding consumed, u the unit roundoff of the result's dtype, u32 that of",
        "float32, n the noise below. Limits are (root mean square of z, largest z).",
    ]
    for op in OPS.values():
        lines += ["", f"## {op.name}", ""]
        if op.owner == "Ops":
            signature = str(inspect.signature(getattr(Ops, op.name))).replace("'", "")
            lines += [f"    {op.name}{signature}".replace("(self, ", "("), "", op.doc, ""]
        else:
            lines += [f"`{op.owner}.attend`; its docstring holds the formula.", ""]
        lines.append(f"- Noise: {op.noise_text}")
        if op.limits is not None:
            lines.append(f"- Limits: ({op.limits.rms:g}, {op.limits.max:g})")
        if op.limits_16 is not None:
            lines.append(
                f"- Limits in models of 16 bits: ({op.limits_16.rms:g}, {op.limits_16.max:g})"
            )
        lines.append(f"- Tested in: `vllm_core/tests/{op.tested_in}`")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())

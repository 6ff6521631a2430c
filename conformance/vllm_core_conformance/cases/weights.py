"""Cases: weights go to the device and come back with their bits, in whatever form they came.

Knows: parts, lazy arrays, layouts and dtypes of host arrays. Does not know: a backend's layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.errors import NotSupported, VllmCoreError
from vllm_core.ops import LazyArray, Param, ParamSpec, Part
from vllm_core_conformance.case import Case, Evidence, Failed, require
from vllm_core_conformance.cases.ops_call import Bench, rng_of
from vllm_core_conformance.oracle import ops as oracle
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Raised, Target, calling, numpy_dtype, round_to, wide

HOST_DTYPES = ("float32", "bfloat16", "float16")


def _stored(target: Target, x: Any, role: str) -> Any:
    """What the device must hold of a host array: the model dtype, norms at least float32."""
    if role == "norm" and target.dtype != "float64":
        return round_to(wide(x), "float32")
    return target.round(wide(x))


def _unloaded(
    target: Target, param: Param, wanted: dict[str, Any], role: str, what: str
) -> Evidence:
    with calling("unload"):
        found = target.runtime.unload(param)
    require(
        set(found) == set(wanted),
        f"{what}: unload gave {sorted(found)}, loaded were {sorted(wanted)}",
    )
    evidence = Evidence()
    for name, host in wanted.items():
        back = np.asarray(found[name])
        if role == "norm":
            allowed = {"float32", "float64"}
        else:
            allowed = {target.dtype}
        require(
            back.dtype.name in allowed,
            f"{what}: unload gave the {name} in {back.dtype}, expected {' or '.join(allowed)}",
        )
        exact = _stored(target, host, role)
        evidence += require_equal(wide(back), exact, f"{what}: {name} after load and unload")
        if back.flags.writeable:
            back[...] = 5  # what unload gave is the caller's own
    return evidence


def _host(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, shape)
    x.flat[0] = -0.0
    return x.astype(numpy_dtype(dtype))


ROLES: tuple[tuple[str, tuple[int, ...], bool], ...] = (
    ("linear", (7, 5), True),
    ("linear", (1, 1), False),
    ("linear", (48, 129), True),
    ("linear", (64, 32), False),
    ("embedding", (53, 11), False),
    ("norm", (37,), True),
    ("norm", (1,), False),
    ("experts", (3, 10, 7), False),
    ("experts", (4, 32, 16), False),
    ("experts", (5, 8, 8), False),
    ("linear", (9, 9), True),
)


def round_trip(target: Target, seed: int) -> Evidence:
    """Every role, every host dtype, odd sizes."""
    rng, evidence = rng_of("weights.load.round_trip", seed), Evidence()
    for role, shape, has_bias in ROLES:
        for dtype in HOST_DTYPES:
            tensors = {"weight": _host(rng, shape, dtype)}
            if has_bias:
                tensors["bias"] = _host(rng, shape[:1], dtype)
            what = f"{role} {list(shape)} from {dtype}"
            given = {name: np.array(x, order="F") for name, x in tensors.items()}
            param = target.load(ParamSpec("w", shape, role), [Part("dense", given, shape[0])])
            for host in given.values():
                host[...] = 3  # the loader's memory is its own again
            evidence += _unloaded(target, param, tensors, role, what)
    return evidence


def parts(target: Target, seed: int) -> Evidence:
    """Parts of 5, 1 and 58 rows, each in a dtype of its own, some lazy, join in their order; their
    biases too."""
    rng, bench = rng_of("weights.parts.order", seed), Bench(target)
    for turn, has_bias in enumerate((True, False)):
        for width in (9, 64):
            sizes = (5, 1, 58)
            dtypes = np.roll(HOST_DTYPES, turn + (width == 64)).tolist()
            hosts = [{"weight": _host(rng, (rows, width), d)} for rows, d in zip(sizes, dtypes)]
            if has_bias:
                for rows, dtype, tensors in zip(sizes, dtypes, hosts):
                    tensors["bias"] = _host(rng, (rows,), dtype)
            lazy = int(rng.integers(3))
            given = [
                Part("dense", _lazily(tensors) if place == lazy else tensors, rows)
                for place, (rows, tensors) in enumerate(zip(sizes, hosts))
            ]
            param = target.load(ParamSpec("qkv", (sum(sizes), width), "linear"), given)
            whole = {
                name: np.concatenate([wide(tensors[name]) for tensors in hosts])
                for name in hosts[0]
            }
            what = f"three parts of {sizes} rows{' with biases' if has_bias else ''}"
            bench.evidence += _unloaded(target, param, whole, "linear", what)
            _judge_linear(bench, rng, param, whole, what)
    return bench.done()


def _lazily(tensors: dict[str, Any]) -> dict[str, LazyArray]:
    return {
        name: LazyArray(x.shape, x.dtype.name, lambda x=x: x)  # type: ignore[misc]
        for name, x in tensors.items()
    }


def _judge_linear(
    bench: Bench, rng: np.random.Generator, param: Param, whole: dict[str, Any], what: str
) -> None:
    target = bench.target
    weight = _stored(target, whole["weight"], "linear")
    bias = None if "bias" not in whole else _stored(target, whole["bias"], "linear")
    x = target.round(rng.normal(size=(6, weight.shape[1])))
    ops = target.ops
    (out,) = target.call(
        ("weights", "linear"), lambda x, p: (ops.linear(x, p),), target.array(x), param
    )
    bench.judge(
        "linear",
        out,
        oracle.linear(x, weight, bias),
        oracle.noise_linear(x, weight, bias, ratio=bench.ratio),
        where=f"of {what}",
        axes=("token", "output"),
        by_class=True,
    )


def lazy_roles(target: Target, seed: int) -> Evidence:
    """Each role from lazy arrays, in two parts along axis 0; all tensors of a part are joined."""
    rng, evidence = rng_of("weights.parts.roles", seed), Evidence()
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("linear", (10, 7)),
        ("embedding", (11, 6)),
        ("norm", (9,)),
        ("experts", (5, 6, 3)),
    )
    for role, shape in shapes:
        cut = int(rng.integers(1, shape[0]))
        names = ("weight", "bias") if role in ("linear", "norm") else ("weight",)
        split = [
            {n: _host(rng, (rows, *(shape[1:] if n == "weight" else ())), dtype) for n in names}
            for rows, dtype in ((cut, "bfloat16"), (shape[0] - cut, "float32"))
        ]
        hosts = {name: np.concatenate([wide(piece[name]) for piece in split]) for name in names}
        pieces = [Part("dense", _lazily(piece), len(piece["weight"])) for piece in split]
        param = target.load(ParamSpec("w", shape, role), pieces)
        what = f"{role} {list(shape)} in lazy parts of {cut} and {shape[0] - cut}"
        evidence += _unloaded(target, param, hosts, role, what)
    return evidence


def layouts(target: Target, seed: int) -> Evidence:
    """Transposed, strided, reversed and read-only host arrays are read as numpy reads them."""
    rng, bench = rng_of("weights.load.layouts", seed), Bench(target)
    for dtype in HOST_DTYPES:
        base = _host(rng, (40, 66), dtype)
        read_only = base[:, :33].copy()
        read_only.setflags(write=False)
        for name, host in (
            ("transposed", base.T),
            ("strided", base[::3, 1::2]),
            ("reversed", base[::-1, ::-1]),
            ("read-only", read_only),
            ("Fortran order", np.asfortranarray(base)),
        ):
            part = Part("dense", {"weight": host}, len(host))
            param = target.load(ParamSpec("w", host.shape, "linear"), [part])
            what = f"a {name} {dtype} array"
            bench.evidence += _unloaded(target, param, {"weight": host}, "linear", what)
            _judge_linear(bench, rng, param, {"weight": wide(host)}, what)
    return bench.done()


def no_alias(target: Target, seed: int) -> Evidence:
    """The loader's memory is its own again once load returned; what unload gave is the caller's."""
    rng, bench = rng_of("weights.load.alias", seed), Bench(target)
    for role, shape in (("linear", (33, 17)), ("embedding", (33, 17)), ("norm", (17,))):
        for dtype in ("float32", target.dtype):
            host = rng.normal(size=shape).astype(numpy_dtype(dtype))
            kept = host.copy()
            part = Part("dense", {"weight": host}, shape[0])
            param = target.load(ParamSpec("w", shape, role), [part])
            host[...] = 3
            what = f"{role} whose {dtype} host array was overwritten after load"
            bench.evidence += _unloaded(target, param, {"weight": kept}, role, what)
            what = f"{role} whose unloaded array was overwritten"
            bench.evidence += _unloaded(target, param, {"weight": kept}, role, what)
            if role == "linear":
                _judge_linear(bench, rng, param, {"weight": wide(kept)}, what)
    return bench.done()


def unknown_scheme(target: Target, seed: int) -> Evidence:
    """A scheme that is not declared is refused, not taken for plain numbers."""
    weight = np.ones((4, 8), np.float32)
    scheme = "suite-knows-no-such-scheme"
    for given in (
        [Part(scheme, {"weight": weight}, 4)],
        [Part("dense", {"weight": weight}, 4), Part(scheme, {"weight": weight}, 4)],
    ):
        try:
            target.load(ParamSpec("w", (4 * len(given), 8), "linear"), given)
        except Raised as raised:
            require(
                isinstance(raised.error, NotSupported),
                f"load of an unknown weight scheme raised {type(raised.error).__name__}, "
                "expected NotSupported",
            )
            continue
        raise Failed("load accepted a weight scheme that no backend knows; it must refuse it")
    return Evidence(checks=2)


def wrong_shape(target: Target, seed: int) -> Evidence:
    """Weights of another shape than the model's, or of an unknown scheme in one of their parts,
    are refused at load, where the name is known."""
    rng, evidence = rng_of("weights.shape.refused", seed), Evidence()
    for role, shape, given in (
        ("linear", (6, 4), (4, 6)),
        ("linear", (6, 4), (6, 5)),
        ("linear", (6, 4), (5, 4)),
        ("embedding", (9, 4), (8, 4)),
        ("norm", (9,), (8,)),
        ("experts", (3, 4, 5), (3, 5, 4)),
    ):
        part = Part("dense", {"weight": _host(rng, given, "float32")}, given[0])
        what = f"a {role} of shape {list(given)} where the model needs {list(shape)}"
        require(_is_refused(target, ParamSpec("w", shape, role), [part], what), f"load took {what}")
        evidence.checks += 1
    odd = {"weight": _host(rng, (4, 8), "float32")}
    mixed = [Part("dense", odd, 4), Part("suite-knows-no-such-scheme", odd, 4)]
    what = "a part of a scheme that no backend knows"
    require(_is_refused(target, ParamSpec("w", (8, 8), "linear"), mixed, what), f"load took {what}")
    return evidence


def _is_refused(target: Target, spec: ParamSpec, given: list[Part], what: str) -> bool:
    try:
        target.load(spec, given)
    except Raised as raised:
        require(
            isinstance(raised.error, VllmCoreError),
            f"load of {what} raised {type(raised.error).__name__}, which does not say whose fault "
            "it is",
        )
        return True
    return False


# ---------------------------------------------------------------- a whole model
HIDDEN, TOKENS, IDS = 24, 11, 61


def model(target: Target, seed: int) -> Evidence:
    """Every role at once, from parts of all dtypes and layouts, two of a kind under one name; the
    ops compute with each, and it comes back. Square weights tell rows from columns."""
    rng, bench = rng_of("weights.model.whole", seed), Bench(target)
    shapes: tuple[tuple[str, tuple[int, ...], bool], ...] = (
        ("embedding", (IDS, HIDDEN), False),
        ("norm", (HIDDEN,), True),
        ("linear", (HIDDEN, HIDDEN), True),
        ("linear", (HIDDEN, HIDDEN), True),
        ("linear", (37, HIDDEN), False),
        ("experts", (5, HIDDEN, HIDDEN), False),
        ("experts", (5, HIDDEN, HIDDEN // 2), False),
        ("experts", (3, 2 * HIDDEN, HIDDEN), False),
        ("experts", (3, HIDDEN, HIDDEN), False),
    )
    params, stored, hosts = [], [], []
    for role, shape, has_bias in shapes:
        split = _awkward_parts(rng, shape, has_bias)
        whole = {name: np.concatenate([wide(p[name]) for p in split]) for name in split[0]}
        parts = [
            Part("dense", _lazily(piece) if place % 2 else piece, len(piece["weight"]))
            for place, piece in enumerate(split)
        ]
        params.append(target.load(ParamSpec("w", shape, role), parts))
        for piece in split:
            for host in piece.values():
                host[...] = 3
        hosts.append(whole)
        stored.append({name: _stored(target, x, role) for name, x in whole.items()})
    _compute(bench, rng, params, stored)
    for (role, shape, _), param, whole in zip(shapes, params, hosts):
        for turn in ("", ", a second time"):
            what = f"{role} {list(shape)} of a whole model{turn}"
            bench.evidence += _unloaded(target, param, whole, role, what)
    return bench.done()


def _awkward_parts(
    rng: np.random.Generator, shape: tuple[int, ...], has_bias: bool
) -> list[dict[str, Any]]:
    """Three parts, each in a dtype and a layout of its own."""
    cuts = np.sort(rng.permutation(np.arange(1, shape[0]))[:2])
    sizes = np.diff([0, *cuts.tolist(), shape[0]]).tolist()
    dtypes, found = rng.permutation(HOST_DTYPES).tolist(), []
    if dtypes[0] == "float32":  # the first one's dtype does not hold the others
        dtypes = dtypes[::-1]
    for place, (rows, dtype) in enumerate(zip(sizes, dtypes)):
        size = (rows, *shape[1:])
        x = rng.normal(size=size) * 10.0 ** rng.integers(-2, 1, size) / np.sqrt(shape[-1])
        x = x.astype(numpy_dtype(dtype))
        if place == 1:
            x = np.asfortranarray(x)
        elif place == 2 and rows > 1:
            x = x[::-1].copy()[::-1]
        piece = {"weight": x}
        if has_bias:
            piece["bias"] = rng.normal(size=rows).astype(numpy_dtype(dtype))
        found.append(piece)
    return found


def _compute(bench: Bench, rng: np.random.Generator, params: list[Param], stored: Any) -> None:
    target, ops = bench.target, bench.target.ops
    x = target.round(rng.normal(size=(TOKENS, HIDDEN)))
    ids = rng.permutation(IDS)[:TOKENS].astype(np.int32)
    ids[0] = IDS - 1
    chosen = np.stack([rng.permutation(3)[:2] for _ in range(TOKENS)]).astype(np.int32)
    shares = rng.dirichlet(np.ones(2), TOKENS).astype(np.float32)
    more = chosen.copy()
    more[more == 0] = 4  # experts 1, 2 and 4 of five

    def fn(x: Any, ids: Any, few: Any, many: Any, shares: Any, *p: Param) -> tuple[Any, ...]:
        return (
            ops.embed(ids, p[0]),
            ops.layer_norm(x, p[1], 1e-5),
            *(ops.linear(x, own) for own in p[2:5]),
            ops.moe_experts(x, many, shares, *p[5:7]),
            ops.moe_experts(x, few, shares, *p[7:9]),
        )

    arrays = [target.array(v) for v in (x, ids, chosen, more)]
    rest = target.array(shares, "float32")
    found = target.call(("weights", "model"), fn, *arrays, rest, *params)
    w, ratio = [own["weight"] for own in stored], bench.ratio
    bench.equal(found[0], w[0][ids], "embed of a table in parts", axes=("token", "dim"))
    norm = x, w[1], stored[1]["bias"], 1e-5
    bench.judge(
        "layer_norm",
        found[1],
        oracle.layer_norm(*norm),
        oracle.noise_layer_norm(*norm, ratio=ratio),
    )
    for out, own in zip(found[2:5], stored[2:5]):
        pair = own["weight"], own.get("bias")
        bench.judge(
            "linear",
            out,
            oracle.linear(x, *pair),
            oracle.noise_linear(x, *pair, ratio=ratio),
            where=f"of weights {list(pair[0].shape)} in parts",
            by_class=True,
        )
    for out, which, up, down in zip(found[5:], (more, chosen), w[5::2], w[6::2]):
        given = x, which, wide(shares), up, down
        bench.judge(
            "moe_experts",
            out,
            oracle.moe_experts(*given),
            oracle.noise_moe_experts(*given, ratio=ratio),
            where=f"of {len(up)} experts in parts",
            by_class=True,
        )


_CORE = frozenset({"core"})

CASES: tuple[Case, ...] = (
    Case(
        "weights.load.round_trip",
        "gives back the bits that it loaded, in the model dtype, norms in float32",
        round_trip,
        frozenset({"core", "smoke"}),
        every_dtype=True,
    ),
    Case(
        "weights.parts.order",
        "joins parts and their biases in order, and multiplies by the whole",
        parts,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "weights.parts.roles",
        "joins lazy parts of embeddings, norms and experts",
        lazy_roles,
        _CORE,
    ),
    Case(
        "weights.load.layouts",
        "reads host arrays of any strides",
        layouts,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "weights.load.alias",
        "keeps a copy of its own",
        no_alias,
        _CORE,
        every_dtype=True,
    ),
    Case("weights.scheme.unknown", "refuses an unknown weight scheme", unknown_scheme, _CORE),
    Case(
        "weights.shape.refused",
        "refuses weights of another shape than the model's",
        wrong_shape,
        _CORE,
    ),
    Case(
        "weights.model.whole",
        "loads a whole model from parts of all dtypes and layouts, and computes with it",
        model,
        _CORE,
        every_dtype=True,
    ),
)

"""Cases of small programs: order, the structure of results, inputs that stay, errors that arrive.

Knows: values that cross programs, ops as things that may change their inputs. Does not know: how
right an op's numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import DeviceStep, StepLayout
from vllm_core.backend.step import scrap_params
from vllm_core.ops import Column, DeviceState, Features, Logprobs, Param, StepResult
from vllm_core_conformance.case import Evidence, Failed, require
from vllm_core_conformance.cases.programs_echo import (
    DIM,
    KV_HEADS,
    LAYER,
    LIVE_ROWS,
    Q_HEADS,
    SMALL,
    VOCAB,
    Echo,
    Weights,
)
from vllm_core_conformance.cases.programs_session import Session, healthy
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Raised, Target, calling, wide

Numbers = NDArray[Any]
Body = Callable[[Target, np.random.Generator], Evidence]

CALLS = 40
PRIME = 9973
"""Its squares fit 32 bits."""
MARK = "lamp 7 is out"


class Pair(NamedTuple):
    """A consumed tree."""

    left: Any
    right: tuple[Any, ...]


def _triple(x: Pair, y: Any, last: Any) -> tuple[Any, ...]:
    left = (x.left * 3 + y) % PRIME
    return Pair(left, (x.right[0] + 1,)), left[:8] + 0


def _square(x: Pair, y: Any, last: Any) -> tuple[Any, ...]:
    left = (x.left * x.left + last[:1]) % PRIME
    return Pair(left, (x.right[0] * 2 % PRIME,)), left[:8] + 1


def chain(target: Target, rng: np.random.Generator) -> Evidence:
    """Two programs that do not commute, 40 calls, nothing waited for; each gets the result of the
    call before as an argument."""
    programs = (_triple, _square)
    runs = [
        # a runtime that is not told the number of results may wait, but must not go wrong
        target.compile(("chain", i), fn, consumes=(0,), num_results=1 if i else None)
        for i, fn in enumerate(programs)
    ]
    x, y_device, last_device, (host, y, last) = _chain_of(target, rng)
    results, expected, which = [], [], rng.integers(0, 2, CALLS)
    for i in which:
        with calling("a small program"):
            x, last_device = runs[i](x, y_device, last_device)
        host, last = programs[i](host, y, last)
        results.append(last_device)
        expected.append(last)
    evidence = Evidence()
    for number, (result, want) in enumerate(zip(results, expected, strict=True)):
        (got,) = target.fetch((result,))
        name = programs[which[number]].__name__.strip("_")
        what = f"result of call {number} of {CALLS} ({name}), fetched after all"
        evidence += require_equal(np.asarray(got), want, what, axes=("place",))
    final = target.fetch(x)
    require(
        getattr(final, "_fields", None) == Pair._fields,
        f"a tree of named tuples was fetched as a {type(final).__name__} without its fields",
    )
    what = f"the consumed value after {CALLS} calls"
    evidence += require_equal(np.asarray(final.left), host.left, what)
    evidence += require_equal(np.asarray(final.right[0]), host.right[0], f"{what}, inner array")
    (kept,) = target.fetch((y_device,))
    evidence += require_equal(np.asarray(kept), y, "an argument that no call consumed")
    return evidence


def structure(target: Target, rng: np.random.Generator) -> Evidence:
    """Named tuples in named tuples, None, and each dtype come out of a program as they went in."""
    ops = target.ops
    kinds = ("int32", "float32", target.dtype)

    def fn(x: Any, flag: Any) -> tuple[Any, ...]:
        single, model = ops.cast(x, "float32"), ops.cast(x, target.dtype)
        logprobs = Logprobs(x + 1, single * 0.5, x[:, 0] + 2)
        bare = StepResult(x + 3, x[:, 1] + 4, x[:, 2] + 5, None)
        full = StepResult(x + 6, x[:, 1] + 7, x[:, 2] + 8, logprobs)
        return bare, (full, None), (model * 2, ~flag, x[:0] + 0)

    numbers = rng.integers(0, 100, (5, 3))
    flags = rng.integers(0, 2, 5) > 0
    arrays = target.array(numbers.astype(np.int32)), target.array(flags)
    evidence = Evidence()
    for count in (None, 3):
        run = target.compile(("structure", count), fn, num_results=count)
        with calling("a program with nested results"):
            results = run(*arrays)
        require(
            len(results) == 3, f"a program of 3 results returned {len(results)} (told: {count})"
        )
        bare, (full, nothing), (model, flipped, empty) = target.fetch(tuple(results))
        for name, got in (("StepResult", bare), ("StepResult with log-probabilities", full)):
            require(
                getattr(got, "_fields", None) == StepResult._fields,
                f"a fetched {name} came back as {type(got).__name__}: structure is lost",
            )
        require(
            nothing is None and bare.logprobs is None,
            f"None among the results came back as {nothing!r} and {bare.logprobs!r}",
        )
        found = [*bare[:3], *full[:3], *full.logprobs, model, flipped, empty]
        x, one, two, three = numbers, numbers[:, 0], numbers[:, 1], numbers[:, 2]
        exact: list[Numbers] = [x + 3, two + 4, three + 5, x + 6, two + 7, three + 8]
        exact += [x + 1, x * 0.5, one + 2, x * 2, ~flags, x[:0]]
        dtypes = [kinds[0]] * 6 + [kinds[0], kinds[1], kinds[0], kinds[2], "bool", kinds[0]]
        for place, (got, want, dtype) in enumerate(zip(found, exact, dtypes, strict=True)):
            what = f"leaf {place} of a fetched result (num_results {count})"
            name = np.asarray(got).dtype.name
            require(name == dtype, f"{what} has dtype {name}, on the device it is {dtype}")
            evidence += require_equal(wide(got), want, what)
    return evidence


def _op_inputs(target: Target, rng: np.random.Generator) -> tuple[dict[str, Numbers], Any]:
    """Host arrays by name, and params, for `_every_op`."""

    def normal(*shape: int) -> Numbers:
        return target.round(rng.normal(size=shape))

    host = {
        "x": normal(6, 32),
        "residual": normal(6, 32),
        "heads": normal(6, 2, 16),
        "router": normal(6, 4),
        "wide": rng.normal(size=(6, VOCAB)).astype(np.float32),
        "ids": rng.integers(0, VOCAB, 6).astype(np.int32),
        "valid": np.arange(6) < 5,
        "columns": np.repeat(scrap_params(1, 1)[None], 6, 0),
        "history": rng.integers(0, VOCAB, (2, 12)).astype(np.int32),
        "bias": np.zeros((2, VOCAB), np.float32),
    }
    host["columns"][:, Column.TEMPERATURE] = np.float32(0.7).view(np.int32)
    host["columns"][:, Column.TOP_K] = 9
    host["bias"][0] = rng.normal(size=VOCAB)
    shapes = {
        "linear": (32, 32),
        "embedding": (VOCAB, 32),
        "norm": (32,),
        "gate_up": (4, 32, 32),
        "down": (4, 32, 16),
    }
    params = {}
    for name, shape in shapes.items():
        role = "experts" if len(shape) == 3 else name
        tensors = {"weight": normal(*shape)}
        if name in ("linear", "norm"):
            tensors["bias"] = normal(shape[0])
        params[name] = target.param(role, tensors, name), tensors["weight"]
    return host, params


def _every_op(target: Target, a: dict[str, Any], params: dict[str, Param]) -> Iterator[Any]:
    """Results of every op that reads and must not write."""
    ops, x = target.ops, a["x"]
    features = Features(draw=True, filters=True, penalties=True, bias=True)
    yield ops.embed(a["ids"], params["embedding"])
    yield ops.linear(x, params["linear"])
    yield ops.logits(x, params["linear"])
    yield ops.rms_norm(x, params["norm"], 1e-5)
    yield from ops.add_rms_norm(x, a["residual"], params["norm"], 1e-5)
    yield ops.layer_norm(x, params["norm"], 1e-5)
    cos, sin = ops.rope_table(a["ids"], np.array([1.0, 0.3, 0.1], np.float32), 1.0)
    yield ops.rope(a["heads"], cos, sin)
    yield ops.silu_and_mul(x)
    yield ops.gelu_and_mul(x)
    for kind in ("relu", "gelu", "gelu_tanh", "silu"):
        yield ops.activation(x, kind)
    ids, shares = ops.moe_route(a["router"], 2, True, a["valid"])
    yield ops.moe_experts(x, ids, shares, params["gate_up"], params["down"])
    yield ops.amax(a["wide"])
    yield from ops.top(a["wide"], 3)
    yield from ops.sample(a["wide"], a["columns"], a["ids"] % 12, a["history"], a["bias"], features)
    yield from ops.logprobs(a["wide"], a["ids"], 2)


def inputs_of_ops(target: Target, rng: np.random.Generator) -> Evidence:
    """All ops run in one program; afterwards every argument and weight holds what it held."""
    host, loaded = _op_inputs(target, rng)
    params = {name: param for name, (param, _) in loaded.items()}
    names = tuple(host)

    def fn(params: Any, *arrays: Any) -> tuple[Any, ...]:
        return tuple(_every_op(target, dict(zip(names, arrays, strict=True)), params))

    arrays = {
        name: target.array(x, "float32") if x.dtype == np.float32 else target.array(x)
        for name, x in host.items()
    }
    run = target.compile("every op", fn)
    with calling("a program of every op"):
        results = run(params, *arrays.values())
    target.fetch(tuple(results))
    evidence = Evidence()
    for name, kept in zip(names, target.fetch(tuple(arrays.values())), strict=True):
        what = f"argument {name!r} after a program of ops that only read it"
        evidence += require_equal(wide(kept), wide(host[name]), what)
    for name, (param, weight) in loaded.items():
        with calling(f"unload of {name}"):
            found = target.runtime.unload(param)
        what = f"weight {name!r} after a program of ops that only read it"
        evidence += require_equal(np.asarray(found["weight"], np.float64), weight, what)
    return evidence


def _attend(
    echo: Echo,
    layout: StepLayout,
    state: DeviceState,
    kv: Any,
    device_step: DeviceStep,
    q: Any,
    k: Any,
    v: Any,
) -> tuple[Any, ...]:
    ops, step = echo.runtime.ops, layout.unpack(device_step.buffer)
    view, state = ops.expand(echo.runtime.block_tables, state, step, layout.block_tokens, VOCAB)
    (plan,) = echo.runtime.attention.plan(
        state, view, step, layout.key, device_step.host_part, (echo.spec,), echo.groups
    )
    out, _, kv = echo.runtime.attention.attend(kv, LAYER, q, k, v, plan)
    return state, kv, out


def inputs_of_attention(target: Target, rng: np.random.Generator) -> Evidence:
    """q, k and v of a mixed step are read only; a second session gets the same from them."""
    echo = Echo.of(target)
    layout = echo.layout(SMALL)
    heads = (Q_HEADS, KV_HEADS, KV_HEADS)
    host = [target.round(rng.normal(size=(layout.key.tokens, h, DIM))) for h in heads]
    arrays = [target.array(x) for x in host]
    run = target.compile(
        ("attend only", layout.key),
        partial(_attend, echo, layout),
        name="step",
        consumes=(0, 1),
        num_results=1,
        key=layout.key,
    )
    seed, outs, evidence = int(rng.integers(2**31)), [], Evidence()
    for _ in range(2):
        session = Session(target, np.random.default_rng(seed))
        session.admit(0, 1)
        session.admit(LIVE_ROWS - 1, SMALL - 1)
        work = session.parts([(0, 1), (LIVE_ROWS - 1, SMALL - 1)])[-1]
        buffer, packed, _ = session.pack(work, layout)
        device_step = session.upload(buffer, packed, layout)
        with calling("a program of one attention"):
            session.state, session.kv, out = run(session.state, session.kv, device_step, *arrays)
        outs.append(out)
    first, second = target.fetch(tuple(outs))
    for name, kept, want in zip("qkv", target.fetch(tuple(arrays)), host, strict=True):
        evidence += require_equal(
            wide(kept), want, f"{name} after an attention", axes=("token", "head", "lane")
        )
    evidence += require_equal(
        wide(second), wide(first), "attention on a second state from the same q, k and v"
    )
    return evidence


def _broken(x: Any, y: Any) -> tuple[Any, ...]:
    x = x + y
    raise ValueError(MARK)


def failure(target: Target, rng: np.random.Generator) -> Evidence:
    """A program that raises: its error reaches the caller, who then goes on with fresh values."""
    weights, session, evidence = Weights.make(target, rng), Session(target, rng), Evidence()
    session.admit(1, 3)
    good = session.submit([(1, 3)], weights)
    with calling("fetch"):
        on_its_way = target.runtime.fetch(good.result)
    for time in ("first", "second"):
        error = error_of(target)
        if error is None:
            raise Failed(
                f"a program that raised ValueError({MARK!r}) seemed to work: neither its call nor "
                f"the fetch of its result raised ({time} time)"
            )
        texts = []
        while error is not None:
            texts.append(str(error))
            error = error.__cause__ or error.__context__
        require(
            any(MARK in text for text in texts),
            f"a program raised ValueError({MARK!r}), but the caller was told {texts[0]!r} only",
        )
        evidence.checks += 2
        evidence += healthy(target, int(rng.integers(1000)), f"the {time} program that raised")
    with calling("wait of a fetch that was started before a program failed"):
        result = on_its_way.wait()
    evidence += session.check(good, result, " (before the program that failed)")
    return evidence


def error_of(target: Target) -> BaseException | None:
    """What the caller of a failing program is told, at the latest by the wait."""
    arrays = [target.array(np.arange(4, dtype=np.int32)) for _ in range(2)]
    try:
        run = target.compile(None, _broken, consumes=(0,), num_results=1)
        _, result = run(*arrays)
        target.fetch((result,))
    except Raised as raised:
        return raised.error
    except Exception as error:
        return error
    return None


def fetched_is_ours(target: Target, rng: np.random.Generator) -> Evidence:
    """What was fetched and waited for is the host's: later programs that consume the value do not
    change it."""
    run = target.compile(("chain", 0), _triple, consumes=(0,))
    x, y, last, (host, y_host, last_host) = _chain_of(target, rng)
    held, evidence = [], Evidence()
    for call in range(4):
        found = [target.fetch(x), *target.fetch((y, last))]
        held.append((call, found, (host, y_host, last_host)))
        with calling("a small program"):
            x, last = run(x, y, last)
        host, last_host = _triple(host, y_host, last_host)
    for call, (tree, argument, result), (want, *others) in held:
        when = f"fetched and waited for before call {call}, looked at after four calls"
        for what, got, exact in (
            ("a value that was consumed later", tree.left, want.left),
            ("an inner array that was consumed later", tree.right[0], want.right[0]),
            ("an argument", argument, others[0]),
            ("the result of the call before", result, others[1]),
        ):
            evidence += require_equal(np.asarray(got), exact, f"{what}, {when}", axes=("place",))
    return evidence


def fetched_is_writable(target: Target, rng: np.random.Generator) -> Evidence:
    """What the host writes into what it fetched does not reach the device."""
    run = target.compile(("chain", 0), _triple, consumes=(0,))
    x, y, last, (host, y_host, last_host) = _chain_of(target, rng)
    evidence = Evidence()
    for _ in range(2):
        with calling("a small program"):
            x, last = run(x, y, last)
        host, last_host = _triple(host, y_host, last_host)
        for value, want in ((x.left, host.left), (y, y_host), (last, last_host)):
            (found,) = target.fetch((value,))
            if isinstance(found, np.ndarray) and found.flags.writeable:
                found[...] = -1
            (again,) = target.fetch((value,))
            what = "a value fetched again after the host wrote into what the first fetch gave"
            evidence += require_equal(np.asarray(again), want, what, axes=("place",))
    return evidence


def _chain_of(target: Target, rng: np.random.Generator) -> tuple[Any, ...]:
    """The arguments of `_triple` on the device, and all three on the host."""
    host = Pair(rng.integers(0, PRIME, 64), (rng.integers(0, PRIME, 3),))
    y, last = rng.integers(0, PRIME, 64), rng.integers(0, PRIME, 8)

    def device(x: Numbers) -> Any:
        return target.array(x.astype(np.int32))

    x = Pair(device(host.left), (device(host.right[0]),))
    return x, device(y), device(last), (host, y, last)


ENTRIES: tuple[tuple[Any, ...], ...] = (
    ("order.chain", "programs that do not commute take effect in the order of their calls",
     chain, "smoke"),
    ("results.structure", "fetch gives the same tree: named tuples, None, dtypes, empty arrays",
     structure),
    ("results.fetched", "what was fetched is the host's own, whatever becomes of the value",
     fetched_is_ours),
    ("results.written", "what the host writes into a fetched array stays on the host",
     fetched_is_writable),
    ("inputs.of_ops", "no op changes its inputs", inputs_of_ops),
    ("inputs.of_attention", "attention changes neither q nor k nor v", inputs_of_attention),
    ("failure.recovers", "the error of a program reaches the caller, and the runtime goes on",
     failure),
)  # fmt: skip
"""name, says, body, further profiles."""

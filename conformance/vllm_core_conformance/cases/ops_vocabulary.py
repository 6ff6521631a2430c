"""Cases: the array vocabulary that shared code is written in.

Knows: what shared code relies on. Does not know: any framework.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops import Ops
from vllm_core_conformance.case import Case, Evidence, require
from vllm_core_conformance.cases.ops_call import Bench, Fixed, rng_of
from vllm_core_conformance.score import require_equal
from vllm_core_conformance.target import Numbers, Target, calling, numpy_dtype, wide

MASK = 0xFFFFFFFF


def arrays(target: Target, seed: int) -> Evidence:
    """asarray copies: later changes of the host array, or a strange layout of it, do not show."""
    rng, bench, ops = rng_of("ops.vocabulary.arrays", seed), Bench(target), target.ops
    base = rng.normal(size=(6, 8)).astype(np.float32)
    read_only = rng.integers(0, 99, 5).astype(np.int32)
    read_only.setflags(write=False)
    hosts = {
        "float32": base.copy(),
        "int32": rng.integers(-(2**31), 2**31, (3, 4), dtype=np.int32),
        "bool": rng.random(9) < 0.5,
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "reversed": base[::-1],
        "read-only": read_only,
        "empty": np.zeros((0, 3), np.int32),
        # long enough that a copy in the background is not done when asarray returns
        "long": rng.integers(0, 99, 60_000).astype(np.int32),
        "longer": rng.normal(size=(30, 10_000)).astype(np.float32),
    }
    wanted = {name: host.copy() for name, host in hosts.items()}
    values = {}
    with calling("asarray"):
        for name, host in hosts.items():
            values[name] = ops.asarray(host)
            if name.startswith("long"):
                host[...] = 77  # at once
    for host in (hosts["longer"], hosts["long"], hosts["float32"], hosts["int32"], base):
        host[...] = 77
    hosts["bool"][...] = False
    for name, value in values.items():
        found = np.asarray(target.fetch((value,))[0])
        require(
            found.dtype == wanted[name].dtype,
            f"asarray of a {name} array: {found.dtype}, expected {wanted[name].dtype}",
        )
        what = f"asarray of a {name} array whose host memory changed afterwards"
        bench.equal(found, wanted[name], what)
        with calling("host"):
            bench.equal(np.asarray(ops.host(value)), wanted[name], f"host of a {name} array")
    return bench.done()


def _made(ops: Ops, like: Any) -> tuple[Any, ...]:
    return (
        ops.arange(1),
        ops.arange(300),
        ops.full((2, 3), -1.25, "float32") + like[0] * 0,
        ops.full((4,), float("-inf"), "float32"),
        ops.full((), 7, "int32"),
        ops.xp.zeros_like(like) + 1,
    )


def made(target: Target, seed: int) -> Evidence:
    """arange counts in int32; full has its dtype and value; each call makes them anew."""
    bench = Bench(target)
    like = np.array([5.0, 3.0, -4.0], np.float32)
    for turn in range(2):
        found = bench.call("made arrays", _made, [Fixed(like)])
        wanted = (
            np.arange(1, dtype=np.int32),
            np.arange(300, dtype=np.int32),
            np.full((2, 3), -1.25, np.float32),
            np.full(4, -np.inf, np.float32),
            np.array(7, np.int32),
            np.ones(3, np.float32),
        )
        for name, out, want in zip(
            ("arange",) * 2 + ("full",) * 3 + ("zeros_like",), found, wanted
        ):
            out = np.asarray(out)
            require(
                out.dtype == want.dtype and out.shape == want.shape,
                f"{name}: {out.dtype}{list(out.shape)}, expected {want.dtype}{list(want.shape)}",
            )
            bench.equal(out, want, f"{name} (call {turn + 1})")
    return bench.done()


def casts(target: Target, seed: int) -> Evidence:
    """Roundings are to the nearest, ties to even."""
    rng, bench = rng_of("ops.vocabulary.casts", seed), Bench(target)
    x = (rng.normal(size=4000) * 10.0 ** rng.integers(-3, 4, 4000)).astype(np.float32)
    model = target.dtype
    if model in ("bfloat16", "float16"):
        grid = np.abs(target.round(x[:2000])).astype(np.float32)  # halves between neighbours
        above = np.nextafter(grid.astype(numpy_dtype(model)), numpy_dtype(model).type(np.inf))
        x[:2000] = (grid.astype(np.float64) + wide(above)) / 2
    counts: Any = np.array(
        [0, 1, -1, 2**24 + 1, 2**24 + 3, -(2**24) - 1, 2**30 + 65, 123_456_789], np.int32
    )
    whole: Any = np.array([0, -0.0, 1, -1, 255, -256, 65_537, 2**24, -(2.0**30)], np.float32)
    flags = rng.random(17) < 0.5

    def fn(ops: Ops, x: Any, counts: Any, whole: Any, flags: Any) -> tuple[Any, ...]:
        narrow = ops.cast(x, model)
        return (
            narrow,
            ops.cast(narrow, "float32"),
            ops.cast(counts, "float32"),
            ops.cast(whole, "int32"),
            ops.cast(flags, "int32"),
            ops.cast(flags, "float32"),
        )

    found = bench.call("casts", fn, [Fixed(v) for v in (x, counts, whole, flags)])
    narrow = wide(x.astype(numpy_dtype(model)))
    wanted = (
        (f"float32 to {model}", model, narrow),
        (f"{model} to float32", "float32", narrow.astype(np.float32)),
        ("int32 to float32", "float32", counts.astype(np.float32)),
        ("whole float32 to int32", "int32", whole.astype(np.int32)),
        ("bool to int32", "int32", flags.astype(np.int32)),
        ("bool to float32", "float32", flags.astype(np.float32)),
    )
    for out, (name, dtype, want) in zip(found, wanted):
        require(
            np.asarray(out).dtype.name == dtype, f"cast of {name} gave {np.asarray(out).dtype.name}"
        )
        what = f"cast of {name} (round to nearest, ties to even)"
        bench.equal(out, want, what, axes=("element",))
    return bench.done()


def _scatters(
    ops: Ops, x: Any, rows: Any, columns: Any, values: Any, counts: Any
) -> tuple[Any, ...]:
    blank = x * 0
    once = ops.put(x + 0, (rows, columns), values)
    whole_rows = ops.put(x + 0, (rows,), values[:, None] + blank[:1])
    constant = ops.put(x + 0, (rows[:, None], columns[None, :3]), 9.5)
    summed = ops.accumulate(blank, (rows, columns), values)
    tally = ops.accumulate(ops.full((3, 7), 0, "int32"), (counts[:, 0], counts[:, 1]), counts[:, 2])
    return once, whole_rows, constant, summed, tally


def scatters(target: Target, seed: int) -> Evidence:
    """put: any of the values of an index that repeats; accumulate: all of them."""
    rng, bench = rng_of("ops.vocabulary.scatters", seed), Bench(target)
    height, width, count = 11, 7, 40
    x = rng.integers(-50, 50, (height, width)).astype(np.float32)
    rows = rng.integers(0, height, count).astype(np.int32)
    columns = rng.integers(0, width, count).astype(np.int32)
    values = rng.permutation(np.arange(100, 100 + count)).astype(np.float32)
    counts = rng.integers(0, (3, 7, 2), (64, 3)).astype(np.int32)
    counts[:, 2] = 1
    args = [Fixed(v) for v in (x, rows, columns, values, counts)]
    once, whole_rows, constant, summed, tally = bench.call("scatters", _scatters, args)
    for r in range(height):
        for c in range(width):
            mine = values[(rows == r) & (columns == c)]
            allowed = set(mine.tolist()) or {float(x[r, c])}
            got = float(once[r, c])
            require(
                got in allowed,
                f"put: place ({r}, {c}) holds {got}, expected "
                + ("one of " if len(allowed) > 1 else "")
                + f"{sorted(allowed)}",
            )
        mine = values[rows == r]
        allowed = set(mine.tolist())
        line = wide(whole_rows[r])
        same = (line == line[0]).all() and float(line[0]) in allowed if len(mine) else False
        require(
            bool(same or (not len(mine) and (line == x[r]).all())),
            f"put of whole rows: row {r} holds {line.tolist()}",
        )
    bench.evidence.checks += height * (width + 1)
    want = x.copy()
    want[rows[:, None], columns[None, :3]] = 9.5
    bench.equal(constant, want, "put of one constant at rows x columns", axes=("row", "column"))
    want = np.zeros_like(x)
    np.add.at(want, (rows, columns), values)
    bench.equal(summed, want, "accumulate, float32, repeated places", axes=("row", "column"))
    total = np.zeros((3, 7), np.int32)
    np.add.at(total, (counts[:, 0], counts[:, 1]), counts[:, 2])
    bench.equal(tally, total, "accumulate, int32, repeated places", axes=("row", "column"))
    return bench.done()


def order(target: Target, seed: int) -> Evidence:
    """Largest values and their ids, ties to the lowest id; NaN is not lost by a maximum."""
    rng, bench = rng_of("ops.vocabulary.order", seed), Bench(target)
    x = rng.normal(size=(9, 83)).astype(np.float32)
    x[1] = np.round(x[1])
    x[2] = 4.0
    x[3, rng.random(83) < 0.7] = -np.inf
    x[4] = -np.inf
    x[5] *= np.float32(1e30)
    x[6] = -np.abs(x[6]) - 1
    x[7] = np.round(x[7] * 2)
    x[8] = np.where(rng.random(83) < 0.5, 0.0, -0.0)  # all tie
    broken = x.copy()
    broken[7, rng.integers(83)] = np.nan

    def fn(ops: Ops, x: Any, broken: Any) -> tuple[Any, ...]:
        few, all_of_them, one = ops.top(x, 5), ops.top(x, 83), ops.top(x, 1)
        return ops.amax(x), ops.amax(broken), ops.xp.argmax(x, -1), *few, *all_of_them, *one

    best, with_nan, first, *tops = bench.call("order", fn, [Fixed(x), Fixed(broken)])
    bench.equal(best, x.max(-1), "amax", axes=("row",))
    lost = np.asarray(np.isnan(broken).any(-1))
    bench.equal(np.isnan(wide(with_nan)), lost, "amax of a row with NaN is NaN")
    bench.equal(first, x.argmax(-1), "argmax (ties to the lowest)", axes=("row",))
    ids = np.argsort(-x, axis=-1, kind="stable")
    for count, (found, places) in zip((5, 83, 1), zip(tops[::2], tops[1::2])):
        require(places.dtype.name == "int32", f"top: ids are {places.dtype.name}, expected int32")
        want = np.take_along_axis(x, ids, -1)[:, :count]
        bench.equal(found, want, f"top {count}: values, largest first", axes=("row", "rank"))
        what = f"top {count}: ids, ties to the lowest"
        bench.equal(places, ids[:, :count], what, axes=("row", "rank"))
    return bench.done()


def _word_program(ops: Ops, a: Any, b: Any, f: Any) -> tuple[Any, ...]:
    mask, big = ops.word(MASK), ops.word(0x9E3779B9)
    x, y = ops.words(a), ops.words(b)
    return (
        x + 0,
        (x + y) & mask,
        (x + big) & mask,
        (x & 0xFFFF) * (y & 0xFFFF),
        x >> 14,
        x >> 31,
        (x << 14) & mask,
        x ^ y,
        x | big,
        ops.cast(x > y, "int32"),
        ops.cast(x >= big, "int32"),
        ops.words(ops.xp.sum(x >> 8, -1)),
        ops.words(ops.xp.cumsum(y >> 8, -1)),
        ops.words(ops.xp.where(a < 0, 5, a)),
        ops.bits(f),
        ops.floats(a & 0x3FFFFFFF),
    )


WORD_NAMES = (
    "words of int32|sum mod 2^32|sum with a constant mod 2^32|product of 16-bit limbs|shift by 14|"
    "shift by 31|left shift mod 2^32|exclusive or|or with a constant|greater, unsigned|"
    "at least a constant, unsigned|sum over a row|running sum|words of a choice|bits of float32|"
    "floats of int32"
).split("|")


def words(target: Target, seed: int) -> Evidence:
    """Unsigned arithmetic of 32 bits, and floats seen as bits."""
    rng, bench = rng_of("ops.vocabulary.words", seed), Bench(target)
    a, b = (rng.integers(-(2**31), 2**31, (6, 64), dtype=np.int32) for _ in range(2))
    a[0, :6] = (-1, -(2**31), 2**31 - 1, 0, 1, -2)
    b[0, :6] = (-1, 2**31 - 1, -(2**31), -1, 0, 1)
    f = (rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64)).astype(np.float32)
    f[:6] = (0.0, -0.0, np.inf, -np.inf, 1.0, np.nan)
    found = bench.call("words", _word_program, [Fixed(a), Fixed(b), Fixed(f)])
    x, y = (v.astype(np.int64) & MASK for v in (a, b))
    big = 0x9E3779B9
    wanted = (
        x,
        (x + y) & MASK,
        (x + big) & MASK,
        (x & 0xFFFF) * (y & 0xFFFF),
        x >> 14,
        x >> 31,
        (x << 14) & MASK,
        x ^ y,
        x | big,
        (x > y).astype(np.int64),
        (x >= big).astype(np.int64),
        (x >> 8).sum(-1),
        (y >> 8).cumsum(-1),
        np.where(a < 0, 5, a),
        f.view(np.int32),
        (a & 0x3FFFFFFF).view(np.float32),
    )
    for name, out, want in zip(WORD_NAMES, found, wanted, strict=True):
        out = np.asarray(out)
        if out.dtype.kind in "iu" and name != "bits of float32":
            out = out.astype(np.int64) & MASK
        if name == "bits of float32":
            keep = ~np.isnan(f)  # a device may have its own NaN
            out, want = out[keep], want[keep]
        bench.equal(out, want, name)
    return bench.done()


def _names(ops: Ops, x: Any, y: Any, edges: Any, at: Any, flags: Any) -> tuple[Any, ...]:
    xp = ops.xp
    return (
        xp.exp(x),
        xp.log(xp.exp(y) + 1.0),
        xp.tanh(y),
        xp.sum(x, -1),
        xp.clip(x, -1.5, 20.0),
        xp.concatenate((x, y), -1),
        xp.where(flags, x, y),
        xp.isfinite(edges),
        xp.round(edges[2:]),
        xp.searchsorted(at[:5], at[5:], side="right"),
        xp.cumsum(at, -1),
    )


def names(target: Target, seed: int) -> Evidence:
    """The names of the framework's namespace that shared code uses."""
    rng, bench = rng_of("ops.vocabulary.names", seed), Bench(target)
    x = rng.uniform(-80, 80, (5, 65)).astype(np.float32)
    y = rng.uniform(-9, 9, (5, 65)).astype(np.float32)
    edges = np.array([np.inf, np.nan, 0.5, 1.5, 2.5, -0.5, -2.5, 3.49, 1e9, -7.0], np.float32)
    at = np.array([0, 3, 3, 9, 9, *rng.integers(-1, 12, 40)], np.int32)
    flags = rng.random((5, 65)) < 0.5
    found = bench.call("names", _names, [Fixed(v) for v in (x, y, edges, at, flags)])
    x64, y64 = wide(x), wide(y)
    rounded: tuple[tuple[str, Any, Any], ...] = (
        ("exp", np.exp(x64), np.exp(x64) * 2),
        ("log", np.log(np.exp(y64) + 1), 3 + np.abs(np.log(np.exp(y64) + 1))),
        ("tanh", np.tanh(y64), 2 * np.abs(np.tanh(y64))),
        ("sum", x64.sum(-1), np.sqrt(65 * (x64 * x64).sum(-1))),
    )
    for out, (name, exact, noise) in zip(found, rounded):
        require(out.dtype.name == "float32", f"xp.{name} of float32 gave {out.dtype.name}")
        bench.judge("vocabulary", out, exact, noise, where=name, single=True)
    wanted: tuple[tuple[str, Numbers], ...] = (
        ("clip", np.clip(x, np.float32(-1.5), np.float32(20))),
        ("concatenate", np.concatenate((x, y), -1)),
        ("where", np.where(flags, x, y)),
        ("isfinite", np.isfinite(edges)),
        ("round (halves to even)", np.round(edges[2:])),
        ("searchsorted (side right)", np.searchsorted(at[:5], at[5:], side="right")),
        ("cumsum", at.astype(np.int64).cumsum()),
    )
    for out, (name, want) in zip(found[4:], wanted, strict=True):
        bench.equal(np.asarray(out), want, f"xp.{name}")
    return bench.done()


def _tally(ops: Ops, ids: Any, given: Any, seeds: Any, broken: Any, model: str) -> tuple[Any, ...]:
    """Counts, draws and orders as the sampler's text does."""
    rows = ops.arange(4)[:, None]
    blank = ops.full((4, 11), 0, "float32")
    marks = ops.put(blank, (rows, ids), 1.0)
    counts = ops.accumulate(blank * 0, (rows, ids), ops.full((4, 30), 1, "float32"))
    best, places = ops.top(counts, 4)

    def turn(word: Any) -> Any:
        return (word * 5 + ops.word(0x9E3779B9)) & ops.word(0xFFFFFFFF)

    mixed = ops.repeat(3, turn, ops.words(seeds) & 0xFFFF)
    is_large = ops.cast(ops.words(seeds) > ops.word(0x7FFFFFFF), "int32")
    narrow = ops.cast(ops.cast(given, model), "float32")
    return (
        marks,
        counts,
        best,
        places,
        mixed >> 7,
        is_large,
        narrow,
        ops.cast(ops.amax(broken) > 0, "int32"),
        ops.amax(broken),
        ops.full((3,), 2, "int32"),
    )


def together(target: Target, seed: int) -> Evidence:
    """The vocabulary as the sampler's text uses it: repeated ids, ties, unsigned words, overflow.
    The host's arrays change as soon as asarray returned."""
    rng, bench, model = rng_of("ops.vocabulary.together", seed), Bench(target), target.dtype
    ids = rng.integers(0, 11, (4, 30)).astype(np.int32)
    given = (rng.normal(size=40_000) * 10.0 ** rng.integers(-3, 4, 40_000)).astype(np.float32)
    given[:6] = 3.4e38, -3.4e38, 70_000, 65_519, np.inf, np.nan
    seeds = rng.integers(-(2**31), 2**31, 50_000, dtype=np.int64).astype(np.int32)
    broken = rng.normal(size=(5, 17)).astype(np.float32)
    broken[[0, 2], rng.integers(17, size=2)] = np.nan
    values = []
    for host in (ids, given, seeds, broken):
        own = host.copy()
        with calling("asarray"):
            values.append(target.ops.asarray(own))
        own[...] = 3

    def fn(ids: Any, given: Any, seeds: Any, broken: Any) -> tuple[Any, ...]:
        return _tally(target.ops, ids, given, seeds, broken, model)

    found = [np.asarray(x) for x in target.call(("ops", "vocabulary together"), fn, *values)]
    counts = np.stack([np.bincount(row, minlength=11) for row in ids])
    order = np.argsort(-counts, axis=-1, kind="stable")[:, :4]
    word = seeds.astype(np.int64) & 0xFFFF
    for _ in range(3):
        word = (word * 5 + 0x9E3779B9) & MASK
    with np.errstate(over="ignore"):
        narrow = wide(given.astype(numpy_dtype(model)))
    wanted: tuple[tuple[str, str, Any], ...] = (
        ("put of one constant at repeated ids", "float32", counts > 0),
        ("accumulate of ones at repeated ids", "float32", counts),
        ("the largest counts", "float32", np.take_along_axis(counts, order, -1)),
        ("ids of the largest counts, ties to the lowest", "int32", order),
        ("words after three rounds, shifted", "", word >> 7),
        ("words above 2^31 - 1", "int32", seeds < 0),
        (f"float32 through {model}: to nearest, too large is infinite", "float32", narrow),
        ("a row with NaN has no maximum above 0", "int32", broken.max(-1) > 0),
        ("amax", "float32", broken.max(-1)),
        ("full of int32", "int32", np.full(3, 2)),
    )
    for out, (name, dtype, want) in zip(found, wanted, strict=True):
        require(dtype in ("", out.dtype.name), f"{name}: the result is {out.dtype}, not {dtype}")
        out, want = out.astype(np.float64), np.asarray(want).astype(np.float64)
        bench.evidence += require_equal(out + 0.0, want + 0.0, name, nan_equal=True)
    return bench.done()


_CORE = frozenset({"core"})

CASES: tuple[Case, ...] = (
    Case("ops.vocabulary.arrays", "copies host arrays of any layout", arrays, _CORE),
    Case("ops.vocabulary.made", "makes arrays of the asked dtype and value", made, _CORE),
    Case(
        "ops.vocabulary.casts",
        "rounds to nearest, ties to even",
        casts,
        _CORE,
        every_dtype=True,
    ),
    Case(
        "ops.vocabulary.scatters",
        "keeps one of repeated writes and adds all of repeated sums",
        scatters,
        _CORE,
    ),
    Case(
        "ops.vocabulary.order",
        "orders by value and then by id, and keeps NaN in a maximum",
        order,
        _CORE,
    ),
    Case("ops.vocabulary.words", "computes with unsigned words of 32 bits", words, _CORE),
    Case(
        "ops.vocabulary.names",
        "has the names that shared code calls",
        names,
        _CORE,
        scored=False,  # whoever lacks one fails everywhere; it says which
    ),
    Case(
        "ops.vocabulary.together",
        "counts, orders, casts and mixes words as the sampler's text does",
        together,
        _CORE,
        every_dtype=True,
    ),
)

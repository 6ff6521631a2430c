"""Fills a model's parameters from a checkpoint, or with seeded random numbers.

Everything is checked by name, shape and dtype before the first tensor is read; then one parameter
at a time is read and handed to the runtime.

Knows: rules, sources, the runtime's `load`. Does not know: families, layouts.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from vllm_core.backend import Runtime
from vllm_core.errors import WeightError
from vllm_core.ops import HostArray, LazyArray, Param, Part
from vllm_core.weights.rules import PartRule, TensorRule, WeightRule, WeightRules
from vllm_core.weights.source import CodeFormat, WeightSource
from vllm_core.weights.stored import Kept, actual_name

Params = dict[str, Any]
Progress = Callable[[int], None]

_PLAIN = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Dtypes that hold a dense weight, and their bytes per value."""


def load_params(
    rules: WeightRules,
    source: WeightSource,
    runtime: Runtime,
    layer_specs: Sequence[Any],
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Params:
    """The parameters on the device, "layers" in the form that `ops.layers` walks.

    kept: what is handed out as codes, from `kept_codes`. `progress` gets the bytes read since its
    last call; they add up to source.num_bytes(). Raises WeightError for a tensor that is missing,
    unused, of another shape or not dense; OutOfMemory and NotSupported come from the runtime.
    """
    names = _match_names(rules, source)
    meter = _Meter(source, list(names.values()), progress)

    def tensor(rule: TensorRule, spec_name: str, key: str) -> LazyArray:
        def load() -> HostArray:
            return _assemble(rule, (meter.load(names[name]) for name in rule.names))

        dtype = "float32" if rule.add else source.dtype(names[rule.names[0]])
        return LazyArray(rule.loaded_shape, dtype, load)

    def part(rule: WeightRule, place: int) -> Part:
        formats = (kept or {}).get(rule.spec.name)
        if formats is None:
            return _dense_part(rule, rule.parts[place], tensor)
        given = rule.parts[place]
        more = {key: tensor(t, rule.spec.name, key) for key, t in given.tensors.items()}
        del more["weight"]
        name = names[given.tensors["weight"].names[0]]
        size = rule.spec.shape[-1]
        codes = _lazy_codes(formats[place], given.rows, size, cache(lambda: meter.codes(name)))
        return Part(formats[place].scheme, codes | more, given.rows)

    params = _fill(rules, runtime, part, layer_specs)
    meter.finish()
    return params


def dummy_params(
    rules: WeightRules,
    runtime: Runtime,
    layer_specs: Sequence[Any],
    seed: int = 0,
    progress: Progress | None = None,
) -> Params:
    """Parameters of the same shapes without a file, the same for the same seed.

    Norms are 1, biases 0, the rest is normal with variance 1 / inputs. `progress` gets the bytes
    generated since its last call.
    """

    def tensor(rule: TensorRule, spec_name: str, key: str) -> LazyArray:
        shape = rule.loaded_shape

        def load() -> HostArray:
            if key == "bias":
                array = np.zeros(shape, np.float32)
            elif len(shape) == 1:
                array = np.ones(shape, np.float32)
            else:
                place = zlib.crc32(f"{spec_name} {rule.names[0]}".encode())
                source = np.random.default_rng([place, seed % 2**64])
                array = source.standard_normal(shape, np.float32)
                array *= np.float32(shape[-1] ** -0.5)
            if progress is not None:
                progress(array.nbytes)
            return array

        return LazyArray(shape, "float32", load)

    def part(rule: WeightRule, place: int) -> Part:
        return _dense_part(rule, rule.parts[place], tensor)

    return _fill(rules, runtime, part, layer_specs)


def _dense_part(
    rule: WeightRule, part: PartRule, tensor: Callable[[TensorRule, str, str], LazyArray]
) -> Part:
    tensors = {key: tensor(t, rule.spec.name, key) for key, t in part.tensors.items()}
    return Part("dense", tensors, part.rows)


def _lazy_codes(
    form: CodeFormat, rows: int, size: int, load: Callable[[], dict[str, HostArray]]
) -> dict[str, HostArray | LazyArray]:
    """load: of all its arrays, made once."""
    groups = rows, size // form.group
    found: dict[str, HostArray | LazyArray] = {
        "codes": LazyArray((rows, size), "uint8", lambda: load()["codes"]),
        "scales": LazyArray(groups, "float32", lambda: load()["scales"]),
    }
    if form.has_mins:
        found["mins"] = LazyArray(groups, "float32", lambda: load()["mins"])
    return found


def _fill(
    rules: WeightRules,
    runtime: Runtime,
    part: Callable[[WeightRule, int], Part],
    layer_specs: Sequence[Any],
) -> Params:
    """A tree of Params like that of the rules; a rule in two places gives one Param."""
    done: dict[int, Param] = {}

    def leaf(rule: WeightRule) -> Param:
        if id(rule) not in done:
            parts = [part(rule, place) for place in range(len(rule.parts))]
            done[id(rule)] = runtime.load(rule.spec, parts)
        return done[id(rule)]

    def walk(node: Any) -> Any:
        if isinstance(node, WeightRule):
            return leaf(node)
        if isinstance(node, dict):
            return {name: walk(child) for name, child in node.items()}
        return [walk(child) for child in node]

    params: Params = walk({name: node for name, node in rules.params.items() if name != "layers"})
    params["layers"] = runtime.ops.stack_layers(walk(rules.params["layers"]), layer_specs)
    return params


def _assemble(rule: TensorRule, arrays: Iterator[HostArray]) -> HostArray:
    """The tensor as the model needs it; of many arrays only one is held beside the result."""
    first = next(arrays)
    if rule.experts is not None:
        out = np.empty(rule.loaded_shape, first.dtype)
        rows = out.reshape(len(rule.names), *rule.shape)
        rows[0] = first
        for place, array in enumerate(arrays, 1):
            rows[place] = array
        return out
    if rule.add:
        first = (first if first.dtype == np.float64 else first.astype(np.float32)) + rule.add
    return first.T if rule.transpose else first


def _match_names(rules: WeightRules, source: WeightSource) -> dict[str, str]:
    """Name in the rules -> name in the checkpoint, all checked."""
    there = set(source.names())
    found: dict[str, str] = {}
    missing: list[str] = []
    for rule in rules.leaves():
        for part in rule.parts:
            for tensor in part.tensors.values():
                for name in tensor.names:
                    actual = actual_name(name, rules.prefix, there)
                    if actual is None:
                        missing.append(name)
                        continue
                    found[name] = actual
                    _check_tensor(source, actual, tensor.shape)
    if missing:
        raise WeightError(
            f"the checkpoint lacks {len(missing)} tensors that the model needs: {_some(missing)}; "
            "it is incomplete, or its config describes another model"
        )
    patterns = [re.compile(pattern) for pattern in rules.ignored]
    unused = sorted(
        name
        for name in there - set(found.values())
        if not any(pattern.fullmatch(name) for pattern in patterns)
    )
    if unused:
        raise WeightError(
            f"the checkpoint holds {len(unused)} tensors that the model does not use: "
            f"{_some(unused)}; its config describes another model or variant"
        )
    return found


def _check_tensor(source: WeightSource, name: str, shape: tuple[int, ...]) -> None:
    if tuple(source.shape(name)) != shape:
        raise WeightError(
            f"tensor {name!r} has shape {list(source.shape(name))}, but the config asks for "
            f"{list(shape)}; config and weights belong to different models"
        )
    if source.dtype(name) not in _PLAIN:
        raise WeightError(
            f"tensor {name!r} has dtype {source.dtype(name)}, but a plain weight has one of "
            f"{', '.join(_PLAIN)}; use a checkpoint that is not quantised"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


class _Meter:
    """Reads tensors and tells how far it is, in file bytes (GGUF stores less than it loads)."""

    def __init__(
        self, source: WeightSource, names: Sequence[str], progress: Progress | None
    ) -> None:
        self._source, self._progress = source, progress
        self._num_bytes = source.num_bytes()
        self._total = sum(map(self._size, names))
        self._read = self._told = 0

    def _size(self, name: str) -> int:
        return math.prod(self._source.shape(name)) * _PLAIN[self._source.dtype(name)]

    def load(self, name: str) -> HostArray:
        array = self._source.load(name)
        self._count(name)
        return array

    def codes(self, name: str) -> dict[str, HostArray]:
        arrays = self._source.load_codes(name)
        self._count(name)
        return arrays

    def _count(self, name: str) -> None:
        self._read += self._size(name)
        self._tell(self._num_bytes * self._read // self._total)

    def finish(self) -> None:
        """Tells what is left, for bytes that no rule reads."""
        self._tell(self._num_bytes)

    def _tell(self, reached: int) -> None:
        if self._progress is not None and reached > self._told:
            self._progress(reached - self._told)
            self._told = reached

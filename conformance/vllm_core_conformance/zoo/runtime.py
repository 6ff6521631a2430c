"""Runtimes of our own over numpy, and the collection that turns a class with one mistake into a
Fault.

Knows: the seam, how programs may be run. Does not know: which mistakes there are, cases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from vllm_core.backend import (
    BucketPolicy,
    Capabilities,
    Executable,
    OpenConfig,
    Program,
    RectangleTables,
    Runtime,
    SingleDevice,
)
from vllm_core.bindings.numpy import NumpyOps, NumpyRuntime, Ready
from vllm_core.errors import NotSupported
from vllm_core.ops import BucketKey, Features, HostArray, Param
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.kernel import Kernel

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = frozenset({"float32", "bfloat16", "float16"})
MAX_LOGPROBS = 20

Open = Callable[[OpenConfig], Runtime]
C = TypeVar("C", bound=type)


class ZooRuntime(NumpyRuntime):
    """Runs programs at once. Class attributes say what it is made of."""

    ATTENTION: type[Kernel] = Kernel
    OPS: type[NumpyOps] = NumpyOps
    CAPS = Capabilities(dtypes=DTYPES, default_dtype="float32", shares_host_memory=True)

    def __init__(self, config: OpenConfig) -> None:
        self.caps = self.declared()
        self.dtype = self.chosen_dtype(config)
        self.ops = self.OPS()
        self.attention = self.ATTENTION(self.dtype)
        self.block_tables = RectangleTables(self.ops)
        self.comm = SingleDevice()

    def declared(self) -> Capabilities:
        return self.CAPS

    def chosen_dtype(self, config: OpenConfig) -> str:
        return self.caps.choose_dtype(config.dtype, config.checkpoint_dtype)

    def fetch(self, value: Any) -> Ready:
        return Ready(mapped(np.array, value))


class BucketRuntime(ZooRuntime):
    """As a device with static shapes: few buckets, compilations counted."""

    CAPS = replace(ZooRuntime.CAPS, static_shapes=True)

    def __init__(self, config: OpenConfig) -> None:
        super().__init__(config)
        self.compiled = 0

    def num_compilations(self) -> int:
        return self.compiled

    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        full = Features(draw=True, filters=True, penalties=True, bias=True)
        all_of_it = replace(full, logprobs=MAX_LOGPROBS, keep_hidden=True)
        return BucketPolicy(
            tokens=self.sizes(max_tokens),
            rows=self.sizes(max_rows),
            widths=(max_width,),
            features=(Features(), full, all_of_it),
        )

    def sizes(self, largest: int) -> tuple[int, ...]:
        small = [16 << shift for shift in range(0, 24, 2)]
        return (*(size for size in small if size < largest), largest)

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)
        seen: set[Any] = set()

        def call(*args: Any) -> tuple[Any, ...]:
            if self.signature(args) not in seen:
                seen.add(self.signature(args))
                self.compiled += 1
            return run(*args)

        return call

    def signature(self, args: Sequence[Any]) -> Any:
        return tuple((x.shape, str(x.dtype)) for x in leaves(tuple(args)))


class GraphRuntime(ZooRuntime):
    """As a device with captured graphs: a program reads buffers of its own, into which the
    arguments of each call are copied, and its results are copied out."""

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        run = super().compile(program, key)
        graphs: dict[Any, list[Any]] = {}

        def replay(*args: Any) -> tuple[Any, ...]:
            shapes = tuple((x.shape, str(x.dtype)) for x in leaves(tuple(args)))
            held = graphs.get(shapes)
            if held is None:
                graphs[shapes] = held = [mapped(np.array, x) for x in args]
            else:
                for place, value in enumerate(args):
                    held[place] = self.filled(place, held[place], value)
            results = run(
                *[self.given(x, place in program.consumes) for place, x in enumerate(held)]
            )
            for place in program.consumes:
                mapped(_poison, args[place])
            return tuple(self.taken(x) for x in results)

        return replay

    def given(self, held: Any, is_consumed: bool) -> Any:
        """What the program gets of a buffer; a consumed one is poisoned, so it gets a copy."""
        return mapped(np.array, held) if is_consumed else held

    def filled(self, place: int, held: Any, value: Any) -> Any:
        """The buffer of one argument with the content of this call."""
        for buffer, x in zip(leaves(held), leaves(value), strict=True):
            buffer[...] = x
        return held

    def taken(self, result: Any) -> Any:
        return mapped(np.array, result)


def mapped(function: Callable[[HostArray], Any], tree: Any) -> Any:
    """function over the arrays of a tree of tuples, dicts and Params."""
    if isinstance(tree, np.ndarray):
        return function(tree)
    if isinstance(tree, dict):
        return {name: mapped(function, x) for name, x in tree.items()}
    if isinstance(tree, Param):
        return Param(mapped(function, tree.arrays), tree.static)
    if isinstance(tree, (tuple, list)):
        values = [mapped(function, x) for x in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree


def leaves(tree: Any) -> list[HostArray]:
    found: list[HostArray] = []
    mapped(found.append, tree)
    return found


def _poison(x: HostArray) -> None:
    x.fill(np.iinfo(x.dtype).min // 2 if x.dtype.kind in "iu" else np.nan)


class Collection:
    """Faults of one area, gathered by decorators; a class's name in snake_case is the fault's."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.faults: list[Fault] = []

    def kernel(
        self, says: str, runtime: type[ZooRuntime] = ZooRuntime, **facts: Any
    ) -> Callable[[C], C]:
        """Around a subclass of Kernel."""

        def add(cls: C) -> C:
            made = type(f"{cls.__name__}Runtime", (runtime,), {"ATTENTION": cls})
            self._add(cls.__name__, says, made, facts)
            return cls

        return add

    def ops(
        self, says: str, runtime: type[ZooRuntime] = ZooRuntime, **facts: Any
    ) -> Callable[[C], C]:
        """Around a subclass of NumpyOps."""

        def add(cls: C) -> C:
            made = type(f"{cls.__name__}Runtime", (runtime,), {"OPS": cls})
            self._add(cls.__name__, says, made, facts)
            return cls

        return add

    def runtime(self, says: str, **facts: Any) -> Callable[[C], C]:
        """Around a subclass of ZooRuntime."""

        def add(cls: C) -> C:
            self._add(cls.__name__, says, cls, facts)
            return cls

        return add

    def open(self, says: str, **facts: Any) -> Callable[[Open], Open]:
        """Around a function (OpenConfig) -> Runtime."""

        def add(function: Open) -> Open:
            self._add(function.__name__, says, function, facts)
            return function

        return add

    def _add(self, name: str, says: str, opening: Open, facts: dict[str, Any]) -> None:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
        self.faults.append(Fault(name, self.area, says, opening, **facts))


def torch_open(config: OpenConfig) -> Any:
    """The torch binding's runtime on one thread; NotSupported where torch is missing."""
    try:
        from vllm_core.bindings import torch as binding
    except ImportError as error:
        raise NotSupported("this fault lives over torch, which is not installed") from error
    return binding.open_runtime(replace(config, threads=1))


def jax_open(config: OpenConfig) -> Any:
    """The JAX binding's runtime; NotSupported where jax is missing."""
    try:
        from vllm_core.bindings import jax as binding
    except ImportError as error:
        raise NotSupported("this fault lives over jax, which is not installed") from error
    return binding.open_runtime(config)

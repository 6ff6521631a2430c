"""The backend under test: one opened runtime in one dtype, called through the seam only.

Whatever the vendor's code raises comes out as `Raised`, so that it is never taken for an error of
the suite.

Knows: the seam. Does not know: which backend, which case.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import (
    AttentionSpec,
    BackendInfo,
    Executable,
    OpenConfig,
    Program,
    Runtime,
    StepConstraints,
)
from vllm_core.ops import Array, BucketKey, Ops, Param, ParamSpec, Part
from vllm_core_conformance.case import require

Numbers = NDArray[Any]


class Raised(Exception):
    """The vendor's code raised `error` while doing `what`."""

    def __init__(self, what: str, error: BaseException) -> None:
        first = (str(error).strip().splitlines() or [""])[0]
        super().__init__(f"{what} raised {type(error).__name__}: {first}")
        self.what, self.error = what, error


@contextmanager
def calling(what: str) -> Iterator[None]:
    """Around every call of the vendor's code."""
    try:
        yield
    except Raised:
        raise
    except Exception as error:
        raise Raised(what, error) from error


@dataclass(frozen=True)
class Source:
    """Where a backend comes from."""

    name: str
    open: Callable[[OpenConfig], Runtime]
    info: BackendInfo | None = None
    """None where only an opening function was named."""
    distribution: str | None = None
    version: str | None = None


class Target:
    """One opened runtime. Programs are compiled once per tag and kept, as an engine keeps them."""

    def __init__(self, source: Source, dtype: str = "auto") -> None:
        self.source = source
        with calling("open"):
            self.runtime = source.open(OpenConfig(dtype=dtype, threads=None))
        self.caps = self.runtime.caps
        self.dtype = self.runtime.dtype
        self._programs: dict[Hashable, Executable] = {}
        self.memo: dict[Hashable, Any] = {}
        """For cases that share something costly about this runtime."""
        self.compiled: dict[str, int] = {}
        """Compilations by op: the words that its tag begins with."""

    @property
    def ops(self) -> Ops:
        return self.runtime.ops

    @property
    def is_static(self) -> bool:
        return self.caps.static_shapes

    def fresh(self, dtype: str | None = None) -> Target:
        """Another runtime of the same backend."""
        return Target(self.source, dtype or self.dtype)

    def close(self) -> None:
        self._programs.clear()
        self.memo.clear()
        with calling("close"):
            self.runtime.close()

    # ---- facts that cases rely on
    def block_tokens(self, spec: AttentionSpec) -> tuple[int, ...]:
        """The offered block sizes; Failed where none can be used."""
        with calling("block_tokens"):
            sizes = tuple(self.runtime.attention.block_tokens(spec))
        require(
            bool(sizes) and all(isinstance(x, int) and x > 0 for x in sizes),
            f"block_tokens gave {sizes!r}: no cache can be made of that",
        )
        return sizes

    def usual_block(self, spec: AttentionSpec) -> int:
        """16 tokens where that is offered, else the preferred size."""
        offered = self.block_tokens(spec)
        return 16 if 16 in offered else offered[0]

    def constraints(self) -> StepConstraints:
        """The declared limits of a step; Failed where no step could keep to them."""
        with calling("constraints"):
            found = self.runtime.constraints()
        limits = (found.chunk_multiple, found.max_prefills or 1, found.max_tokens or 1)
        require(min(limits) > 0, f"constraints() gave {found}: no step could ever run")
        return found

    # ---- values
    def round(self, x: Numbers) -> Numbers:
        """float64 numbers that the dtype holds exactly: what the backend consumes, and the
        oracle too."""
        return round_to(x, self.dtype)

    def array(self, x: Numbers, dtype: str | None = None) -> Array:
        """On the device: floats in the model dtype (they must be exact in it) unless named
        otherwise; integers and booleans as they are."""
        x = np.asarray(x)
        with calling("asarray"):
            if x.dtype.kind != "f":
                return self.ops.asarray(x)
            dtype = dtype or self.dtype
            if dtype == "float64":
                return self.ops.asarray(x.astype(np.float64))
            with np.errstate(over="ignore"):
                single = x.astype(np.float32)
            return self.ops.cast(self.ops.asarray(single), dtype)

    def param(self, role: str, tensors: Mapping[str, Numbers], name: str = "weight") -> Param:
        """Dense weights on the device, as the loader would load them: float32 (or float64) host
        arrays."""
        wide = np.float64 if self.dtype == "float64" else np.float32
        host = {key: np.asarray(x).astype(wide) for key, x in tensors.items()}
        weight = host["weight"]
        part = Part("dense", host, weight.shape[0])
        return self.load(ParamSpec(name, weight.shape, role), [part])

    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        with calling(f"load of {spec.name}"):
            return self.runtime.load(spec, parts)

    def fetch(self, value: Any) -> Any:
        """The same tree on the host, in the device's own dtypes."""
        with calling("fetch"):
            return self.runtime.fetch(value).wait()

    # ---- programs
    def compile(
        self,
        tag: Hashable,
        fn: Callable[..., tuple[Any, ...]],
        *,
        name: str = "score",
        consumes: tuple[int, ...] = (),
        num_results: int | None = None,
        key: BucketKey | None = None,
    ) -> Executable:
        """Compiled once per tag (None: every time), so fn must close over nothing that a seed
        decides."""
        if tag is not None and tag in self._programs:
            return self._programs[tag]
        program = Program(name, fn, consumes=consumes, num_results=num_results)
        op = _op_of(tag)
        with calling(f"compile of program {name!r}"), self._counting(op):
            run = self.runtime.compile(program, key)
        if self.is_static:
            run = self._counted(op, run)
        if tag is not None:
            self._programs[tag] = run
        return run

    def _counted(self, op: str, run: Executable) -> Executable:
        """The same; what its calls compile is counted for the op."""

        def call(*args: Any) -> tuple[Any, ...]:
            with self._counting(op):
                return run(*args)

        return call

    @contextmanager
    def _counting(self, op: str) -> Iterator[None]:
        before = self.runtime.num_compilations()
        try:
            yield
        finally:
            more = self.runtime.num_compilations() - before
            if more:
                self.compiled[op] = self.compiled.get(op, 0) + more

    def call(
        self, tag: Hashable, fn: Callable[..., tuple[Any, ...]], *args: Any
    ) -> tuple[Any, ...]:
        """Runs fn on device values as a program without state; -> its results on the host."""
        run = self.compile(tag, fn)
        with calling(f"program {tag!r}"):
            results = run(*args)
        found: tuple[Any, ...] = self.fetch(results)
        return found


def _op_of(tag: Hashable) -> str:
    """The leading words of a tag: ("ops", ("rope", 8)) -> "ops rope"; the rest is the key."""
    words: list[str] = []
    while isinstance(tag, tuple) and tag and isinstance(tag[0], str) and len(words) < 2:
        words.append(tag[0])
        tag = tag[1] if len(tag) > 1 else None
    if isinstance(tag, str) and len(words) < 2:
        words.append(tag)
    return " ".join(words) or "untagged"


def takes(method: Any, argument: str) -> bool:
    """Whether it can be called with an argument of this name."""
    parameters = inspect.signature(method).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype for a model dtype."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def round_to(x: Numbers, dtype: str) -> Numbers:
    """The nearest numbers that `dtype` holds, in float64."""
    with np.errstate(over="ignore", under="ignore"):
        rounded: Numbers = np.asarray(x, np.float64).astype(numpy_dtype(dtype)).astype(np.float64)
    return rounded


def wide(x: Any) -> Numbers:
    """A fetched float array in float64; others as they are."""
    found: Numbers = np.asarray(x)
    if found.dtype.kind in "fV" or found.dtype.name == "bfloat16":
        return found.astype(np.float64)
    return found

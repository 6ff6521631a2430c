"""Opens a binding's runtime with some methods replaced by wrong ones.

A wrong method is a function (base, *args): base is the right one. Modules that need torch or jax
import them when they are called, so that the zoo can be listed without.

Knows: bindings by name, parts of a runtime. Does not know: what is wrong with a method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_core.backend import OpenConfig, Runtime
from vllm_core.ops import Param

Method = Callable[..., Any]
Open = Callable[[OpenConfig], Runtime]
Numbers = NDArray[Any]


def opened_by(binding: str, config: OpenConfig) -> Runtime:
    """The right runtime of a binding: "numpy", "torch" or "jax"."""
    module = importlib.import_module(f"vllm_core.bindings.{binding}")
    runtime: Runtime = module.open_runtime(config)
    return runtime


def replaced(owner: object, **wrong: Method) -> None:
    """Puts wrong(base, ...) in the place of each method of one object."""
    for name, function in wrong.items():
        setattr(owner, name, partial(function, getattr(owner, name)))


def planted(plant: Callable[[Runtime], None], binding: str = "numpy") -> Open:
    """An opening function: the runtime of a binding after plant(runtime). What a fault remembers
    belongs to plant, so that each runtime has its own."""

    def open_wrong(config: OpenConfig) -> Runtime:
        runtime = opened_by(binding, config)
        plant(runtime)
        return runtime

    return open_wrong


def ops(binding: str = "numpy", **wrong: Method) -> Open:
    """A binding whose ops have wrong methods."""
    return planted(lambda runtime: replaced(runtime.ops, **wrong), binding)


def tables(**wrong: Method) -> Open:
    """The reference with wrong methods of its block tables."""
    return planted(lambda runtime: replaced(runtime.block_tables, **wrong))


def runtime(binding: str = "numpy", **wrong: Method) -> Open:
    """A binding with wrong methods of the runtime itself."""
    return planted(lambda opened: replaced(opened, **wrong), binding)


def numpy_ops(cls: Callable[[], Any]) -> Open:
    """The reference with another class of ops."""

    def plant(runtime: Runtime) -> None:
        runtime.ops = cls()
        vars(runtime.block_tables)["ops"] = runtime.ops

    return planted(plant)


def as_bfloat16(x: Numbers) -> Numbers:
    """Rounded to the nearest bfloat16, in the dtype it had."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) & np.uint64(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32).astype(x.dtype)


def flat_memory(base: Method, x: Numbers, *rest: Any) -> Any:
    """Reads size elements from where x begins, whatever its strides say."""
    if not x.flags.c_contiguous and x.ndim > 1 and x.base is not None:
        x = np.lib.stride_tricks.as_strided(x, x.shape, np.empty(x.shape, x.dtype).strides)
    return base(x.copy(), *rest)


def without(param: Param, name: str) -> Param:
    return Param({key: x for key, x in param.arrays.items() if key != name})

"""Between numpy and torch, bfloat16 included.

Knows: dtype names and bits. Does not know: what the values mean.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch

from vllm_core.errors import NotSupported
from vllm_core.ops import HostArray

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
}


def dtype_of(name: str) -> torch.dtype:
    """torch's dtype for a numpy name."""
    if name not in DTYPES:
        raise NotSupported(f"torch has no dtype {name!r} here; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def from_host(array: HostArray) -> torch.Tensor:
    """A tensor that shares the array's memory where numpy allows it, else a copy."""
    # numpy calls one reversed row contiguous, torch does not
    is_reversed = any(stride < 0 for stride in array.strides)
    if is_reversed or not array.flags.c_contiguous or not array.flags.writeable:
        array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_host(x: torch.Tensor) -> HostArray:
    """A numpy array that shares memory with a tensor on the host."""
    if x.dtype == torch.bfloat16:
        bits: HostArray = x.contiguous().view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: HostArray = x.numpy()
    return array


def map_tree(function: Any, tree: Any) -> Any:
    """function on every tensor of nested tuples, lists and dicts; other leaves stay."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        values = [map_tree(function, x) for x in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    if isinstance(tree, list):
        return [map_tree(function, x) for x in tree]
    if isinstance(tree, dict):
        return {key: map_tree(function, x) for key, x in tree.items()}
    return tree

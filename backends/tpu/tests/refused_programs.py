"""Programs that no TPU takes, given to the real compiler: prints name, our error's type, message.

A script, because libtpu needs its environment before the process starts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vllm_core.errors import VllmCoreError
from vllm_core_tpu.compile import targets
from vllm_core_tpu.compile.kernels import compiled
from vllm_core_tpu.compiler_errors import compiling

TILE = jax.ShapeDtypeStruct((8, 128), jnp.float32)


def copies(first: int, rows: int) -> Any:
    """Rows of an array in HBM, whose tiles have 8 of them."""

    def kernel(x: Any, out: Any, scratch: Any, sem: Any) -> None:
        copy = pltpu.make_async_copy(x.at[pl.ds(first, rows)], scratch, sem)
        copy.start()
        copy.wait()
        out[...] = jnp.zeros_like(out) + scratch[0:1].astype(out.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=TILE,
        in_specs=[pl.BlockSpec(memory_space=pltpu.MemorySpace.HBM)],
        scratch_shapes=[pltpu.VMEM((rows, 128), jnp.bfloat16), pltpu.SemaphoreType.DMA],
    )


def scratch(x: Any) -> Any:
    def kernel(x: Any, out: Any, room: Any) -> None:
        room[...] = jnp.zeros_like(room) + x[0:1]
        out[...] = room[0:8]

    room = pltpu.VMEM((1 << 19, 128), jnp.float32)
    return pl.pallas_call(kernel, out_shape=TILE, scratch_shapes=[room])(x)


def doubled(x: Any) -> Any:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...] * 2

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


def scalars(numbers: Any, x: Any) -> Any:
    def kernel(numbers: Any, x: Any, out: Any) -> None:
        out[...] = x[...] * numbers[0]

    spec = pl.BlockSpec((8, 128), lambda i, *_: (0, 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(1,), in_specs=[spec], out_specs=spec
    )
    return pl.pallas_call(kernel, out_shape=TILE, grid_spec=grid)(numbers, x)


def gather(x: Any, index: Any) -> Any:
    def kernel(x: Any, index: Any, out: Any) -> None:
        out[...] = x[...][index[...][:, 0]]

    return pl.pallas_call(kernel, out_shape=TILE)(x, index)


def sort(x: Any) -> Any:
    def kernel(x: Any, out: Any) -> None:
        out[...] = lax.sort(x[...])

    return pl.pallas_call(kernel, out_shape=TILE)(x)


def block(x: Any) -> Any:
    def kernel(x: Any, out: Any) -> None:
        out[...] = x[...]

    spec = pl.BlockSpec((5, 100), lambda i: (i, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid=(10,), in_specs=[spec], out_specs=spec, out_shape=shape)(x)


def array(*shape: int, dtype: str = "float32") -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


LONG = array(256, 128, dtype="bfloat16")
PROGRAMS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "sound": (copies(16, 16), (LONG,)),
    "offset": (copies(3, 16), (LONG,)),
    "rows": (copies(0, 5), (LONG,)),
    "scratch": (scratch, (TILE,)),
    "windows": (doubled, (array(1 << 18, 128),)),
    "scalars": (scalars, (array(1 << 20, dtype="int32"), TILE)),
    "scalars_just": (scalars, (array(1 << 18, dtype="int32"), TILE)),
    "hbm": (lambda x: jnp.sort(x @ x.T, 0), (array(1 << 16, 1024),)),
    "gather": (gather, (array(64, 128), array(8, 128, dtype="int32"))),
    "sort": (sort, (TILE,)),
    "block": (block, (array(50, 200),)),
}


def main() -> None:
    sharding = targets.sharding("v5e")
    for name, (function, arguments) in PROGRAMS.items():
        try:
            with compiling(f"program {name}"):
                compiled(function, arguments, (), sharding)
            print(f"{name}\tnone\t", flush=True)
        except VllmCoreError as error:
            print(f"{name}\t{type(error).__name__}\t{error}", flush=True)


if __name__ == "__main__":
    main()

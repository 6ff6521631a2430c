"""A runtime for any device that torch drives, without compilation.

On the CPU, where torch runs a call before it returns, programs run in order on a thread of their
own (`Stream`), so that the host prepares the next step meanwhile; other devices have queues.

Knows: torch's devices, threads, copies. Does not know: vendors, programs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch

from vllm_core.backend import (
    Capabilities,
    DeviceStep,
    Executable,
    Fetch,
    HostStep,
    MemoryReport,
    Program,
    RectangleTables,
    Runtime,
    SingleDevice,
)
from vllm_core.bindings import machine
from vllm_core.bindings.parts import SCHEMES, dense_tensors
from vllm_core.bindings.torch import packing
from vllm_core.bindings.torch.attention import TorchAttention
from vllm_core.bindings.torch.bag_attention import BagAttention
from vllm_core.bindings.torch.convert import dtype_of, from_host, map_tree, to_host
from vllm_core.bindings.torch.ops import TorchOps
from vllm_core.bindings.torch.stream import Deferred, Stream, resolve
from vllm_core.errors import BackendError, NotSupported, OutOfMemory
from vllm_core.ops import BucketKey, HostArray, Param, ParamSpec, Part

DTYPES = ("float32", "bfloat16", "float16", "float64")


class TorchRuntime(Runtime):
    """One device. `synchronous` runs programs in the caller's thread, as devices with queues do."""

    def __init__(
        self,
        device: torch.device,
        dtype: str = "auto",
        threads: int | None = None,
        synchronous: bool | None = None,
        checkpoint_dtype: str | None = None,
    ) -> None:
        default = "bfloat16" if _is_bfloat16_fast(device) else "float32"
        if device.type == "cpu" and checkpoint_dtype in ("bfloat16", "float16"):
            checkpoint_dtype = default  # 16 bits are stored; what is fast decides
        own = checkpoint_dtype if checkpoint_dtype in DTYPES else default
        self.dtype = own if dtype == "auto" else dtype
        if self.dtype not in DTYPES:
            raise NotSupported(
                f"torch computes in {', '.join(DTYPES)} here, not in {dtype!r}; choose one of these"
            )
        is_host = device.type == "cpu"
        self.caps = Capabilities(
            dtypes=frozenset(DTYPES),
            default_dtype=default,
            schemes=SCHEMES,
            shares_host_memory=is_host,
        )
        self.torch_device = device
        self.threads = threads or machine.usable_cpus()
        self._is_host = is_host
        self._stream: Stream | None = None
        if self._is_host:
            # only the thread that runs programs may open a team of OpenMP threads: with a second
            # team there are more threads than CPUs, and libgomp then sleeps instead of spinning at
            # every one of a step's two hundred barriers (32 rows: 55 ms a step instead of 38)
            _use_threads(self.threads if synchronous else 1)
            if not synchronous:
                self._stream = Stream(begin=partial(_use_threads, self.threads))
                weakref.finalize(self, self._stream.close)  # also at exit
        self.ops = TorchOps(device, self.synchronize)
        # tables of 16 bits would round the scores
        uses_bags = self._is_host and self.dtype == "float32"
        attention = BagAttention if uses_bags else TorchAttention
        self.attention = attention(device, self.dtype, self.synchronize)
        self.block_tables = RectangleTables(self.ops)
        self.comm = SingleDevice()

    def use_threads(self, count: int) -> None:
        """Of torch's own, in the thread that runs programs."""
        if self._stream is None:
            _use_threads(count)
        else:
            self._stream.wait(self._stream.submit(partial(_use_threads, count)))

    def synchronize(self) -> None:
        """Waits until what was submitted has run."""
        if self._stream is not None:
            self._stream.synchronize()
        elif not self._is_host:
            torch.accelerator.synchronize(self.torch_device)

    # ---- weights
    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        if self._stream is None:
            return self._load(spec, parts)
        param: Param = self._stream.wait(self._stream.submit(lambda: self._load(spec, parts)))
        return param

    def _load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        dtype = dtype_of(self.dtype)
        if spec.role == "norm" and self.dtype != "float64":
            dtype = torch.float32
        try:
            found = {
                name: [from_host(x).to(self.torch_device, dtype, copy=True) for x in tensors]
                for name, tensors in dense_tensors(spec, parts).items()
            }
            arrays = {name: xs[0] if len(xs) == 1 else torch.cat(xs) for name, xs in found.items()}
            spec.check(arrays["weight"].shape)
            packed = packing.pack(arrays["weight"]) if spec.role == "linear" else None
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(f"no memory for the weight {spec.name} {list(spec.shape)}") from error
        if packed is not None:
            arrays["packed"] = packed
            del arrays["weight"]
        return Param(arrays)

    def unload(self, param: Param) -> dict[str, HostArray]:
        self.synchronize()
        arrays = {name: x for name, x in param.arrays.items() if name != "packed"}
        if "weight" not in arrays:
            arrays["weight"] = packing.unpack(param["packed"])
        return {name: to_host(x.to("cpu", copy=True)) for name, x in arrays.items()}

    # ---- programs
    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        buffer = torch.from_numpy(np.array(packed))
        if not self._is_host:
            buffer = buffer.pin_memory().to(self.torch_device, non_blocking=True)
        return DeviceStep(buffer, self.attention.plan_host(host, key))

    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        """On a stream, results are `Deferred`; a program that tells no number is waited for."""
        stream, num_consumed = self._stream, len(program.consumes)

        def run(*args: Any) -> tuple[Any, ...]:
            with torch.inference_mode():
                results = program.fn(*map(resolve, args))
            if program.num_results not in (None, len(results) - num_consumed):
                raise BackendError(
                    f"the program {program.name!r} declares {program.num_results} results beside "
                    f"{num_consumed} consumed arguments, but returned {len(results)} values"
                )
            for place, new in zip(program.consumes, results, strict=False):
                _keep_identity(resolve(args[place]), new)
            return results[num_consumed:]

        def submit(*args: Any) -> tuple[Any, ...]:
            consumed = tuple(args[place] for place in program.consumes)
            if stream is None:
                return (*consumed, *run(*args))
            future = stream.submit(lambda: run(*args))
            if program.num_results is None:
                return (*consumed, *stream.wait(future))
            results = Deferred(future)
            return (*consumed, *(results[place] for place in range(program.num_results)))

        return submit

    def fetch(self, value: Any) -> Fetch:
        if self._stream is not None:
            return _StreamFetch(self._stream, value)
        return _DeviceFetch(value, self.torch_device)

    # ---- facts
    def memory(self) -> MemoryReport:
        if self._is_host:
            return MemoryReport(*machine.memory())
        look: Callable[[torch.device], tuple[int, int]] | None
        look = getattr(torch.get_device_module(self.torch_device), "mem_get_info", None)
        if look is None:
            raise NotSupported(
                f"torch does not tell the memory of {self.torch_device}; set kv_cache_memory"
            )
        free, total = look(self.torch_device)
        return MemoryReport(total, free)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()


class _StreamFetch:
    """A copy that runs on the stream, behind what was submitted before."""

    def __init__(self, stream: Stream, value: Any) -> None:
        self._stream = stream
        self._future: Future[Any] = stream.submit(
            lambda: map_tree(lambda x: to_host(x.clone()), _resolve_tree(value))
        )

    def wait(self) -> Any:
        return self._stream.wait(self._future)


class _DeviceFetch:
    """A copy in the device's own queue, into pinned memory where there is such a thing."""

    def __init__(self, value: Any, device: torch.device) -> None:
        self._event: torch.Event | None = None
        if device.type == "cpu":
            self._value = map_tree(torch.clone, value)
            return
        self._value = map_tree(lambda x: x.detach().to("cpu", non_blocking=True), value)
        self._event = torch.Event(device)
        self._event.record()

    def wait(self) -> Any:
        if self._event is not None:
            self._event.synchronize()
        return map_tree(to_host, self._value)


def _resolve_tree(value: Any) -> Any:
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(resolve(x) for x in value)
    return resolve(value)


def _keep_identity(old: Any, new: Any) -> None:
    """The caller holds the old tensors: what an op did not change in place is copied into them."""
    if isinstance(old, torch.Tensor):
        if new is not old:
            old.copy_(new)
    elif isinstance(old, (tuple, list)):
        for a, b in zip(old, new, strict=True):
            _keep_identity(a, b)
    elif isinstance(old, dict):
        for name, value in old.items():
            _keep_identity(value, new[name])


def _use_threads(count: int) -> None:
    """For the calling thread. Its first look at the number takes the last one set anywhere, so
    that look comes before."""
    torch.get_num_threads()
    torch.set_num_threads(count)


def _is_bfloat16_fast(device: torch.device) -> bool:
    """On a CPU only where it has instructions for it; others emulate."""
    if device.type != "cpu":
        return True
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = (getattr(torch.cpu, name, None) for name in names)
    return any(check() for check in checks if check is not None)

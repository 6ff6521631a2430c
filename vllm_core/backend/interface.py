"""What a backend is: plain data to list it, and a runtime once it is opened.

Knows: the contract of seam.md, sections 3, 4 and 10. Does not know: any framework, any vendor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from vllm_core.backend.attention import AttentionBackend, HostStep
from vllm_core.backend.capabilities import (
    BucketPolicy,
    Capabilities,
    MemoryReport,
    StepConstraints,
)
from vllm_core.backend.communicator import Communicator
from vllm_core.errors import NotSupported
from vllm_core.ops import (
    Array,
    BlockTables,
    BucketKey,
    HostArray,
    Ops,
    Param,
    ParamSpec,
    Part,
)

SEAM_VERSION = (0, 1)
"""Of the seam, not of the distribution: within a major, additive only; 0.x may change with its
page."""


@dataclass(frozen=True)
class DeviceInfo:
    """One device that a probe found."""

    index: int
    kind: str
    arch: str
    memory_bytes: int


@dataclass(frozen=True)
class Probe:
    """What a backend's cheap look at the machine found; it never raises."""

    devices: Sequence[DeviceInfo] = ()
    reason: str = ""
    """Why there is no device, in one sentence; or what was found."""
    fix: str = ""
    """The command that would help."""


@dataclass(frozen=True)
class BackendInfo:
    """A backend as plain data: listing it imports no framework."""

    name: str
    api: str
    """Range over the seam's version, as in requirement files: ">=0.1,<0.2"."""
    summary: str
    priority: int
    """Among the backends that find a device, the highest is chosen."""
    probe: str
    """"module:function" -> Probe."""
    open: str
    """"module:function": (OpenConfig) -> Runtime."""
    config_schema: Mapping[str, Any] = field(default_factory=dict)
    """Reserved for backend options."""
    only_by_name: bool = False
    """True for backends that exist for tests and studies: never chosen unless named."""


@dataclass(frozen=True)
class OpenConfig:
    """What a runtime is opened with."""

    dtype: str
    """A numpy name, or "auto": the checkpoint's own where the device computes in it, else the
    default."""
    checkpoint_dtype: str | None = None
    """What the checkpoint stores, where that is one dtype."""
    device_index: int = 0
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Device(NamedTuple):
    """What model code sees of a runtime."""

    ops: Ops
    attention: AttentionBackend
    comm: Communicator
    block_tables: BlockTables


class DeviceStep(NamedTuple):
    """A step on the device: the packed changes, and what the attention planned on the host. A
    pytree."""

    buffer: Array
    host_part: Any


@dataclass(frozen=True)
class Program:
    """A pure function for a runtime to compile, capture or just call.

    fn(*args) returns a tuple: first the new values of the consumed arguments in their order, then
    its results.
    """

    name: str
    """step | apply | score | set_bias"""
    fn: Callable[..., tuple[Any, ...]]
    consumes: tuple[int, ...] = ()
    """Positions of arguments that the caller must not use again."""
    workspace: int = 0
    """The core's estimate of peak bytes beside arguments and results, for devices that cannot
    measure."""
    num_results: int | None = None
    """How many results follow the consumed arguments. A runtime that is not told may have to wait
    for the program."""


class Executable(Protocol):
    """A compiled program. Programs of one runtime take effect in the order of their calls."""

    def __call__(self, *args: Any) -> tuple[Any, ...]: ...


class Fetch(Protocol):
    """A value on its way to the host."""

    def wait(self) -> Any:
        """The same tree with numpy arrays; raises what the program raised."""
        ...


class Runtime(ABC):
    """One per device group, opened inside the worker."""

    caps: Capabilities
    ops: Ops
    attention: AttentionBackend
    block_tables: BlockTables
    comm: Communicator
    dtype: str

    @property
    def device(self) -> Device:
        return Device(self.ops, self.attention, self.comm, self.block_tables)

    @abstractmethod
    def load(self, spec: ParamSpec, parts: Sequence[Part]) -> Param:
        """Host weights -> device; the only place where weights change layout. OutOfMemory,
        NotSupported (scheme)."""

    def update(self, param: Param, parts: Sequence[Part]) -> Param:
        """The same shapes with new content. Reserved for adapters and weight sync."""
        raise NotSupported("this runtime cannot update weights in place; load the model anew")

    @abstractmethod
    def unload(self, param: Param) -> dict[str, HostArray]:
        """The canonical tensors again."""

    @abstractmethod
    def upload(self, packed: HostArray, host: HostStep, key: BucketKey) -> DeviceStep:
        """Copies a packed step; the caller may reuse the array on return."""

    @abstractmethod
    def compile(self, program: Program, key: BucketKey | None) -> Executable:
        """Capture, ahead-of-time compilation, or the function itself."""

    def measure(self, program: Program, key: BucketKey | None) -> int:
        """Peak bytes of a program beside its arguments; default: the core's estimate."""
        return program.workspace

    @abstractmethod
    def fetch(self, value: Any) -> Fetch:
        """Starts the copy of a tree of arrays to the host."""

    def buckets(self, max_tokens: int, max_rows: int, max_width: int) -> BucketPolicy:
        """Shapes to compile, for the engine's largest step; default: any."""
        return BucketPolicy()

    def constraints(self) -> StepConstraints:
        return StepConstraints()

    @abstractmethod
    def memory(self) -> MemoryReport: ...

    def transfer(self, value: Any, stage: int) -> Any:
        """To another pipeline stage. Reserved."""
        raise NotSupported("this runtime runs on one device; pipeline stages are not supported")

    def num_compilations(self) -> int:
        """How often a program was compiled since opening; 0 for eager devices."""
        return 0

    @abstractmethod
    def close(self) -> None:
        """Gives everything back; idempotent."""

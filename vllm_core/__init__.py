"""The public names of vllm-core, each imported when first used.

Knows: where public names live. Does not know: anything else; importing the package must stay cheap.

    from vllm_core import LLM, SamplingParams
    with LLM(model="demo") as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=32))[0].outputs[0].text)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_core.config import EngineConfig
    from vllm_core.engine.async_llm import AsyncLLM
    from vllm_core.errors import (
        BackendError,
        CapacityError,
        DeviceLost,
        InvalidArgument,
        ModelError,
        NotSupported,
        OutOfMemory,
        PeerLost,
        RequestFailed,
        Timeout,
        VllmCoreError,
        WeightError,
    )
    from vllm_core.llm import LLM
    from vllm_core.outputs import CompletionOutput, Logprob, RequestOutput
    from vllm_core.params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "BackendError",
    "CapacityError",
    "CompletionOutput",
    "DeviceLost",
    "EngineConfig",
    "InvalidArgument",
    "Logprob",
    "ModelError",
    "NotSupported",
    "OutOfMemory",
    "PeerLost",
    "RequestFailed",
    "RequestOutput",
    "SamplingParams",
    "Timeout",
    "VllmCoreError",
    "WeightError",
    "__version__",
]

_HOMES = {
    "LLM": "vllm_core.llm",
    "AsyncLLM": "vllm_core.engine.async_llm",
    "EngineConfig": "vllm_core.config",
    "SamplingParams": "vllm_core.params",
    "CompletionOutput": "vllm_core.outputs",
    "Logprob": "vllm_core.outputs",
    "RequestOutput": "vllm_core.outputs",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "vllm_core.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

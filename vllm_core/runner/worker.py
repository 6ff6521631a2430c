"""Opens a model on a device: backend, memory plan, weights, runner, in that order.

Knows: what must be decided before what. Does not know: requests, scheduling, text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_core.backend import INT8_KV, KVFormat, OpenConfig, Runtime
from vllm_core.backend.manager import BackendManager, Choice
from vllm_core.config import EngineConfig
from vllm_core.errors import NotSupported
from vllm_core.log import get_logger
from vllm_core.models.recipe import Recipe
from vllm_core.models.registry import find_recipe
from vllm_core.models.spec import ModelSpec
from vllm_core.ops.sampling import MAX_VOCAB
from vllm_core.runner.memory import AHEAD, MemoryPlan, plan_memory
from vllm_core.runner.runner import ModelRunner, Sizes
from vllm_core.weights.loader import dummy_params, load_params
from vllm_core.weights.resolve import ModelFiles
from vllm_core.weights.rules import WeightRules
from vllm_core.weights.stored import Kept, kept_codes, param_bytes, scheme_names

logger = get_logger(__name__)

DEFAULT_TOKEN_BUDGET = 1024

Progress = Callable[[str, int, int | None], None]
"""(what is being done, bytes or steps done, total or None)."""


def no_progress(what: str, done: int, total: int | None) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Opened:
    """A model on a device, and how it came to be there."""

    runner: ModelRunner
    spec: ModelSpec
    plan: MemoryPlan
    choice: Choice
    token_budget: int
    weights: str
    """How they are stored, in words."""


def open_model(
    config: EngineConfig,
    files: ModelFiles,
    progress: Progress = no_progress,
    manager: BackendManager | None = None,
) -> Opened:
    """Raises BackendError, ModelError, WeightError, NotSupported, CapacityError, OutOfMemory."""
    manager = manager or BackendManager()
    choice = manager.choose(config.backend)
    recipe = find_recipe(files.config)
    runtime = manager.open(choice, _open_config(config, files))
    try:
        return _open_on(runtime, config, files, progress, choice, recipe)
    except BaseException:
        runtime.close()
        raise


def _open_on(
    runtime: Runtime,
    config: EngineConfig,
    files: ModelFiles,
    progress: Progress,
    choice: Choice,
    recipe: Recipe,
) -> Opened:
    kv = kv_format(config.kv_cache_dtype, runtime)
    spec = recipe.spec(files.config, runtime.dtype).with_kv_format(kv)
    check_supported(spec, runtime)
    rules = recipe.weights(spec, files.config).stored_as(config.quantization or "dense")
    check_schemes(rules, config.quantization, runtime)
    source = None if files.load_format == "dummy" else files.open_weights()
    native = runtime.caps.native_schemes
    kept: Kept = {}
    if source is not None and config.quantization is None:
        is_wide = itemsize(runtime.dtype) > 2  # who computes in float32 wants the file's numbers
        kept = kept_codes(rules, source, native, weight_only=is_wide)
    budget = config.max_num_batched_tokens or max(DEFAULT_TOKEN_BUDGET, config.max_num_seqs)
    plan = plan_memory(
        spec,
        runtime.attention,
        runtime.caps,
        runtime.memory(),
        config,
        param_bytes(rules, kept, native, itemsize(runtime.dtype)),
        budget,
        runtime.dtype,
    )
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("loading weights", done, files.num_weight_bytes)

    if source is None:
        params = dummy_params(rules, runtime, spec.layers, config.seed or 0, count)
    else:
        params = load_params(rules, source, runtime, spec.layers, count, kept)
    sizes = Sizes(
        num_rows=config.max_num_seqs,
        max_tokens=plan.max_model_len + AHEAD,
        token_budget=budget,
        num_history_slots=plan.num_history_slots,
        num_bias_slots=plan.num_bias_slots,
        num_blocks=plan.num_blocks,
    )
    runner = ModelRunner(runtime, spec, params, plan.groups, sizes)
    weights = scheme_names(rules, kept, native, runtime.dtype)
    return Opened(runner, spec, plan, choice, budget, weights)


def itemsize(dtype: str) -> int:
    """Bytes of one number of a model dtype."""
    return 2 if dtype in ("bfloat16", "float16") else np.dtype(dtype).itemsize


def _open_config(config: EngineConfig, files: ModelFiles) -> OpenConfig:
    own = getattr(files.config, "dtype", None)
    stored = None if own is None else str(own).removeprefix("torch.")
    return OpenConfig(config.dtype, checkpoint_dtype=stored, threads=config.threads)


def check_schemes(rules: WeightRules, wanted: str | None, runtime: Runtime) -> None:
    """NotSupported where the backend takes no weights as the rules ask, or nothing can be so."""
    schemes = {rule.spec.scheme for rule in rules.leaves()} - {"dense"}
    lacking = schemes - runtime.caps.schemes
    if lacking:
        raise NotSupported(
            f"quantization {wanted} stores weights as {', '.join(sorted(schemes))}, and this "
            f"backend takes {', '.join(sorted(runtime.caps.schemes))}; choose another scheme or "
            "another backend (`vllm-core doctor` lists them)"
        )
    if wanted not in (None, "dense") and not schemes:
        raise NotSupported(
            f"quantization {wanted} needs layers whose inputs are a multiple of 32, and this model "
            "has none; leave it out"
        )


def kv_format(wanted: str, runtime: Runtime) -> KVFormat:
    """The format that `kv_cache_dtype` asks for. NotSupported where the backend does not have
    it."""
    if wanted == "auto":
        return KVFormat(runtime.dtype)
    if wanted not in runtime.caps.kv_dtypes:
        others = ", ".join(sorted({"auto", *runtime.caps.kv_dtypes}))
        raise NotSupported(
            f"kv_cache_dtype {wanted} is not among those of this backend in {runtime.dtype}: "
            f"{others}; leave it at auto (the model's dtype), or try another dtype or another "
            "backend (`vllm-core doctor` tells what each has, and what is missing)"
        )
    return INT8_KV


def check_supported(spec: ModelSpec, runtime: Runtime) -> None:
    """Resolves the model against the capabilities before anything is loaded. NotSupported."""
    caps = runtime.caps
    if spec.vocab_size > MAX_VOCAB:
        raise NotSupported(
            f"the vocabulary has {spec.vocab_size} tokens; sampling is exact up to {MAX_VOCAB}"
        )
    if caps.tier != "sampler":
        raise NotSupported(
            f"the backend declares tier {caps.tier!r}, which seam 0.1 reserves; "
            "declare tier 'sampler' with the portable ops"
        )
    for attention in spec.attention_specs:
        wanted = {
            "softcap": attention.softcap is not None and not caps.softcap,
            "sliding windows": attention.window is not None and not caps.windows,
            "sinks": attention.sinks and not caps.sinks,
            f"heads of {attention.dim_qk}": attention.dim_qk > caps.max_head_dim,
            "odd head sizes": attention.dim_qk % 2 == 1,
            "chunked attention": attention.chunk is not None,
            "ALiBi": attention.alibi,
            "layers that read another layer's cache": attention.source is not None,
            "layers that write no cache": not attention.writes_kv,
            f"a KV cache of {attention.kv}": not attention.kv.is_among(
                runtime.dtype, caps.kv_dtypes
            ),
        }
        for what, is_missing in wanted.items():
            if is_missing:
                raise NotSupported(
                    f"{spec.architecture} needs {what}, which this backend does not declare; "
                    "choose another backend (`vllm-core doctor` lists them)"
                )

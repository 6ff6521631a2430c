"""Every environment variable that the project reads, and nothing else reads them.

Knows: names and meaning. Does not know: what follows from them.
"""

from __future__ import annotations

import os
from pathlib import Path


def backend() -> str | None:
    """VLLM_CORE_BACKEND: the backend to use when none is named."""
    return os.environ.get("VLLM_CORE_BACKEND") or None


def log_level() -> str:
    """VLLM_CORE_LOG_LEVEL: debug, info, warning (default) or error."""
    return os.environ.get("VLLM_CORE_LOG_LEVEL", "warning").upper()


def cache_dir() -> Path:
    """VLLM_CORE_CACHE: where demo weights are kept; default ~/.cache/vllm-core."""
    given = os.environ.get("VLLM_CORE_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vllm-core"


def demo_model() -> Path | None:
    """VLLM_CORE_DEMO_MODEL: a GGUF file to use as the demo model."""
    given = os.environ.get("VLLM_CORE_DEMO_MODEL")
    return Path(given) if given else None


def cpu_isa() -> str | None:
    """VLLM_CORE_CPU_ISA: instruction set of the cpu backend's kernels (generic, avx2, avx512,
    avx512_bf16, neon_bf16), or portable for none of them; default: the best of the processor."""
    return os.environ.get("VLLM_CORE_CPU_ISA") or None


def test_data() -> Path | None:
    """VLLM_CORE_TEST_DATA: folder with real models, tokenizers, traces and prompts for the
    tests."""
    given = os.environ.get("VLLM_CORE_TEST_DATA")
    return Path(given) if given else None


def default_spin_count(rounds: int) -> None:
    """GOMP_SPINCOUNT, unless it or OMP_WAIT_POLICY says otherwise: how long OpenMP threads spin."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(rounds))

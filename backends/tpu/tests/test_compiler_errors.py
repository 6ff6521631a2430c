"""What the compiler refuses, in our words; with libtpu the real refusals too."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="NOT CHECKED: jax is not installed")
from vllm_core.errors import BackendError, OutOfMemory
from vllm_core_tpu.compile import targets
from vllm_core_tpu.compiler_errors import compiling, translate

needs_compiler = pytest.mark.skipif(
    targets.why_not() is not None, reason=f"NOT CHECKED: {targets.why_not()}"
)


@cache
def refusals() -> dict[str, tuple[str, str]]:
    """What the real compiler for v5e says of programs that cannot be: name -> (type, message)."""
    script = Path(__file__).with_name("refused_programs.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env=dict(os.environ) | targets.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = (line.split("\t", 2) for line in done.stdout.splitlines() if "\t" in line)
    return {name: (kind, message) for name, kind, message in lines}


@needs_compiler
@pytest.mark.parametrize(
    "name, kind, words",
    [
        ("scratch", "OutOfMemory", ["256.00M of VMEM", "f32[524288,128]", "128.00M", "block_size"]),
        ("windows", "OutOfMemory", ["256.00M of VMEM", "input window", "128.00M", "block_size"]),
        ("scalars", "OutOfMemory", ["4.00M of SMEM", "1.00M", "max_model_len"]),
        ("scalars_just", "OutOfMemory", ["of SMEM", "max_model_len"]),
        ("hbm", "OutOfMemory", ["of HBM", "15.75G", "kv_cache_memory"]),
        ("offset", "BackendError", ["kernel", "bf16[16,128]", "divisible", "multiple of 16"]),
        ("rows", "BackendError", ["kernel", "bf16[5,128]", "divisible", "multiple of 16"]),
        ("gather", "BackendError", ["gathers", "report"]),
        ("sort", "BackendError", ["sort", "report"]),
        ("block", "BackendError", ["divisible by 8 and 128", "report"]),
    ],
)
def test_what_the_real_compiler_refuses_is_told_in_our_words(name, kind, words):
    found, message = refusals()[name]
    assert found == kind, message
    assert message.startswith(f"program {name}")
    assert not [word for word in words if word not in message], message
    assert len(message) < 500 and "MLIR" not in message, message


@needs_compiler
def test_a_program_that_can_be_is_not_refused():
    assert refusals()["sound"] == ("none", "")


OVERFLOW = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space vmem. "
    "Used 256.00M of 128.00M vmem. Exceeded vmem capacity by 128.00M."
)


def test_without_a_compiler_its_wording_is_still_understood():
    error = translate(RuntimeError(OVERFLOW), "the step")
    assert isinstance(error, OutOfMemory)
    assert "256.00M of VMEM" in str(error) and "128.00M" in str(error)


def test_errors_of_others_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), compiling("the step"):
        raise ZeroDivisionError
    ours = BackendError("Ran out of memory in memory space vmem. Used 2M of 1M vmem")
    with pytest.raises(BackendError) as caught, compiling("the step"):
        raise ours
    assert caught.value is ours


def test_the_compilers_own_error_stays_as_the_cause():
    theirs = RuntimeError(OVERFLOW)
    with pytest.raises(OutOfMemory) as caught, compiling("the step"):
        raise theirs
    assert caught.value.__cause__ is theirs

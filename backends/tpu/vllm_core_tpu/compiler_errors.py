"""What the compiler for TPUs says at length, in a sentence or two: what, how much, what to change.

Knows: the compiler's wording. Does not know: what is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_core.errors import BackendError, OutOfMemory, VllmCoreError

FEWER_BYTES = {
    "hbm": "lower kv_cache_memory (or num_kv_blocks), max_num_batched_tokens or max_num_seqs",
    "vmem": "lower block_size; if it is at its least, the kernel takes too much of a step at a "
    "time: please report it",
    "smem": "block tables are held there: lower max_model_len or max_num_seqs, or raise block_size",
}
"""What to change, by the memory that is full."""
REPORT = "please report it with the versions of jax and libtpu"


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """The compiler's refusals become OutOfMemory or BackendError; any other error passes."""
    try:
        yield
    except Exception as error:
        ours = translate(error, what)
        if ours is None:
            raise
        raise ours from error


def translate(error: BaseException, what: str) -> VllmCoreError | None:
    """OutOfMemory or BackendError about `what`; None where it is not the compiler's refusal."""
    if isinstance(error, VllmCoreError):
        return None
    text = str(error)
    return _no_memory(text, what) or _not_taken(error, text, what)


def _no_memory(text: str, what: str) -> OutOfMemory | None:
    found = re.search(r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", text)
    if found:
        return _out_of("hbm", found[1], found[2], what)
    found = re.search(r"Ran out of memory in memory space (\w+)\. Used (\S+) of (\S+) ", text)
    if found:
        largest = re.search(r"1\. Size: (\S+).*?Tag: ([^.\n]+)", text, re.DOTALL)
        who = f"{largest[2].strip()} ({largest[1]})" if largest else ""
        return _out_of(found[1], found[2], found[3], what, who)
    found = re.search(r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)", text)
    if found:
        space = re.search(r"shape = '([^'{]*).*?space=(\w+).*?tag = '([^'.]*)", text)
        who = f"{space[3]} ({space[1]})" if space else ""
        return _out_of(
            space[2] if space else "its memory", _size(found[1]), _size(found[2]), what, who
        )
    return None


def _out_of(space: str, needed: str, has: str, what: str, largest: str = "") -> OutOfMemory:
    because = f", most of it for the {largest}" if largest else ""
    change = FEWER_BYTES.get(space, REPORT)
    return OutOfMemory(
        f"{what} needs {needed} of {space.upper()}{because}, and the device has {has}; {change}"
    )


def _size(num_bytes: str) -> str:
    return f"{int(num_bytes) / 2**20:.2f}M"


def _not_taken(error: BaseException, text: str, what: str) -> BackendError | None:
    """Tiling, and operations that a kernel cannot have."""
    mosaic = re.search(
        r"Mosaic failed to compile TPU kernel.*?HLO name `([^`]*)`: (.*?)(?:\n|$)", text
    )
    if mosaic:
        kernel, reason = mosaic[1], _sentences(mosaic[2])
        shape = re.search(r"memref<([\dx]+x\w+)[^>]*>?[^:]*$", _operation(text))
        cut = f" (a piece of {shape[1].replace('x', ' x ')})" if shape else ""
        if "aligned to tiles" in reason:
            return BackendError(
                f"{what}: kernel {kernel} copies{cut} what does not start and end where the "
                f"device's tiles do: {reason} Choose a block_size that is a multiple of 16; if it "
                f"is one, {REPORT}"
            )
        return BackendError(f"{what}: the compiler declines kernel {kernel}: {reason} ({REPORT})")
    if isinstance(error, NotImplementedError) or "Pallas TPU lowering" in text:
        return BackendError(
            f"{what}: no TPU does what a kernel asks: {_sentences(text)} ({REPORT})"
        )
    return None


def _operation(text: str) -> str:
    """The types in the compiler's line about the operation."""
    found = re.search(r"The MLIR operation involved:\n(.*)", text)
    return found[1] if found else ""


def _sentences(text: str) -> str:
    """The first two, without advice for whoever writes the compiler."""
    parts = re.split(r"(?<=\.)\s+", " ".join(text.split()))
    kept = [part for part in parts if "assume_multiple" not in part and "issue" not in part]
    return " ".join(kept[:2]).rstrip(".") + "."

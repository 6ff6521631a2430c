"""What the compiler for TPUs says at length, in a sentence or two: what, how much, what to change.

Knows: the compiler's wording. Does not know: what is compiled.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_core.errors import BackendError, OutOfMemory, VllmCoreError

REPORT = "please report it with the versions of jax and libtpu"
FEWER_BYTES = {
    "hbm": "lower kv_cache_memory (or num_kv_blocks), max_num_batched_tokens or max_num_seqs",
    "vmem": "lower block_size, and if it is at its least, " + REPORT,
    "smem": "block tables are held there: lower max_model_len or max_num_seqs, or raise block_size",
}
"""What to change, by the memory that is full."""


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
    mosaic = re.search(r"Mosaic failed to compile TPU kernel.*?HLO name `([^`]*)`: ([^\n]*)", text)
    if mosaic:
        kernel, reason = mosaic[1], mosaic[2]
        unaligned = re.search(r"Failed to verify that the (.*?)\. ", reason)
        if unaligned:
            return BackendError(
                f"{what}: a copy{_piece(text)} in kernel {kernel} cuts through the tiles of the "
                f"device's memory, since not always the {unaligned[1]}; choose a block_size that "
                f"is a multiple of 16, and if it is one, {REPORT}"
            )
        return BackendError(f"{what}: kernel {kernel} is declined: {_sentence(reason)}; {REPORT}")
    if "Pallas TPU lowering" in text or (
        isinstance(error, NotImplementedError) and _is_raised_by_jax(error)
    ):
        return BackendError(f"{what}: a kernel asks what no TPU does: {_sentence(text)}; {REPORT}")
    return None


def _piece(text: str) -> str:
    """Type and shape of what the operation gives, in the compiler's line about it."""
    found = re.search(r"The MLIR operation involved:\n.*-> memref<([\dx?]+)x(\w+)", text)
    return f" of {found[2]}[{found[1].replace('x', ',')}]" if found else ""


def _sentence(text: str) -> str:
    """The first."""
    return re.split(r"\.\s", " ".join(text.split()) + " ")[0].rstrip(".")


def _is_raised_by_jax(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return str(module).startswith("jax.")

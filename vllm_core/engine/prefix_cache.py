"""Names the content of full blocks by chained hashes.

A block's key covers everything before it, the salt and the adapter, so that equal keys mean equal
KV. 128 bits of
BLAKE2b: a collision would hand one request another one's context, so the cheap built-in hash is not
enough.

Knows: tokens and hashes. Does not know: blocks, pools.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

from vllm_core.ops import HostArray


def root(salt: bytes, adapter: str = "") -> bytes:
    """The hash before the first block."""
    name = adapter.encode()
    return blake2b(len(name).to_bytes(4, "little") + name + salt, digest_size=16).digest()


def extend(hashes: list[bytes], first: bytes, tokens: HostArray, block_tokens: int) -> None:
    """Appends the hash of every full block of `tokens` that `hashes` does not have yet."""
    previous = hashes[-1] if hashes else first
    data = np.ascontiguousarray(tokens, np.int32)
    for block in range(len(hashes), len(data) // block_tokens):
        content = data[block * block_tokens : (block + 1) * block_tokens].tobytes()
        previous = blake2b(previous + content, digest_size=16).digest()
        hashes.append(previous)

"""Cases: every op of models, and the array vocabulary.

Knows: where the cases of each idea are. Does not know: what they do.
"""

from __future__ import annotations

from vllm_core_conformance.case import Case
from vllm_core_conformance.cases import (
    ops_activations,
    ops_block,
    ops_layers,
    ops_linear,
    ops_moe,
    ops_norms,
    ops_rope,
    ops_rows,
    ops_sizes,
    ops_vocabulary,
)

CASES: tuple[Case, ...] = (
    *ops_linear.CASES,
    *ops_norms.CASES,
    *ops_rope.CASES,
    *ops_activations.CASES,
    *ops_moe.CASES,
    *ops_rows.CASES,
    *ops_vocabulary.CASES,
    *ops_layers.CASES,
    *ops_block.CASES,
    *ops_sizes.CASES,
)

"""The scheduler's immutable decision for one step.

Knows: rows, lengths, token ids, changes. Does not know: tensors, devices, text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Ints: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"


@dataclass(frozen=True)
class StepNeeds:
    """Which branches the rows of a step need."""

    draw: bool
    filters: bool
    penalties: bool
    bias: bool
    logprobs: int
    """Alternatives per drawn token; -1 none at all."""


@dataclass(frozen=True)
class PromptTargets:
    """Prompt tokens of one row whose log-probabilities are wanted."""

    place: int
    """Index of the row in the plan."""
    first: int
    """Index in the step's tokens of the one whose hidden state predicts targets[0]."""
    targets: Ints
    count: int
    """Alternatives per token."""


@dataclass(frozen=True)
class Plan:
    """n rows in the order of the step: one-token rows first, then the rest."""

    rows: Ints
    """[n] rows of the device state."""
    owners: Ints
    """[n] the sequences (objects) that own the rows now; rows may change hands before the result is
    here."""
    epochs: Ints
    """[n] admission counter of each row: a result is matched by (row, epoch)."""
    start: Ints
    """[n] position of the row's first token of the step."""
    query_len: Ints
    """[n] tokens of the row."""
    draws: Ints
    """[n] bool, whether the row draws a token."""
    token_ids: Ints
    """[sum of query_len] int32; -1: the token that the device drew last."""
    resets: Ints
    """[r, 2 + columns] int32: (row, computed tokens, sampling parameters) of newly admitted
    rows."""
    table_changes: tuple[Ints, ...]
    """Per KV group [c, 3] int32: (row, column, block)."""
    history_changes: Ints
    """[c, 3] int32: (history slot, position, token) of tokens that a prefix hit skipped."""
    bias_changes: tuple[tuple[int, Ints], ...]
    """(bias slot, values [V] float32) of newly admitted rows."""
    num_single: int
    """Rows with one token; they come first."""
    needs: StepNeeds
    prompt_targets: tuple[PromptTargets, ...] = ()

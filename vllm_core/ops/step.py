"""The data of one step that crosses the seam, and the columns of a row's sampling parameters.

Letters as in the seam: T padded tokens, S padded rows of the step, N rows that can live at once, M
table width of a KV group, P history slots, L history length, B bias slots, V vocabulary, R rows
that need logits, C changes.

Knows: names, shapes, meaning. Does not know: how a backend stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from vllm_core.ops.arrays import Array
from vllm_core.params import MAX_MIN_TOKENS_STOP_IDS


class Column(IntEnum):
    """Columns of `DeviceState.params` [N+1, NUM_COLUMNS] int32; floats travel bit-cast."""

    TEMPERATURE = 0  # float; 0 greedy
    TOP_K = 1  # 0 off
    TOP_P = 2  # float; 1 off
    MIN_P_GAP = 3  # float: -ln(min_p), largest distance from the best scaled logit; inf off
    PRESENCE = 4  # float
    FREQUENCY = 5  # float
    REPETITION = 6  # float; 1 off
    SEED_LOW = 7
    SEED_HIGH = 8
    SEQUENCE_INDEX = 9
    PROMPT_LEN = 10
    HISTORY_SLOT = 11  # P: none
    BIAS_SLOT = 12  # B: none, a row of zeros
    HELD_UNTIL = 13  # position below which the held ids cannot be drawn
    HELD_IDS = 14  # first of MAX_MIN_TOKENS_STOP_IDS columns; -1 pads


NUM_COLUMNS = Column.HELD_IDS + MAX_MIN_TOKENS_STOP_IDS


class DeviceState(NamedTuple):
    """Rows for life. Row N is scrap: padding reads and writes it, so that no scatter needs a
    mask."""

    tables: tuple[Array, ...]  # per KV group [N+1, M_g] int32, block ids
    num_tokens: Array  # [N+1] int32, tokens whose KV is in the cache
    last_token: Array  # [N+1] int32, drawn, not yet computed
    params: Array  # [N+1, NUM_COLUMNS] int32
    history: Array  # [P+1, L] int32, token ids by position, of rows that use penalties
    bias: Array  # [B+1, V] float32, added to the logits; -inf bans; row B stays 0


@dataclass(frozen=True)
class Features:
    """Which branches a step needs. Host knowledge: nothing is read back from the device to decide
    it."""

    draw: bool = False  # some row has a temperature above 0
    filters: bool = False  # some row uses top-k, top-p or min-p
    penalties: bool = False
    bias: bool = False  # some row has a bias slot or held ids
    logprobs: int = -1  # alternatives reported beside the drawn token; -1 none at all
    keep_hidden: bool = False  # prompt log-probabilities: keep hidden[T, H]

    def covers(self, other: Features) -> bool:
        """Whether a program compiled for these features computes what `other` needs."""
        return (
            self.draw >= other.draw
            and self.filters >= other.filters
            and self.penalties >= other.penalties
            and self.bias >= other.bias
            and self.logprobs >= other.logprobs
            and self.keep_hidden >= other.keep_hidden
        )


@dataclass(frozen=True)
class BucketKey:
    """The static shapes of one compiled step.

    drafts is reserved for speculation and must be 0 until a backend declares it.
    """

    tokens: int  # T
    rows: int  # S
    widths: tuple[int, ...]  # columns of each group's table that the step may touch
    features: Features = Features()
    drafts: int = 0


class StepInput(NamedTuple):
    """Changes only, unpacked from one int32 buffer. Everything that follows from them is computed
    by `expand`."""

    row: Array  # [S] padding N
    query_start: Array  # [S+1] padding repeats the total
    token_ids: Array  # [T] -1: last_token of its row
    logit_rows: Array  # [R, 2] (token index, destination row s); padding has destination S
    split: Array  # [3] num_decode, num_uniform, num_rows
    resets: Array  # [S, 2 + NUM_COLUMNS] (row, computed tokens, params); padding row N
    table_changes: tuple[Array, ...]  # per group [C, 3] (row, column, block); padding row N
    history_changes: Array  # [C, 3] (history slot, position, token); padding slot P


class Changes(NamedTuple):
    """What does not fit a step's buffer goes ahead of it through the program `apply`, as often as
    needed."""

    table_changes: tuple[Array, ...]  # per group [C, 3]
    history_changes: Array  # [C, 3]


class StepView(NamedTuple):
    """What `expand` yields."""

    token_ids: Array  # [T] int32, clipped to V
    positions: Array  # [T] int32; padding 0
    slots: tuple[Array, ...]  # per group [T] int32, where the token's KV goes; padding 0
    sequence: Array  # [T] int32, row of the step that owns the token
    row: Array  # [T] int32, row of the state; padding N
    valid: Array  # [T] bool
    seq_lens: Array  # [S] int32, with the tokens of this step; padding 0


class Logprobs(NamedTuple):
    """Natural-log probabilities of the raw logits; column 0 is the drawn (or target) token."""

    ids: Array  # [S, 1+K] int32
    values: Array  # [S, 1+K] float32
    rank: Array  # [S] int32, 1 = most likely, of the drawn token


class StepResult(NamedTuple):
    """What a step gives back to the host."""

    tokens: Array  # [S, 1] int32; -1 nothing drawn
    num_accepted: Array  # [S] int32; 0 without drafts
    fault: Array  # [S] int32; 1 where the logits hold NaN or no finite maximum
    logprobs: Logprobs | None

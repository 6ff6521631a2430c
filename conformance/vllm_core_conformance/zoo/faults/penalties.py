"""Wrong penalties, biases and held ids.

Knows: the mistakes. Does not know: which case finds them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_core.ops.step import Column
from vllm_core_conformance.zoo.fault import Fault
from vllm_core_conformance.zoo.faults.plain_sampler import (
    PlainSampler,
    columns,
    on_floats,
    plain,
)
from vllm_core_conformance.zoo.faults.planted import (
    Numbers,
    Open,
)


def _next_slot(self: Any, x: Numbers, params: Numbers) -> Numbers:
    """The bias slot is taken from the parameters of row 0."""
    return np.asarray(x + self.bias_at[params[0, int(Column.BIAS_SLOT)]])


def _first_held(self: Any, x: Numbers, params: Numbers, positions: Numbers) -> Numbers:
    params = params.copy()
    params[:, int(Column.HELD_IDS) + 4 :] = -1
    return np.asarray(PlainSampler.held(self, x, params, positions))


def _whole_history(self: Any, params: Numbers, row: int, position: int) -> Any:
    seen, drawn = PlainSampler.counted(self, params, row, self.history_at.shape[1])
    return seen, drawn


def _without_last(self: Any, params: Numbers, row: int, position: int) -> Any:
    return PlainSampler.counted(self, params, row, position - 1)


def _wrong(name: str, says: str, open_wrong: Open, worst: bool = False) -> Fault:
    return Fault(name, "sampling", says, open_wrong, worst)


FAULTS = (
    _wrong(
        "repetition_of_prompt",
        "repetition looks at the prompt only",
        plain(
            counted=lambda self, params, row, position: (
                PlainSampler.counted(
                    self, params, row, min(position, params[row, int(Column.PROMPT_LEN)])
                )[0],
                PlainSampler.counted(self, params, row, position)[1],
            )
        ),
    ),
    _wrong(
        "repetition_of_output",
        "repetition looks at the output only",
        plain(
            counted=lambda self, params, row, position: (
                (PlainSampler.counted(self, params, row, position)[1],) * 2
            )
        ),
    ),
    _wrong(
        "frequency_of_prompt",
        "frequency and presence count the prompt too",
        plain(
            counted=lambda self, params, row, position: (
                (PlainSampler.counted(self, params, row, position)[0],) * 2
            )
        ),
    ),
    _wrong(
        "repetition_divides",
        "repetition divides negative logits too",
        plain(repeated=lambda self, x, penalty: x / penalty),
    ),
    _wrong(
        "repetition_subtracts",
        "repetition multiplies positive logits and divides negative ones",
        plain(repeated=lambda self, x, penalty: np.where(x > 0, x * penalty, x / penalty)),
    ),
    _wrong(
        "frequency_once",
        "frequency counts a token once",
        plain(subtracted=lambda self, x, counts, frequency, presence: x - frequency - presence),
    ),
    _wrong(
        "presence_counts",
        "presence is counted like frequency",
        plain(
            subtracted=lambda self, x, counts, frequency, presence: (
                x - counts * (frequency + presence)
            )
        ),
    ),
    _wrong("penalties_miss_last", "penalties miss the last token", plain(counted=_without_last)),
    _wrong(
        "penalties_of_old_owner",
        "penalties count what stands behind the row's position",
        plain(counted=_whole_history),
    ),
    _wrong(
        "penalties_negative_ignored",
        "negative penalties are taken for 0",
        columns(
            FREQUENCY=on_floats(lambda f: np.maximum(f, 0)),
            PRESENCE=on_floats(lambda f: np.maximum(f, 0)),
        ),
    ),
    _wrong(
        "repetition_below_one",
        "repetition below 1 is taken for 1",
        columns(REPETITION=on_floats(lambda r: np.maximum(r, 1))),
    ),
    _wrong(
        "frequency_four_bits",
        "counts end at 15",
        plain(subtracted=lambda self, x, counts, f, p: x - np.minimum(counts, 15) * f - p),
    ),
    _wrong(
        "bias_of_first_row", "the bias slot of row 0 serves every row", plain(biased=_next_slot)
    ),
    _wrong(
        "bias_scaled",
        "the bias is added after a division by the temperature",
        plain(
            biased=lambda self, x, params: (
                x
                + self.bias_at[params[:, int(Column.BIAS_SLOT)]]
                * np.maximum(self.floats_of(params, Column.TEMPERATURE), np.float32(1e-3))[:, None]
            )
        ),
    ),
    _wrong(
        "bias_finite_bans",
        "banned tokens get -10 instead of -inf",
        plain(
            biased=lambda self, x, params: (
                x + np.maximum(self.bias_at[params[:, int(Column.BIAS_SLOT)]], -10)
            )
        ),
    ),
    _wrong(
        "held_one_short",
        "held ids are free one position early",
        plain(holds=lambda self, positions, until: positions + 1 < until),
    ),
    _wrong(
        "held_one_long",
        "held ids stay held at the position",
        plain(holds=lambda self, positions, until: positions <= until),
    ),
    _wrong("held_first_four", "only four ids are held", plain(held=_first_held)),
)

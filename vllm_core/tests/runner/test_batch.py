"""A plan in the buffer of its bucket, and what goes ahead of it."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_core.backend import APPLY_ROWS, BucketPolicy, StepLayout
from vllm_core.errors import NotSupported
from vllm_core.ops import NUM_COLUMNS, BucketKey, Features
from vllm_core.plan import Plan, PromptTargets, StepNeeds
from vllm_core.runner.batch import build_step, cover, exact_key, overflow

NEEDS = StepNeeds(draw=True, filters=False, penalties=True, bias=False, logprobs=2)


def make_plan(num_changes: int = 2, num_history: int = 1) -> Plan:
    """Rows 4 and 0 decode, row 2 computes three tokens of a prompt and draws nothing yet."""
    changes = np.stack(
        [np.full(num_changes, 2), np.arange(num_changes), 7 + np.arange(num_changes)], 1
    )
    history = np.stack([np.zeros(num_history), np.arange(num_history), np.full(num_history, 9)], 1)
    return Plan(
        rows=np.array([4, 0, 2]),
        owners=np.array([None] * 3, object),
        epochs=np.arange(3),
        start=np.array([9, 3, 8]),
        query_len=np.array([1, 1, 3]),
        draws=np.array([True, True, False]),
        token_ids=np.array([-1, -1, 11, 12, 13], np.int32),
        resets=np.arange(2 + NUM_COLUMNS, dtype=np.int32)[None],
        table_changes=(changes.astype(np.int32), changes[:1].astype(np.int32)),
        history_changes=history.astype(np.int32),
        bias_changes=(),
        num_single=2,
        needs=NEEDS,
    )


def make_layout(tokens: int = 8, rows: int = 4) -> StepLayout:
    key = BucketKey(tokens, rows, (4, 4), Features())
    return StepLayout(key, num_rows=6, num_history_slots=2, num_bias_slots=1, block_tokens=(4, 4))


def test_the_exact_key_holds_the_plan_and_nothing_more() -> None:
    plan = make_plan()
    key = exact_key(plan, (4, 2))
    assert (key.tokens, key.rows, key.widths) == (5, 3, (3, 6))
    features = Features(draw=True, penalties=True, logprobs=2)
    assert key.features == features


def test_prompt_targets_ask_for_the_hidden_states() -> None:
    plan = make_plan()
    targets = PromptTargets(2, 2, np.array([12, 13]), 0)
    with_targets = Plan(**(vars(plan) | {"prompt_targets": (targets,)}))
    assert exact_key(with_targets, (4,)).features.keep_hidden


def test_a_step_that_no_declared_shape_holds_is_refused_with_its_size() -> None:
    key = exact_key(make_plan(), (4, 4))
    assert cover(BucketPolicy(tokens=(4, 8), rows=(2, 4)), key).tokens == 8
    with pytest.raises(NotSupported, match="5 tokens, 3 rows"):
        cover(BucketPolicy(tokens=(4,)), key)


def test_the_buffer_unpacks_to_the_plan_with_padding_that_names_nobody() -> None:
    layout, plan = make_layout(), make_plan()
    buffer, host = build_step(plan, layout)
    step = layout.unpack(buffer)
    assert step.row.tolist() == [4, 0, 2, 6]
    assert step.query_start.tolist() == [0, 1, 2, 5, 5]
    assert step.token_ids.tolist() == [-1, -1, 11, 12, 13, 0, 0, 0]
    assert step.logit_rows.tolist() == [[0, 0], [1, 1], [4, 4], [0, 4]]
    assert step.split.tolist() == [2, 2, 3]
    assert step.resets[0].tolist() == list(range(2 + NUM_COLUMNS))
    assert (step.resets[1:, 0] == 6).all()
    assert step.table_changes[0][:2].tolist() == [[2, 0, 7], [2, 1, 8]]
    assert (step.table_changes[0][2:, 0] == 6).all()
    assert step.history_changes[0].tolist() == [0, 0, 9]
    assert (step.history_changes[1:, 0] == 2).all()
    assert host.query_len.tolist() == [1, 1, 3] and host.seq_len.tolist() == [10, 4, 11]
    assert list(overflow(plan, layout)) == []


def test_building_a_step_leaves_the_template_as_it_was() -> None:
    layout = make_layout()
    before = layout.template().copy()
    build_step(make_plan(), layout)
    np.testing.assert_array_equal(layout.template(), before)


@pytest.mark.parametrize("num_changes", [0, 7, 8, APPLY_ROWS, APPLY_ROWS + 7, 2 * APPLY_ROWS + 9])
@pytest.mark.parametrize("num_history", [0, 7, APPLY_ROWS + 9])
def test_every_change_is_made_once_ahead_or_in_the_step(num_changes: int, num_history: int) -> None:
    layout, plan = make_layout(), make_plan(num_changes, num_history)
    assert layout.num_changes == 7
    tables: list[list[list[int]]] = [[], []]
    history: list[list[int]] = []
    for ahead, old in overflow(plan, layout):
        assert ahead.shape == (2, APPLY_ROWS, 3) and old.shape == (APPLY_ROWS, 3)
        for g in range(2):
            tables[g] += [c for c in ahead[g].tolist() if c[0] != layout.num_rows]
        history += [c for c in old.tolist() if c[0] != layout.num_history_slots]
    step = layout.unpack(build_step(plan, layout)[0])
    for g in range(2):
        own = step.table_changes[g].tolist()
        tables[g] += [c for c in own if c[0] != layout.num_rows]
        assert tables[g] == plan.table_changes[g].tolist()
    own = step.history_changes.tolist()
    history += [c for c in own if c[0] != layout.num_history_slots]
    assert history == plan.history_changes.tolist()

"""Every family against transformers in float32: prefill, chunks, ragged steps, greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from vllm_core.models import ModelSpec, find_recipe
from vllm_core.ops import HostArray
from vllm_core.tests.models.families import FAMILIES, VOCAB, make_model, save
from vllm_core.tests.models.harness import Harness
from vllm_core.tests.ops.frameworks import BINDINGS, open_binding
from vllm_core.weights.loader import load_params
from vllm_core.weights.source import open_safetensors

TOLERANCE = 2e-4
"""Largest difference of a logit; logits are of order 1 to 10."""

LENGTHS = (23, 14)
NUM_NEW = 6


class Oracle(NamedTuple):
    """What transformers computes."""

    name: str
    folder: Path
    tokens: list[list[int]]
    """Prompt and greedy continuation of each sequence."""
    logits: list[HostArray]
    """Of every token."""


@pytest.fixture(scope="module", params=FAMILIES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    name = request.param
    model = make_model(name)
    import torch

    folder = save(model, tmp_path_factory.mktemp(name))
    rng = np.random.default_rng(3)
    tokens, logits = [], []
    with torch.no_grad():
        for length in LENGTHS:
            ids = rng.integers(3, VOCAB, length).tolist()
            for _ in range(NUM_NEW):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            tokens.append(ids)
            logits.append(model(torch.tensor([ids])).logits[0].numpy())
    return Oracle(name, folder, tokens, logits)


@pytest.fixture(scope="module", params=BINDINGS)
def harness_of(request: pytest.FixtureRequest, oracle: Oracle) -> Harness:
    from transformers import AutoConfig

    runtime = open_binding(request.param)
    config = AutoConfig.from_pretrained(oracle.folder)
    recipe = find_recipe(config)
    spec: ModelSpec = recipe.spec(config, runtime.dtype)
    rules = recipe.weights(spec, config)
    params = load_params(rules, open_safetensors(oracle.folder), runtime, spec.layers)
    return Harness(runtime, spec, params)


def check(harness: Harness, name: str, oracle: Oracle, found: dict[int, list[HostArray]]) -> None:
    worst = 0.0
    for row, chunks in found.items():
        got, want = np.concatenate(chunks), oracle.logits[row]
        assert got.dtype == np.float32
        worst = max(worst, float(np.abs(got - want[: len(got)]).max()))
        new = slice(LENGTHS[row] - 1, LENGTHS[row] + NUM_NEW - 1)
        if len(got) == len(want):
            assert got[new].argmax(-1).tolist() == oracle.tokens[row][LENGTHS[row] :]
    binding = harness.runtime.ops.name
    print(f"{oracle.name} {name} on {binding}: largest difference {worst:.1e}")  # shown by -rP
    assert worst < TOLERANCE, f"logits differ by {worst:.1e}"


def test_logits_are_large_enough_to_tell(oracle: Oracle) -> None:
    assert all(1 < np.abs(logits).max() < 60 for logits in oracle.logits)


def test_whole_prefill_gives_transformers_logits(harness_of: Harness, oracle: Oracle) -> None:
    harness_of.restart()
    found = {row: [harness_of.step({row: oracle.tokens[row]})[row]] for row in (0, 1)}
    check(harness_of, "prefill", oracle, found)


def test_awkward_chunks_and_decoding_give_transformers_logits(
    harness_of: Harness, oracle: Oracle
) -> None:
    harness_of.restart()
    ids, found, at = oracle.tokens[0], [], 0
    for size in [3, 1, 9, 2, LENGTHS[0] - 15, *[1] * NUM_NEW]:
        found.append(harness_of.step({0: ids[at : at + size]})[0])
        at += size
    assert at == len(ids)
    check(harness_of, "chunks", oracle, {0: found})


def test_ragged_steps_of_two_sequences_give_transformers_logits(
    harness_of: Harness, oracle: Oracle
) -> None:
    harness_of.restart()
    found: dict[int, list[HostArray]] = {0: [], 1: []}
    at = {0: 0, 1: 0}
    for sizes in [(9, 0), (1, 7), (12, 1), (1, 5), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 2)]:
        work = {
            row: oracle.tokens[row][at[row] : at[row] + size]
            for row, size in enumerate(sizes)
            if size
        }
        for row, logits in harness_of.step(work).items():
            found[row].append(logits)
            at[row] += len(logits)
    assert at == {row: len(ids) for row, ids in enumerate(oracle.tokens)}
    check(harness_of, "ragged", oracle, found)

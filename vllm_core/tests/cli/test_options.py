"""From options to EngineConfig and SamplingParams."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from vllm_core.cli.engine_options import add_engine_options, engine_config, parse_size
from vllm_core.cli.sampling_options import (
    add_result_options,
    add_sampling_options,
    sampling_params,
)
from vllm_core.config import EngineConfig
from vllm_core.errors import InvalidArgument
from vllm_core.params import SamplingParams


def parse(add: Callable[[argparse.ArgumentParser], None], *arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add(parser)
    return parser.parse_args(arguments)


def dests(add: Callable[[argparse.ArgumentParser], None]) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return {action.dest for action in parser._actions}


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512M", 2**29), ("2G", 2**31), ("1.5GiB", 3 * 2**29), ("10 kb", 10240)],
)
def test_a_size_is_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "2X", "-1", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="512M"):
        parse_size(text)


def test_no_option_is_silently_dropped() -> None:
    assert dests(add_engine_options) <= EngineConfig.__dataclass_fields__.keys()
    for add in (add_sampling_options, add_result_options):
        assert dests(add) <= SamplingParams.__dataclass_fields__.keys()


def test_options_that_are_not_given_keep_the_defaults() -> None:
    assert engine_config(parse(add_engine_options)) == EngineConfig(model="demo")
    base = SamplingParams(temperature=0.3, max_tokens=7, stop=("x",))
    assert sampling_params(parse(add_sampling_options), base) == base


def test_every_engine_option_reaches_the_config() -> None:
    args = parse(
        add_engine_options,
        *"--model m --tokenizer t --revision r --backend b".split(),
        *"--dtype float32 --load-format dummy --quantization int8".split(),
        *"--kv-cache-dtype int8".split(),
        *"--max-model-len 1 --max-num-seqs 2 --max-num-batched-tokens 3 --block-size 4".split(),
        *"--kv-cache-memory 1K --memory-utilization 0.5 --no-prefix-caching".split(),
        *"--no-async-scheduling --scheduling-policy priority --seed 5 --threads 6".split(),
    )
    assert engine_config(args) == EngineConfig(
        model="m",
        tokenizer="t",
        revision="r",
        backend="b",
        dtype="float32",
        load_format="dummy",
        quantization="int8",
        kv_cache_dtype="int8",
        max_model_len=1,
        max_num_seqs=2,
        max_num_batched_tokens=3,
        block_size=4,
        kv_cache_memory=1024,
        memory_utilization=0.5,
        enable_prefix_caching=False,
        async_scheduling=False,
        scheduling_policy="priority",
        seed=5,
        threads=6,
    )


def test_given_sampling_options_win_over_the_base() -> None:
    args = parse(
        add_sampling_options, *"--temperature 0 --stop a --stop b --stop-token-ids 3".split()
    )
    changed = sampling_params(args, SamplingParams(temperature=0.9, top_k=4))
    assert changed == SamplingParams(temperature=0.0, top_k=4, stop=("a", "b"), stop_token_ids=(3,))


def test_the_engines_seed_is_no_field_of_a_request() -> None:
    def both(parser: argparse.ArgumentParser) -> None:
        add_engine_options(parser)
        add_sampling_options(parser)

    assert sampling_params(parse(both, "--seed", "1"), SamplingParams()).seed is None


def test_contradictions_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="min_tokens 9 is above max_tokens 3"):
        sampling_params(
            parse(add_sampling_options, *"--min-tokens 9 --max-tokens 3".split()), SamplingParams()
        )

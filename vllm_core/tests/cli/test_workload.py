"""Requests to measure with."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from vllm_core import envs
from vllm_core.cli.workload import make_workload, read_lengths, read_trace, sharegpt_trace
from vllm_core.errors import InvalidArgument


def test_equal_seeds_give_equal_prompts_of_the_wanted_lengths() -> None:
    lengths = [(3, 5), (70, 1)]
    work = make_workload(lengths, vocab_size=11, seed=4)
    assert work == make_workload(lengths, vocab_size=11, seed=4)
    assert work != make_workload(lengths, vocab_size=11, seed=5)
    assert [len(prompt) for prompt in work.prompts] == [3, 70]
    assert work.output_lens == [5, 1]
    assert work.num_prompt_tokens == 73
    assert {token for prompt in work.prompts for token in prompt} <= set(range(11))


@pytest.mark.parametrize(
    "header", ["id,prompt_tokens,output_tokens", "TIMESTAMP,ContextTokens,GeneratedTokens"]
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_trace_gives_its_own_rows(tmp_path: Path, header: str, is_compressed: bool) -> None:
    text = f"{header}\n" + "".join(f"x,{i},{i + 1}\n" for i in range(20))
    path = tmp_path / ("trace.csv.gz" if is_compressed else "trace.csv")
    path.write_bytes(gzip.compress(text.encode()) if is_compressed else text.encode())
    drawn = read_trace(path, 19, seed=0)
    assert sorted(drawn) == [(i, i + 1) for i in range(1, 20)]  # an empty prompt is no request
    assert drawn == read_trace(path, 19, seed=0)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", "needs the columns prompt_tokens"),
        (b"", "but has none"),
        (b"prompt_tokens,output_tokens\n1,2\n", "has 1 requests, fewer than --num-prompts 2"),
        (b"prompt_tokens,output_tokens\n1,2\nx,3\n", "line 3: a length is no whole number"),
        (b"prompt_tokens,output_tokens\n1\n", "line 2: a length is no whole number"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_broken_trace_is_refused_in_one_sentence(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match=said):
        read_trace(path, 2, seed=0)


def test_lengths_keep_the_order_of_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("prompt_tokens,output_tokens\n9,1\n0,5\n2,7\n5,3\n")
    assert read_lengths(path) == [(9, 1), (2, 7), (5, 3)]
    assert sharegpt_trace(path) == path


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(b"prompt_tokens,output_tokens\n" + b"1,2\n" * 100)[:-9])
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_trace(path, 2, seed=0)


def test_the_recorded_traces_can_be_read() -> None:
    data = envs.test_data()
    if data is None:
        pytest.skip("VLLM_CORE_TEST_DATA is not set: the recorded traces were not read")
    for name in ("sharegpt-lengths", "azure-llm-2023"):
        path = next((data / "traces" / name).glob("*.csv.gz"))
        assert len(read_trace(path, 1000, seed=1)) == 1000

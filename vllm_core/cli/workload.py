"""Requests to measure with: random token ids, of given lengths or those of a trace.

Knows: seeds, lengths, two kinds of trace. Does not know: engines, tokenizers.
"""

from __future__ import annotations

import csv
import gzip
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_core import envs
from vllm_core.errors import InvalidArgument

LENGTH_COLUMNS = (("prompt_tokens", "output_tokens"), ("ContextTokens", "GeneratedTokens"))
"""Column names of prompt and answer lengths: our own, and those of the Azure LLM traces."""
SHAREGPT_LENGTHS = "traces/sharegpt-lengths/*.csv.gz"
"""Where the test data has lengths of real conversations."""


@dataclass(frozen=True)
class Workload:
    """One prompt and one answer length per request."""

    prompts: list[list[int]]
    output_lens: list[int]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def make_workload(lengths: list[tuple[int, int]], vocab_size: int, seed: int) -> Workload:
    """Random ids for (prompt length, answer length) pairs: equal seeds give equal prompts."""
    draw = random.Random(seed)
    return Workload(
        [[draw.randrange(vocab_size) for _ in range(prompt)] for prompt, _ in lengths],
        [output for _, output in lengths],
    )


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """Every (prompt length, answer length) of a CSV (.gz), in its order; empty ones left out."""
    with _open_csv(path) as rows:
        names = rows.fieldnames or ()
        columns = next((pair for pair in LENGTH_COLUMNS if set(pair) <= set(names)), None)
        if columns is None:
            wanted = " or ".join("+".join(pair) for pair in LENGTH_COLUMNS)
            raise InvalidArgument(
                f"--trace {path} needs the columns {wanted}, but has {', '.join(names) or 'none'}"
            )
        prompt, output = columns
        try:
            pairs = [(int(row[prompt]), int(row[output])) for row in rows]
        except (TypeError, ValueError) as error:
            raise InvalidArgument(
                f"--trace {path}, line {rows.line_num}: a length is no whole number: {error}"
            ) from error
    return [(p, o) for p, o in pairs if p > 0 and o > 0]


def read_trace(path: Path, num: int, seed: int) -> list[tuple[int, int]]:
    """`num` pairs (prompt length, answer length), drawn without replacement from a CSV (.gz)."""
    pairs = read_lengths(path)
    if len(pairs) < num:
        raise InvalidArgument(
            f"--trace {path} has {len(pairs)} requests, fewer than --num-prompts {num}"
        )
    return random.Random(seed).sample(pairs, num)


def sharegpt_trace(given: Path | None) -> Path:
    """The trace given, else the ShareGPT lengths of the test data. InvalidArgument without both."""
    if given is not None:
        return given
    data = envs.test_data()
    found = next(iter(sorted(data.glob(SHAREGPT_LENGTHS))), None) if data else None
    if found is None:
        raise InvalidArgument(
            "there is no trace: give --trace FILE.csv[.gz] with the columns prompt_tokens and "
            "output_tokens, or set VLLM_CORE_TEST_DATA to a folder with traces/sharegpt-lengths"
        )
    return found


@contextmanager
def _open_csv(path: Path) -> Iterator[csv.DictReader[str]]:
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            yield csv.DictReader(lines)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"--trace {path} cannot be read: {error}") from error

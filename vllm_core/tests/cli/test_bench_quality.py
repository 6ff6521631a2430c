"""Perplexity per quantization."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from vllm_core.cli.bench_quality import _compared
from vllm_core.cli.main import main
from vllm_core.tests.cli.tiny_model import write_tiny_model


def test_each_scheme_is_scored_beside_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    (model / "config.json").write_text(json.dumps(config))
    text = tmp_path / "text.gz"
    text.write_bytes(gzip.compress(b"To be, or not to be, that is the question." * 4))
    code = main(
        ["bench", "quality", str(text), "--num-tokens", "100", "--window", "40"]
        + ["--schemes", "dense", "int8", "int4-weight-only"]
        + ["--model", str(model), "--load-format", "dummy", "--backend", "reference", "--seed", "1"]
    )
    captured = capsys.readouterr()
    assert code == 0
    report = json.loads(captured.out)
    assert report["num_tokens"] == 100 - 3  # windows of 40, 40 and 20
    first, dense, eight, four = report["results"]
    assert first["ratio"] == dense["ratio"] == 1 and dense["mean_difference"] == 0
    assert "int4-g64-weight-only" in four["weights"] and dense["weights"] == "dense"
    assert 0 < eight["mean_difference"] < four["mean_difference"] / 4
    assert first["perplexity"] > 10 and len(captured.err.splitlines()) >= 4


def test_figures_follow_from_log_probabilities() -> None:
    first = [(math.log(0.5), 1), (math.log(0.25), 2)]
    found = _compared([(math.log(0.25), 3), (math.log(0.25), 1)], first)
    assert found["perplexity"] == pytest.approx(4)
    assert found["ratio"] == pytest.approx(math.sqrt(2))
    assert found["mean_difference"] == pytest.approx(math.log(2) / 2)
    assert found["top_agreement"] == 0


def test_a_text_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff\xfe")
    for arguments, said in (
        ([str(tmp_path / "none.txt")], "cannot read the text"),
        ([str(bad)], "cannot read the text"),
        ([str(bad), "--window", "1"], "--window must be at least 2"),
    ):
        assert main(["bench", "quality", *arguments]) != 0
        assert said in capsys.readouterr().err

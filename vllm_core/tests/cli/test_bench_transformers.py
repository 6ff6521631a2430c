"""Ours beside transformers, both on one small model with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from vllm_core.cli.main import main
from vllm_core.tests.cli.tiny_model import write_tiny_model

TRACE = "prompt_tokens,output_tokens\n5,9\n300,2\n1,30\n0,4\n7,7\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights of its own in a safetensors file."""
    torch = pytest.importorskip("torch", reason="torch is missing: nothing to compare with")
    transformers = pytest.importorskip("transformers", reason="no peer: nothing was compared")
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(folder)
    random = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in random.parameters():
        if weight.ndim == 2:  # far from the near ties of small logits
            weight.data.normal_(0, 0.5)
    random.save_pretrained(folder)
    return folder


def run(
    capsys: pytest.CaptureFixture[str], model: Path, trace: Path, *more: str
) -> tuple[int, str, str]:
    own = ("--model", str(model), "--backend", "reference", "--dtype", "float32", "--threads", "1")
    memory = ("--kv-cache-memory", "4M", "--trace", str(trace))
    code = main(["bench", "transformers", *own, *memory, *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    return path


def test_both_sides_draw_the_same_tokens_and_only_useful_ones_count(
    model: Path, trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--num-requests", "4", "--max-len", "20", "--batch-sizes", "1", "3", "--repeats", "2")
    code, text, told = run(capsys, model, trace, *few)
    assert code == 0, told
    report = json.loads(text)
    assert report["prompt_tokens"] == 5 + 20 + 1 + 7
    assert report["useful_output_tokens"] == 9 + 2 + 20 + 7
    assert [one["batch_size"] for one in report["transformers"]] == [1, 3]
    for one in report["transformers"]:
        assert (one["same_first_tokens"], one["same_leading_tokens"]) == (1.0, 1.0)
        assert len(one["elapsed_s"]) == 2
    best = max(one["output_tokens_per_s"] for one in report["transformers"])
    assert report["ratio"] == pytest.approx(report["ours"]["output_tokens_per_s"] / best)
    assert report["versions"]["threads"] == 1
    assert "ratio to the best" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-requests", "6"], "has 4 requests, fewer than --num-requests 6"),
        (["--batch-sizes", "0"], "a batch size must be at least 1"),
        (["--load-format", "dummy"], "no weights that both sides could load"),
        (["--repeats", "0"], "repeats must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    model: Path,
    trace: Path,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, text, told = run(capsys, model, trace, *arguments)
    assert (code, text) == (1, "")
    assert said in told


def test_without_torch_it_says_what_to_install(
    trace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [n for n in sys.modules if n.startswith("vllm_core.bindings.torch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, told = run(capsys, tmp_path, trace)
    assert code == 1
    assert "needs torch" in told

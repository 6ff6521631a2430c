"""Memory over many requests."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest

from vllm_core.cli import bench_growth
from vllm_core.cli.main import main
from vllm_core.tests.cli.tiny_model import write_tiny_model


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LONGEST_PROMPT", "LONGEST_ANSWER", "PREFIX_LEN"):
        monkeypatch.setattr(bench_growth, name, 6)
    monkeypatch.setattr(bench_growth, "POINTS", 4)


def start(tmp_path: Path, num_requests: int, max_model_len: int) -> int:
    model = write_tiny_model(tmp_path / "model")
    return main(
        ["bench", "growth", "--num-requests", str(num_requests), "--at-once", "4"]
        + ["--model", str(model), "--load-format", "dummy", "--backend", "reference"]
        + ["--max-model-len", str(max_model_len), "--kv-cache-memory", "8M", "--seed", "1"]
    )


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], num_requests: int) -> dict[str, object]:
    assert start(tmp_path, num_requests, 256) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_every_request_ends_and_memory_is_read_as_they_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(tmp_path, capsys, 40)
    finished, aborted = report["finished"], report["aborted"]
    assert isinstance(finished, int) and isinstance(aborted, int)
    assert finished + aborted == 40 and aborted > 0
    readings = report["readings"]
    assert isinstance(readings, list) and len(readings) == bench_growth.POINTS
    assert readings[-1]["requests"] == 40 and readings[0]["bytes"] > 1 << 20
    assert report["growth_bytes"] == readings[-1]["bytes"] - readings[0]["bytes"]


def test_what_stays_behind_each_reading_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[mmap.mmap] = []
    plain = bench_growth._params

    def leaking(*args: object) -> object:
        kept.append(mmap.mmap(-1, 1 << 20))  # memory that nobody had before
        kept[-1].write(b"x" * (1 << 20))
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_growth, "_params", leaking)
    report = run(tmp_path, capsys, 40)
    growth = report["growth_bytes"]
    assert isinstance(growth, int) and growth > 20 << 20


def test_a_context_that_its_prompts_do_not_fit_is_refused_before_they_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, 8, 12) == 1
    found = capsys.readouterr().err
    assert "max_model_len is 12" in found and "at least 13" in found and "requests   " not in found
    assert start(tmp_path, 8, 13) == 0


def test_too_few_requests_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "growth", "--num-requests", "3"]) == 1
    assert "at least" in capsys.readouterr().err

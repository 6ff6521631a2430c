"""The cost of the host's work per step."""

from __future__ import annotations

import gc
import json

import pytest

from vllm_core.cli.bench_host import _decoding_core
from vllm_core.cli.main import main


def test_it_reports_percentiles_for_every_number_of_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["bench", "host", "--rows", "1", "5", "--steps", "40"])
    captured = capsys.readouterr()
    assert code == 0
    report = json.loads(captured.out)
    assert [one["rows"] for one in report["results"]] == [1, 5]
    for one in report["results"]:
        assert 0 < one["p50_ms"] <= one["p99_ms"] <= one["max_ms"]
        assert 0 < one["cpu_p50_ms"] <= one["cpu_p99_ms"]
        assert len(one["collections"]) == 3
    assert len(captured.err.splitlines()) == 3


def test_every_row_decodes_hashes_its_blocks_and_checks_stop_ids() -> None:
    core = _decoding_core(num_rows=3, num_steps=100)
    rows, pool = core.scheduler.rows, core.scheduler.kv.pools[0]
    core.step()
    assert [ids.tolist() for ids in rows.stop_ids] == [[2, 3, 5, -1]] * 3
    num_keys, held = len(pool.key_of), pool.num_used
    assert num_keys == 3 * (1000 // 32)  # no row shares a block with another
    for _ in range(100):
        assert len(core.step()) == 3
    assert len(pool.key_of) > num_keys
    assert pool.num_used > held
    assert rows.active.all()


def test_a_frozen_collector_thaws_again(capsys: pytest.CaptureFixture[str]) -> None:
    before = gc.isenabled(), len(gc.callbacks)
    assert main(["bench", "host", "--rows", "2", "--steps", "5", "--gc", "frozen"]) == 0
    assert main(["bench", "host", "--rows", "2", "--steps", "5", "--gc", "off"]) == 0
    assert (gc.isenabled(), len(gc.callbacks)) == before
    assert gc.get_freeze_count() == 0
    off = json.loads("{" + capsys.readouterr().out.split("}\n{")[1])
    assert off["results"][0]["collections"] == [0, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps must be between"),
        (["--rows", "0"], "--rows must be between"),
        (["--rows", "600", "--steps", "3000"], "the first row ends before"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "host", *arguments]) == 1
    assert said in capsys.readouterr().err

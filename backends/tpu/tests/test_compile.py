"""Budgets, the compiler's files, the command; with libtpu the real compiler too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", reason="NOT CHECKED: jax is not installed")
from vllm_core_tpu.compile import __main__ as command
from vllm_core_tpu.compile import budgets, configurations, dumps, report, targets
from vllm_core_tpu.compile.measure import measure

needs_compiler = pytest.mark.skipif(
    targets.why_not() is not None, reason=f"NOT CHECKED: {targets.why_not()}"
)
FACTS = {
    "kind": "llama-8b", "step": "decode", "target": "v5e", "bundles": 1000, "turn": 800,
    "spills": 0, "vmem": 1 << 21, "code": 1 << 18, "hbm_temp": 0, "columns": 8, "queries": 1,
    "seconds": 1.0, "units": {"VALU": 0.5, "MATMUL": 0.1},
}  # fmt: skip


# ---------------------------------------------------------------- budgets
def saved(folder: Path, *facts: dict) -> Path:
    path = folder / "budgets.json"
    budgets.save(list(facts), {"jax": "1", "libtpu": "2"}, path)
    return path


def test_what_stays_within_its_budget_is_not_complained_about(tmp_path):
    allowed, versions = budgets.load(saved(tmp_path, FACTS))
    assert versions == {"jax": "1", "libtpu": "2"}
    assert budgets.complaints([FACTS | {"bundles": 1050, "vmem": 5}], allowed) == []


@pytest.mark.parametrize(
    "figure, now, words",
    [
        ("bundles", 1051, "bundles grew from 1000 to 1051 (+5 %)"),
        ("turn", 900, "bundles of the inner loop grew from 800 to 900"),
        ("spills", 1, "spills grew from 0 to 1"),
        ("vmem", 1 << 22, "bytes of VMEM grew"),
        ("code", 1 << 19, "bytes of code grew"),
        ("hbm_temp", 4096, "temporary bytes of HBM grew"),
    ],
)
def test_a_figure_beyond_its_budget_is_named(tmp_path, figure, now, words):
    allowed, _ = budgets.load(saved(tmp_path, FACTS))
    (complaint,) = budgets.complaints([FACTS | {figure: now}], allowed)
    assert complaint.startswith("llama-8b decode on v5e: ") and words in complaint


def test_what_has_no_budget_or_does_not_compile_is_a_complaint(tmp_path):
    allowed, _ = budgets.load(saved(tmp_path, FACTS))
    (missing,) = budgets.complaints([FACTS | {"target": "7x"}], allowed)
    assert "no budget" in missing and "--update-budgets" in missing
    broken = {"kind": "mha", "step": "decode", "target": "v5e", "error": "OutOfMemory: 2M of 1M"}
    assert budgets.complaints([broken], allowed) == ["mha decode on v5e: OutOfMemory: 2M of 1M"]


def test_a_part_is_saved_beside_the_rest_and_a_whole_instead_of_it(tmp_path):
    path = saved(tmp_path, FACTS)
    other = FACTS | {"kind": "mha"}
    budgets.save([other], {}, path, keep=True)
    assert sorted(budgets.load(path)[0]) == ["llama-8b decode", "mha decode"]
    budgets.save([other], {}, path)
    assert sorted(budgets.load(path)[0]) == ["mha decode"]


def test_every_configuration_has_a_budget_on_every_chip_and_nothing_else_has():
    allowed, versions = budgets.load()
    assert set(versions) == {"jax", "libtpu"}
    wanted = {
        (f"{kind} {step}", target)
        for target in targets.TARGETS
        for kind, step in configurations.kernel_work() + configurations.model_work(target)
    }
    assert {(name, target) for name in allowed for target in allowed[name]} == wanted


# ---------------------------------------------------------------- the compiler's files
BUNDLES = """
     0   :  { %s1 = smov.u32 0 }
   0x1 LB: > { %2 = vst [vmem:[#allocation9_spill] sm:$0xff] %v1  ;;  %v3 = vld [vmem:[%s1]] }
   0x2 LB: >> { %v1 = vld [vmem:[#allocation9_spill] sm:$0xff] }
   0x3   : >> { %v2 = vadd.f32 %v1, %v1  ;;  %s4 = sst [smem:[#allocation8_spill]] %s1 }
   0x4 PF: > { %s2 = sadd.s32 1, %s1 }
"""
BUFFERS = """
  #allocation1 [shape = 's32[]', space=smem, size = 0x4, offset = 0, scoped, tag = 'x']
  #allocation2 [shape = 'f32[8,128]', space=vmem, size = 0x1000, offset = 0, scoped, tag = 'x']
  #allocation3 [shape = 'f32[8,128]', space=vmem, size = 0x20, offset = 0x1000, scoped, tag = 'x']
"""
USE = """== CAPACTIY:
MATMUL, VALU
    4     2
== UTILIZATION:
4 2
4 2
0 2
1 1
4 2
"""


def test_a_schedule_is_read_from_the_kernels_own_files(tmp_path):
    for name in ("k.1", "k.10"):
        analysis = tmp_path / f"17-{name}-02-schedule-analysis_final_bundles.txt"
        analysis.write_text(dumps.PALLAS if name == "k.1" else "fusion")
        (tmp_path / f"17-{name}-03-final_bundles.txt").write_text(BUNDLES if name == "k.1" else "")
        (tmp_path / f"17-{name}-00-post-delay-converter.txt").write_text(BUFFERS)
        use = tmp_path / f"17-{name}-01-final_hlo-static-per-bundle-utilization.txt"
        use.write_text(USE)
    found = dumps.read(tmp_path, "k.1")
    assert found is not None
    assert (found.bundles, found.turn, found.spills, found.vmem) == (5, 2, 2, 0x1020)
    assert found.units == {"MATMUL": 0.125, "VALU": 0.75}
    assert dumps.read(tmp_path, "k.10") is None and dumps.read(tmp_path, "k") is None


def test_of_a_program_everything_counts_and_only_pallas_kernels_are_kernels(tmp_path):
    for name, text in {"k.1": dumps.PALLAS, "fusion.2": "%fusion", "TLP": dumps.PALLAS}.items():
        (tmp_path / f"17-{name}-02-schedule-analysis_final_bundles.txt").write_text(text)
        (tmp_path / f"17-{name}-03-final_bundles.txt").write_text(BUNDLES)
        (tmp_path / f"17-{name}-00-post-delay-converter.txt").write_text(BUFFERS)
    assert dumps.kernels(tmp_path) == ["k.1"]
    found = dumps.read_program(tmp_path)
    assert found is not None
    assert (found.bundles, found.turn, found.spills, found.vmem) == (15, 2, 6, 0x1020)


# ---------------------------------------------------------------- the command
def test_the_table_shows_figures_and_errors():
    broken = {"kind": "mha", "step": "decode", "target": "7x", "error": "too | large"}
    text = report.markdown([FACTS, broken], {"jax": "1"})
    assert (
        "| llama-8b | decode | v5e | 1000 | 800 | 8 | 1 | 0 | VALU 50 % | 2048 | 0 | 256 |" in text
    )
    assert "| mha | decode | 7x | too / large |" in text


def test_without_the_compiler_it_says_not_checked(monkeypatch, capsys):
    monkeypatch.setattr(targets, "why_not", lambda: "libtpu is not installed")
    assert command.main([]) == 2
    assert "NOT CHECKED: libtpu is not installed" in capsys.readouterr().err


def test_a_target_that_does_not_exist_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit):
        command.main(["--targets", "v5e,v99"])
    assert "v99 is not among v4, v5e, v5p, v6e, 7x" in capsys.readouterr().err


def test_a_compiling_process_that_dies_is_an_error_of_what_it_left(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (facts,) = measure("v5e", "anything", ["mha:decode"])
    assert facts["target"] == "v5e" and "status 1" in facts["error"]


@needs_compiler
def test_the_real_compiler_gives_every_figure_of_a_kernel(tmp_path):
    output = tmp_path / "out"
    arguments = ["--only", "float32-small decode", "--targets", "v5e", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_core_tpu.compile", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (facts,) = json.loads((output / "table.json").read_text())["measured"]
    assert facts["bundles"] > facts["turn"] > 50 and facts["vmem"] > 1 << 16
    assert 0 < max(facts["units"].values()) <= 1
    assert "float32-small | decode | v5e" in (output / "table.md").read_text()

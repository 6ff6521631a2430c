"""Plug-ins that work, plug-ins that do not, and the choice between them."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from vllm_core.backend import (
    BackendInfo,
    Capabilities,
    DeviceInfo,
    OpenConfig,
    Probe,
    Runtime,
    hookimpl,
)
from vllm_core.backend.lies import RESERVED, missing_methods
from vllm_core.backend.manager import BackendManager, Discovered
from vllm_core.bindings.numpy import NumpyAttention, NumpyRuntime
from vllm_core.errors import BackendError

PLUGIN_MODULE = "toy_plugin_of_the_manager_tests"


@dataclass(frozen=True)
class Entry:
    """What importlib.metadata would give."""

    name: str
    load: Callable[[], Any]
    value: str = "toy_plugin"


def plugin(*infos: Any) -> types.SimpleNamespace:
    def vllm_core_backends() -> Sequence[BackendInfo]:
        return list(infos)

    return types.SimpleNamespace(vllm_core_backends=hookimpl(vllm_core_backends))


@pytest.fixture(autouse=True)
def toy_module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module that the toys' "module:function" strings name."""
    module = types.ModuleType(PLUGIN_MODULE)
    vars(module).update(
        probe=lambda: Probe([DeviceInfo(0, "toy", "any", 0)], "a toy"),
        open=lambda config: NumpyRuntime(),
        garbled=lambda: Probe(["a card"]),  # type: ignore[list-item]
    )
    monkeypatch.setitem(sys.modules, PLUGIN_MODULE, module)
    monkeypatch.delenv("VLLM_CORE_BACKEND", raising=False)
    return module


def toy(name: Any = "toy", **changes: Any) -> BackendInfo:
    info = BackendInfo(
        name=name,
        api=">=0.1,<0.2",
        summary="a toy",
        priority=50,
        probe=f"{PLUGIN_MODULE}:probe",
        open=f"{PLUGIN_MODULE}:open",
    )
    return replace(info, **changes)


def good() -> Entry:
    return Entry("good", lambda: plugin(toy("good", open="vllm_core.bindings.numpy:open_runtime")))


def fails_to_import() -> Any:
    raise ImportError("no module named vendor_runtime\nand a second line")


def exits() -> Any:
    raise SystemExit("this vendor calls exit")


BROKEN = {
    "import fails": (fails_to_import, "failed to import: ImportError: no module named vendor_run"),
    "import exits": (exits, "failed to import: SystemExit: this vendor calls exit"),
    "future seam": (
        lambda: plugin(toy(api=">=7.0,<8")),
        "it speaks seam >=7.0,<8, this core speaks 0",
    ),
    "no range": (lambda: plugin(toy(api="newest")), "its seam range 'newest' cannot be read"),
    "probe raises": (
        lambda: plugin(toy(probe="operator:not_there")),
        "its probe failed: Attribute",
    ),
    "probe lies": (
        lambda: plugin(toy(probe="builtins:list")),
        "its probe returned list, not a Probe",
    ),
    "probe finds words": (
        lambda: plugin(toy(probe=f"{PLUGIN_MODULE}:garbled")),
        "its probe found ['a card'], which is no list of DeviceInfo",
    ),
    "priority in words": (
        lambda: plugin(toy(priority="high")),
        "its BackendInfo has 'high' as priority, which must be int",
    ),
    "no name": (lambda: plugin(toy(None)), "its BackendInfo has None as name"),
    "declares nothing": (plugin, "the plug-in names no backend"),
    "declares garbage": (lambda: plugin(42), "returned int, not a BackendInfo"),
    "no hook": (types.SimpleNamespace, "the plug-in names no backend"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_is_named_with_its_reason_while_others_work(fault: str) -> None:
    load, reason = BROKEN[fault]
    manager = BackendManager([Entry("bad", load), good()])
    broken = [d for d in manager.discover() if d.error]
    assert len(broken) == 1
    assert reason in str(broken[0].error)
    assert "\n" not in str(broken[0].error)
    choice = manager.choose()
    assert choice.backend.name == "good"
    assert isinstance(manager.open(choice, OpenConfig("float32")), Runtime)
    with pytest.raises(BackendError, match="cannot be used"):
        manager.choose(broken[0].name)


def test_all_faults_at_once_hide_nothing() -> None:
    entries = [Entry(fault, load) for fault, (load, _) in BROKEN.items()]
    found = BackendManager([*entries, good()]).discover()
    assert sum(d.error is not None for d in found) == len(BROKEN)
    assert {"good", "reference", "null"} <= {d.name for d in found if d.error is None}


def test_the_highest_priority_that_found_a_device_is_chosen(toy_module: Any) -> None:
    toy_module.none = lambda: Probe(reason="no card in the machine", fix="insert a card")
    entries = [
        Entry("a", lambda: plugin(toy("low", priority=1), toy("high", priority=70))),
        Entry("b", lambda: plugin(toy("absent", priority=99, probe=f"{PLUGIN_MODULE}:none"))),
        Entry("c", lambda: plugin(toy("shy", priority=100, only_by_name=True))),
    ]
    manager = BackendManager(entries)
    assert manager.choose().backend.name == "high"
    assert manager.choose("shy").backend.name == "shy"
    with pytest.raises(BackendError, match="no card in the machine; try: insert a card"):
        manager.choose("absent")
    with pytest.raises(BackendError, match=r"there is no backend 'abc'; known are .*pip install"):
        manager.choose("abc")


def test_of_two_that_claim_one_name_the_first_keeps_it_and_the_other_is_told() -> None:
    entries = [
        Entry("a", lambda: plugin(toy("twin", summary="first"))),
        Entry("b", lambda: plugin(toy("twin", summary="second", priority=99))),
        Entry("c", lambda: plugin(toy("reference"))),
    ]
    manager = BackendManager(entries)
    assert manager.choose("twin").backend.summary == "first"
    assert manager.choose().backend.summary == "first"
    assert manager.choose("reference").backend.distribution == "vllm-core"
    errors = [d.error for d in manager.discover() if d.error]
    assert len(errors) == 2
    assert "the name 'reference' is taken by vllm-core; uninstall one" in " ".join(errors)


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CORE_BACKEND", "reference")
    choice = BackendManager([good()]).choose()
    assert (choice.backend.name, choice.reason) == ("reference", "named by VLLM_CORE_BACKEND")


def test_without_any_device_the_error_says_what_to_install() -> None:
    with pytest.raises(BackendError, match=r"pip install 'vllm-core\[cpu\]'"):
        BackendManager([]).choose()


# ---------------------------------------------------------------- what is opened
def opened(module: Any, make: Callable[[OpenConfig], Any]) -> tuple[BackendManager, Discovered]:
    module.open = make
    manager = BackendManager([Entry("toy", lambda: plugin(toy())), good()])
    return manager, manager.choose("toy").backend


def explode(config: OpenConfig) -> Any:
    raise RuntimeError("driver too old")


def unfinished() -> Any:
    incomplete: Any = Runtime
    return incomplete()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda config: "garbage", "returned str, not a Runtime"),
        (lambda config: None, "returned NoneType, not a Runtime"),
        (explode, "cannot be opened: RuntimeError: driver too old"),
        (
            lambda config: unfinished(),
            "cannot be opened: TypeError: Can't instantiate abstract class",
        ),
    ],
)
def test_an_open_that_gives_no_runtime_is_named(
    toy_module: Any, make: Callable[[OpenConfig], Any], reason: str
) -> None:
    manager, backend = opened(toy_module, make)
    with pytest.raises(BackendError, match="backend 'toy'") as caught:
        manager.open(manager.choose("toy"), OpenConfig("auto"))
    assert reason in str(caught.value)
    assert reason in str(manager.inspect(backend))


class Liar(NumpyRuntime):
    """A runtime that declares more than it has."""

    def __init__(self, **bits: Any) -> None:
        super().__init__()
        self.caps = replace(self.caps, **bits)
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Forgetful(NumpyAttention):
    """Attention whose `attend` cannot return what it could not be asked for."""

    def attend(self, kv, layer, q, k, v, plan):  # type: ignore[override]
        return super().attend(kv, layer, q, k, v, plan)


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "tier": ({"tier": "logits"}, "tier='logits', which seam 0"),
    "max_drafts": ({"max_drafts": 4}, "max_drafts=4, which seam 0"),
    "compact_tables": ({"compact_tables": True}, "compact_tables=True"),
    "q_pos": ({"q_pos": True}, "q_pos=True"),
    "tree": ({"tree": True}, "tree=True"),
    "bidirectional": ({"bidirectional": True}, "bidirectional=True"),
    "shard": ({"shard": True}, "shard=True"),
    "kv_dtypes": ({"kv_dtypes": frozenset({"float8_e4m3fn"})}, "kv_dtypes=float8_e4m3fn"),
    "static_shapes": ({"static_shapes": True}, "static_shapes without its own runtime.buckets"),
    "exact_host_lengths": (
        {"exact_host_lengths": True},
        "exact_host_lengths without its own attention.plan_host",
    ),
    "default_dtype": ({"default_dtype": "int3"}, "'int3' is not among its dtypes"),
}


@pytest.mark.parametrize("bit", LIES)
def test_a_bit_without_its_method_is_refused_with_the_reason(toy_module: Any, bit: str) -> None:
    bits, reason = LIES[bit]
    liar = Liar(**bits)
    manager, backend = opened(toy_module, lambda config: liar)
    with pytest.raises(BackendError, match="promises what it does not have") as caught:
        manager.open(manager.choose("toy"), OpenConfig("auto"))
    assert reason in str(caught.value)
    assert liar.closed
    assert reason in str(manager.inspect(backend))
    assert manager.inspect(manager.choose("good").backend) is None


def test_every_reserved_bit_is_refused() -> None:
    assert set(RESERVED) <= LIES.keys()


def test_an_attend_without_the_declared_arguments_is_named() -> None:
    runtime = NumpyRuntime()
    runtime.attention = Forgetful("float32")
    assert missing_methods(runtime) == [
        "it declares sinks, but attention.attend takes no argument 'sinks'",
        "it declares return_lse, but attention.attend takes no argument 'return_lse'",
    ]
    runtime.caps = replace(runtime.caps, sinks=False, return_lse=False)
    assert missing_methods(runtime) == []


@pytest.mark.parametrize("part", ["caps", "ops", "attention", "block_tables", "comm", "dtype"])
def test_a_runtime_without_one_of_its_parts_is_named(part: str) -> None:
    runtime = NumpyRuntime()
    delattr(runtime, part)
    assert missing_methods(runtime)[0].startswith(f"its runtime's {part} must be ")
    setattr(runtime, part, 42)
    assert "but is int" in missing_methods(runtime)[0]


def test_capabilities_that_declare_nothing_special_have_no_lies() -> None:
    assert missing_methods(NumpyRuntime()) == []
    assert Capabilities(frozenset({"float32"}), "float32").tier == "sampler"


# ---------------------------------------------------------------- the real thing
PLUGIN = """
from dataclasses import replace
from vllm_core.backend import BackendInfo, Capabilities, hookimpl
from vllm_core.bindings.numpy import NumpyRuntime

@hookimpl
def vllm_core_backends():
    return [BackendInfo(name="real", api=">=0.1,<0.2", summary="s", priority=500,
                        probe="vllm_core.backend.builtin:probe", open="real_plugin:open_it")]

def open_it(config):
    runtime = NumpyRuntime()
    runtime.caps = replace(runtime.caps, tree=TREE)
    return runtime
"""
ASK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from vllm_core.backend.manager import BackendManager
manager = BackendManager()
found = {d.name: [d.distribution, d.version, d.error] for d in manager.discover()}
choice = manager.choose()
print(json.dumps([choice.backend.name, found, manager.inspect(choice.backend)]))
"""


@pytest.mark.parametrize("tree", [False, True])
def test_a_real_entry_point_is_found_judged_and_inspected(tmp_path: Path, tree: bool) -> None:
    (tmp_path / "real_plugin.py").write_text(PLUGIN.replace("TREE", str(tree)))
    facts = tmp_path / "vllm_core_real-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-core-real\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(
        "[vllm_core]\nreal = real_plugin\nbroken = no_such_module_here\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    chosen, found, lie = json.loads(done.stdout)
    assert chosen == "real"
    assert found["real"] == ["vllm-core-real", "1.2", None]
    assert "declares tree=True" in lie if tree else lie is None
    assert "No module named 'no_such_module_here'" in found["broken"][2]

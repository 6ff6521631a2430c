"""The cases as pytest items: a test per case and dtype, each run in a worker process.

    from vllm_core_conformance.pytest_plugin import conformance_tests

    test_conformance = conformance_tests("acme", profile="core")

or, without a file, `pytest --pyargs vllm_core_conformance --backend=acme`. Where nobody asks for
either, this plugin collects nothing and imports nothing.

Knows: pytest's hooks. Does not know: how a case runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vllm_core_conformance.outcome import Result
    from vllm_core_conformance.supervisor import Description, Supervisor
    from vllm_core_conformance.tasks import Task, Wanted

PACKAGE = Path(__file__).parent
ITEMS = PACKAGE / "test_conformance.py"
FIXTURE = "conformance_task"
SHORT = {"--backend": "conformance_backend", "--profile": "conformance_profile"}
"""Options that exist only where this package's own tests are asked for: other projects have
options of these names."""


@dataclass(frozen=True)
class Demand:
    """What a test function of `conformance_tests` stands for; None: from the command line."""

    backend: str | None
    profile: str | None
    cases: str | None
    dtypes: tuple[str, ...]
    suite: str | None


def conformance_tests(
    backend: str | None = None,
    profile: str | None = None,
    *,
    cases: str | None = None,
    dtypes: Sequence[str] = (),
    suite: str | None = None,
) -> Callable[..., None]:
    """A test function with one item per case and dtype.

    backend: a name that `vllm-core doctor` lists, or "module:function". profile: names with commas,
    default "core". cases: a glob over ids. dtypes: only these. suite: a module with all_cases(),
    other than the suite's own. Command-line options count where an argument is not given.
    """

    def test_conformance(conformance_task: Any) -> None:
        conformance_task()

    demand = Demand(backend, profile, cases, tuple(dtypes), suite)
    test_conformance.conformance = demand  # type: ignore[attr-defined]
    return test_conformance


# ---- options
def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vllm-core conformance")
    group.addoption("--conformance-backend", metavar="X", help="the backend under test")
    group.addoption("--conformance-profile", metavar="NAMES", help="default: core")
    group.addoption("--conformance-dtype", metavar="NAMES", help="only in these dtypes")
    group.addoption("--conformance-seed", type=int, default=0, metavar="S", help="default: 0")
    group.addoption(
        "--conformance-timeout-scale", type=float, default=1.0, metavar="F", help="default: 1"
    )
    group.addoption("--conformance-report", metavar="FILE", help="write report.json there")


@pytest.hookimpl(hookwrapper=True)
def pytest_load_initial_conftests(parser: pytest.Parser, args: list[str]) -> Iterator[None]:
    yield  # a conftest.py that has these options keeps them
    if any(PACKAGE.name in arg for arg in args):
        group = parser.getgroup("vllm-core conformance")
        for option, name in SHORT.items():
            try:
                group.addoption(option, dest=name, help=f"the same as --{name.replace('_', '-')}")
            except (ValueError, argparse.ArgumentError):
                continue


def _option(config: pytest.Config, name: str) -> str | None:
    """Also where a conftest.py of the user has the short form."""
    found = getattr(config.option, f"conformance_{name}", None)
    found = found or getattr(config.option, name, None)
    return found if isinstance(found, str) else None


# ---- collection
def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Of this package only its items are tests, whatever its files are called."""
    if PACKAGE in collection_path.parents and collection_path != ITEMS:
        return True
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    demand = getattr(metafunc.function, "conformance", None)
    if not isinstance(demand, Demand):
        return
    bench = metafunc.config.stash.setdefault(_BENCHES, {})
    config = metafunc.config
    backend = demand.backend or _option(config, "backend")
    if backend is None:
        metafunc.parametrize(FIXTURE, [_no_backend], ids=["no-backend"])
        return
    demand = Demand(
        backend,
        demand.profile or _option(config, "profile") or "core",
        demand.cases,
        demand.dtypes or _split(config.option.conformance_dtype),
        demand.suite,
    )
    if demand not in bench:
        bench[demand] = _Bench(demand, config)
    tasks = bench[demand].tasks
    ids = [f"{task.case.id}-{task.dtype}" for task in tasks]
    items = [_Item(bench[demand], at) for at in range(len(tasks))]
    metafunc.parametrize(FIXTURE, items, ids=ids)


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _no_backend() -> None:
    pytest.fail(
        "no backend was named: pytest --pyargs vllm_core_conformance --backend=NAME, where NAME is "
        "one that `vllm-core doctor` lists, or module:function",
        pytrace=False,
    )


# ---- running
class _Bench:
    """One backend with its supervisor, for all items of a demand."""

    def __init__(self, demand: Demand, config: pytest.Config) -> None:
        from vllm_core_conformance.running import cases_of, tasks_of
        from vllm_core_conformance.supervisor import CASES, Settings, Supervisor
        from vllm_core_conformance.tasks import BadRequest, Wanted, parse_profiles, select_cases

        assert demand.backend is not None and demand.profile is not None
        options = config.option
        self.demand = demand
        settings = Settings(
            demand.backend,
            timeout_scale=options.conformance_timeout_scale,
            cases=demand.suite or CASES,
        )
        self.supervisor: Supervisor = Supervisor(settings)
        try:
            self.wanted: Wanted = Wanted(
                parse_profiles(demand.profile),
                demand.cases,
                demand.dtypes,
                options.conformance_seed,
            )
            chosen = select_cases(cases_of(settings.cases), self.wanted)
            self.description: Description = self.supervisor.describe()
            self.tasks: list[Task] = tasks_of(self.description, chosen, self.wanted)
        except BadRequest as error:
            self.supervisor.kill()
            raise pytest.Collector.CollectError(str(error)) from error
        except BaseException:
            self.supervisor.kill()
            raise

    def run(self, task: Task) -> Result:
        from vllm_core_conformance.running import unopened

        if self.description.status != "ok":
            return unopened(self.description, task)
        return self.supervisor.run_one(task)


@dataclass
class _Item:
    """One case in one dtype."""

    bench: _Bench
    at: int
    told: dict[str, Any] = field(default_factory=dict)
    """For the report; empty until it ran."""

    def __call__(self) -> None:
        from vllm_core_conformance.outcome import GOOD
        from vllm_core_conformance.worker import plain

        bench, task = self.bench, self.bench.tasks[self.at]
        result = bench.run(task)
        self.told = plain(
            {
                "demand": asdict(bench.demand),
                "wanted": asdict(bench.wanted),
                "description": asdict(bench.description),
                "result": asdict(result),
            }
        )
        if result.status not in GOOD and task.case.scored:
            pytest.fail(_failure_text(bench.demand, task, result), pytrace=False)


def _failure_text(demand: Demand, task: Task, result: Result) -> str:
    repro = (
        f"vllm-core conformance repro {task.case.id} --backend {demand.backend} "
        f"--seed {task.seed} --dtype {task.dtype}"
    )
    lines = [f"{result.status}: {result.sentence}", f"demanded: {task.case.says}", repro]
    for title, text in (
        ("printed", str(result.details.get("output", ""))),
        ("traceback", result.traceback),
    ):
        if text.strip():
            lines += [f"{title}:", text.rstrip()]
    return "\n".join(lines)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    callspec = getattr(item, "callspec", None)
    told = getattr(callspec.params.get(FIXTURE) if callspec else None, "told", None)
    if told:
        report = outcome.get_result()  # type: ignore[attr-defined]
        if report.when == "call":
            report.conformance = told  # travels from the workers of pytest-xdist


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TOLD] = []
    config.pluginmanager.register(_Listener(config), "vllm_core_conformance_listener")


class _Listener:
    """Keeps what the items told; makes the report file at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.faults: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = getattr(report, "conformance", None)
        if told is not None:
            self.config.stash[_TOLD].append(told)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        for bench in self.config.stash.get(_BENCHES, {}).values():
            if int(exitstatus) <= 1:
                bench.supervisor.close()
            bench.supervisor.kill()
            self.faults += bench.supervisor.faults
        output = getattr(self.config, "workeroutput", None)
        if output is not None:  # a worker of pytest-xdist: the controller judges
            output["conformance_faults"] = self.faults
            return
        told = self.config.stash[_TOLD]
        path = self.config.option.conformance_report
        if told and path:
            _write_report(Path(path), told, self.faults)
        if self.faults and int(exitstatus) == 0:
            session.exitstatus = 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.faults += getattr(node, "workeroutput", {}).get("conformance_faults", [])

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for fault in self.faults:
            terminalreporter.write_line(f"conformance: {fault}", red=True)


def _write_report(path: Path, told: Sequence[dict[str, Any]], faults: Sequence[str]) -> None:
    """Of the items that ran: what was deselected is missing in it, and it does not pass."""
    from vllm_core_conformance.report.build import Run, build_report, dump
    from vllm_core_conformance.running import cases_of, tasks_of
    from vllm_core_conformance.supervisor import CASES, Description, read_result
    from vllm_core_conformance.tasks import Wanted, select_cases

    first = told[0]
    cases = cases_of(first["demand"]["suite"] or CASES)
    names = ("profiles", "dtypes")
    wanted = Wanted(**first["wanted"] | {name: tuple(first["wanted"][name]) for name in names})
    description = Description(**first["description"])
    tasks = tasks_of(description, select_cases(cases, wanted), wanted)
    by_name = {task.name: task for task in tasks}
    results = []
    for entry in told:
        found = entry["result"]
        name = (found["case"], found["dtype"], found["seed"])
        if entry["demand"] == first["demand"] and name in by_name:
            results.append(read_result(found, by_name[name]))
    seconds = sum(result.seconds for result in results)
    backend = str(first["demand"]["backend"])
    run = Run(wanted, description, tasks, results, backend, seconds, list(faults))
    path.write_text(dump(build_report(run, cases)), "utf-8")


_BENCHES = pytest.StashKey[dict[Demand, _Bench]]()
_TOLD = pytest.StashKey[list[dict[str, Any]]]()

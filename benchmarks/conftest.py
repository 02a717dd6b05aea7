"""Options of the suites, the session's stage, and what the JSON says of the machine."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine, report
from benchmarks.stage import Stage

STAGE = pytest.StashKey[Stage]()
CEILINGS = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora_kernels benchmarks")
    group.addoption("--full", action="store_true", help="every problem, not the default few")
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="measure nothing new after so many seconds; what was measured is kept",
    )
    group.addoption(
        "--seconds", type=float, help="of measuring a linear or a block; more narrows the spread"
    )
    group.addoption(
        "--journal", type=Path, metavar="FILE", help="add each row to it as it is measured"
    )
    group.addoption("--commit", help="the commit to stamp rows with, where git cannot tell")


def pytest_configure(config: pytest.Config) -> None:
    device = machine.best_device()
    limit = config.getoption("--time-limit")
    deadline = None if limit is None else time.monotonic() + limit
    stamp = machine.stamp(device, config.getoption("--commit"))
    config.stash[STAGE] = Stage(stamp, deadline, config.getoption("--journal"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Compilers and rivals warn of what is not ours to mend; an unused fixture is a skipped row.
    rules = ["default", "ignore::DeprecationWarning", "ignore::FutureWarning"]
    for item in items:
        for rule in (*rules, "ignore:Benchmark fixture was not used"):
            item.add_marker(pytest.mark.filterwarnings(rule))


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest) -> Stage:
    return request.config.stash[STAGE]


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish() -> Generator[None, Any, Any]:
    # All rows may have been skipped, and each has said why.
    warnings.filterwarnings("ignore", message="Not saving anything, no benchmarks")
    return (yield)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    # In place of pytest-benchmark's own, which holds the host's name.
    stamp = config.stash[STAGE].stamp
    found = {k: v for k, v in stamp.items() if k not in ("commit", "date")}
    return found | {"ceilings": config.stash[CEILINGS]}


def pytest_collection_finish(session: pytest.Session) -> None:
    # Before the suites, which may leave a GPU that answers no more.
    config = session.config
    config.stash[CEILINGS] = None
    if session.items and not config.option.collectonly:
        config.stash[CEILINGS] = machine.ceilings(machine.best_device())
        config.stash[STAGE].note("machine_info", {"ceilings": config.stash[CEILINGS]})


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return {"id": config.stash[STAGE].stamp["commit"]}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    output_json["missing"] = config.stash[STAGE].missing


def pytest_benchmark_group_stats(config: pytest.Config) -> list[Any] | None:
    # pytest-benchmark's own table has a line of 200 columns for each row; ours comes at the end.
    wanted = config.getoption("benchmark_verbose") or config.getoption("benchmark_compare")
    return None if wanted else []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    stage = config.stash[STAGE]
    if stage.rows:
        terminalreporter.section("to paste")
        terminalreporter.write_line(report.markdown(stage.rows, stage.missing))

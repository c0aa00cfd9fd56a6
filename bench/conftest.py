"""The fixtures of the benchmarks, and the tables at their end. `pytest --benchmark` comes here (see tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from _pytest.terminal import TerminalReporter
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import Measurement, compare, machine
from bench.report import keep_last, remarks, table

LINES = pytest.StashKey[dict[str, list[Measurement]]]()
MINUTES = 10  # making a corpus of gigabytes counts as a part of the first test that needs it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(60 * MINUTES))


@pytest.fixture(scope="session")
def quick(pytestconfig: pytest.Config) -> bool:
    """Whether sizes should be small: to see that a benchmark works, not how fast anything is."""
    return bool(pytestconfig.getoption("benchmark_quick", False))


@pytest.fixture
def race(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, quick: bool) -> Callable[..., None]:
    """`bench.harness.compare`, whose line joins the table of this file's op."""

    timed = partial(compare, benchmark, most_rounds=2) if quick else partial(compare, benchmark)

    def run(*arguments: object, **options: object) -> None:
        line = timed(*arguments, **options)
        if line is not None:
            op = request.path.stem.removeprefix("bench_")
            request.config.stash.setdefault(LINES, {}).setdefault(op, []).append(line)

    return run


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Prints the tables and keeps them for `python -m bench.report`; quick sizes are printed only."""
    quick = config.getoption("benchmark_quick", False)
    for op, lines in config.stash.get(LINES, {}).items():
        where = machine()
        terminalreporter.section(f"{op} on {where['name']}" + (" (quick sizes say nothing)" if quick else ""))
        for text in (*table(lines), "", *remarks(lines)):
            terminalreporter.write_line(text)
        if not quick:
            keep_last(op, where, lines)

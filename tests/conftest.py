"""Shared by all tests: under tests/ops, torch.empty is full of NaN, so an element that an op forgets to write fails.

Also the option `--benchmark`, which runs bench/ instead of the tests. It lives here because pytest asks for options before it
looks at anything, and then this is the conftest that it finds from the root of the project.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

LONGEST = ("test_interpreter.py", "test_job.py", "test_packaging.py", "test_running.py")
INTEGER_POISON = -(2**7) + 1  # fits every integer dtype and is no row, count or rank


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="run bench/ instead of the tests; -k selects, e.g. an op")
    parser.addoption("--benchmark-quick", action="store_true", help="with small sizes, to see that benchmarks work")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    """Turns to bench/ if asked to. UsageError without pytest-benchmark, or where processes would disturb each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A worker a core: more threads, also of the programs they run, only get in the way.
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests, not with the longest
    if not config.option.benchmark:
        return
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("--benchmark needs pytest-benchmark: pip install -e '.[bench]'")
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("--benchmark measures one thing at a time: leave out -n")
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(
            f"--benchmark runs bench/, not {' '.join(config.args)}: select with -k, e.g. -k patches"
        )
    config.args = [str(config.rootpath / "bench")]
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True  # bench/conftest.py prints the tables


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that with several processes none is left alone with one at the end."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        tensor = allocate(*arguments, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return (
            tensor.fill_(INTEGER_POISON)
            if tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
            else tensor
        )

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty, empty_like and Tensor.new_empty hand out in the tests of the ops."""
    if request.path.parent.name == "ops":
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))

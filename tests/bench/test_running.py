"""`pytest --benchmark` and `python -m bench.gpu`: what they run, what they refuse, and that they stop in time."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import gpu
from bench.harness import Measurement

ROOT = Path(__file__).parents[2]


def test_benchmarks_instead_of_tests_end_in_a_table() -> None:
    # Nothing of the run that this test belongs to may turn the benchmarks off.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    clean["OMP_NUM_THREADS"] = "1"  # beside other tests, threads that wait for each other only get in the way
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", "--benchmark-quick"]
    command += ["-v", "-k", "bench_prefix and test_decode"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert {line.partition("::")[0] for line in done.stdout.splitlines() if "PASSED" in line} == {
        "bench/bench_prefix.py"
    }
    assert "prefix on " in done.stdout
    assert "| case " in done.stdout
    assert "G = 8" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plugin": False}, r"pip install -e '\.\[bench\]'"),
        ({"processes": 2}, "leave out -n"),
        ({"source": pytest.Config.ArgsSource.ARGS}, "select with -k"),
    ],
    ids=["no-plugin", "processes", "other-files"],
)
def test_benchmark_says_what_it_needs(request: pytest.FixtureRequest, change: dict[str, Any], message: str) -> None:
    path = str(ROOT / "tests" / "conftest.py")
    plugins = request.config.pluginmanager.get_plugins()
    (conftest,) = [plugin for plugin in plugins if getattr(plugin, "__file__", None) == path]
    asked = {"plugin": True, "processes": None, "source": pytest.Config.ArgsSource.TESTPATHS, **change}
    config = SimpleNamespace(
        option=SimpleNamespace(benchmark=True),
        pluginmanager=SimpleNamespace(hasplugin=lambda name: asked["plugin"]),
        getoption=lambda name, default: asked["processes"],
        args_source=asked["source"],
        args=["tests/ops"],
    )
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


def test_a_selection_without_tests_does_not_pass() -> None:
    assert not gpu.passes(60, ["tests/bench/test_report.py"], "-k", "no_such_test")


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    late = tmp_path / "late"
    start = time.monotonic()
    assert gpu.run("sleep", 0.5, "sh", "-c", f"(sleep 3; touch {late}) & wait") is None
    assert time.monotonic() - start < 2.5
    time.sleep(3.5)
    assert not late.exists()
    assert gpu.run("false", 60, "false") == 1


def test_measuring_ends_at_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    def measurements() -> Iterator[Measurement]:
        for number in range(10):
            time.sleep(0.2)
            yield Measurement(f"case {number}", 1.0)

    lines = gpu.measure("op", SimpleNamespace(COUNT=10, measurements=measurements), 0.3)
    assert [line.case for line in lines] == ["case 0", "case 1"]
    assert "op stops after 2 of 10 cases" in capsys.readouterr().out


def test_a_library_older_than_its_sources_is_stale(tmp_path: Path) -> None:
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "vsr1").mkdir()
    sources = [tmp_path / "csrc" / "bindings.cpp", tmp_path / "csrc" / "cuda" / "op.cu"]
    built = [tmp_path / "vsr1" / "_C.cpython-311.so", tmp_path / "vsr1" / "_cuda.cpython-311.so"]
    for path in sources:
        path.touch()
    assert gpu.stale(tmp_path / "vsr1", tmp_path) == ["vsr1._C", "vsr1._cuda"]
    for path in built:
        path.touch()
        os.utime(path, (2e9, 2e9))
    assert gpu.stale(tmp_path / "vsr1", tmp_path) == []
    os.utime(sources[1], (3e9, 3e9))
    assert gpu.stale(tmp_path / "vsr1", tmp_path) == ["vsr1._cuda"]


@pytest.mark.parametrize("op", sorted(path.stem for path in (ROOT / "bench").glob("gpu_*.py")))
def test_the_tests_that_are_sanitized_exist(op: str) -> None:
    pytest.importorskip("triton")
    module = importlib.import_module(f"bench.{op}")
    assert module.TESTS and all(Path(path).exists() for path in module.TESTS)
    for test in module.SANITIZED:
        path, _, name = test.partition("::")
        assert path in module.TESTS
        assert name in {
            node.name for node in ast.parse(Path(path).read_text()).body if isinstance(node, ast.FunctionDef)
        }

"""The ops on this machine's GPU: their tests, then their times beside their peers.

    python -m bench.gpu [--only corpus_scan] [--without-tests]

An op takes part with a file `bench/gpu_<op>.py` that has TESTS, test files to run, and measurements(), which checks every answer
before it times it. The figures go to bench/results/<GPU>.json and, as a table, to the screen. Nothing is timed where the tests
fail. On a machine without a GPU the Triton kernels are compiled for compute capability 8.0 and 9.0 instead, by the tests that ask
ptxas for registers, spills and shared memory.

Times are medians of CUDA events with the L2 cache flushed before each call. `graph` replays the call from a CUDA graph, so that
the launches of the small kernels behind a sweep are not part of it; `eager` calls it from Python.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass
class Measurement:
    """One line: milliseconds of ours from a CUDA graph, and of reading the input once; what else is known about it."""

    case: str
    graph: float
    floor: float
    backend: str | None = None
    eager: float | None = None
    workspace_mib: float | None = None
    peers: dict[str, float] = field(default_factory=dict)


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call from Python."""
    from triton.testing import do_bench

    return do_bench(call, warmup=15, rep=60, return_mode="median")


def replayed(call: Callable[[], object]) -> float:
    """The median time of a call that was captured in a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay)


def markdown(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The tables, one an op."""
    for op, lines in results.items():
        yield f"\n### {op}\n"
        yield "| case | backend | graph, ms | of the floor | eager, ms | peers, ms | workspace, MiB |"
        yield "| --- | --- | --- | --- | --- | --- | --- |"
        for line in lines:
            peers = ", ".join(f"{name} {time:.2f}" for name, time in line["peers"].items())
            cells = (
                line["case"],
                line["backend"] or "",
                f"{line['graph']:.3f}",
                f"{line['floor'] / line['graph']:.0%}",
                "" if line["eager"] is None else f"{line['eager']:.3f}",
                peers,
                "" if line["workspace_mib"] is None else f"{line['workspace_mib']:.0f}",
            )
            yield "| " + " | ".join(cells) + " |"


def pytest_passes(*arguments: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, check=False).returncode == 0


def main() -> int:
    """Runs tests and measurements; returns 1 if a test fails."""
    ops = sorted(path.stem.removeprefix("gpu_") for path in HERE.glob("gpu_*.py"))
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--only", choices=ops, action="append", help="an op; all without this")
    parser.add_argument("--without-tests", action="store_true", help="when they have just been run")
    arguments = parser.parse_args()
    modules = {op: importlib.import_module(f"bench.gpu_{op}") for op in arguments.only or ops}
    tests = [test for module in modules.values() for test in module.TESTS]
    if not torch.cuda.is_available():
        print("torch sees no GPU: compiling the Triton kernels for compute capability 8.0 and 9.0 instead")
        return 0 if pytest_passes(*tests, "-k", "compiles", "--verbose") else 1
    if not arguments.without_tests and not pytest_passes(*tests):
        print("tests fail on this GPU: nothing is timed")
        return 1
    name = torch.cuda.get_device_name()
    results: dict[str, list[dict[str, Any]]] = {}
    for op, module in modules.items():
        results[op] = []
        for measurement in module.measurements():
            results[op].append(asdict(measurement))
            print(f"{op}: {measurement.case}: {measurement.graph:.3f} ms", flush=True)
    path = HERE / "results" / f"{name.replace(' ', '-')}.json"
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": importlib.import_module("triton").__version__,
    }
    machine = {"gpu": name, "date": date.today().isoformat(), **versions}
    entries = {op: {"machine": machine, "measurements": lines} for op, lines in results.items()}
    path.write_text(json.dumps({**before, **entries}, indent=1) + "\n")
    print(f"\n{name}, torch {torch.__version__}, {machine['date']}: {path.relative_to(ROOT)}")
    print("\n".join(markdown(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ops on this machine's GPU: build, tests, memcheck, then their times beside their peers, within eight minutes.

    python -m bench.gpu [--only corpus_scan] [--without-tests]

An op takes part with a file `bench/gpu_<op>.py`: TESTS, test files to run (torch.empty is full of NaN under tests/ops);
SANITIZED, small tests to run once more under compute-sanitizer where that program is found; COUNT and measurements(), which
checks every answer before it times it. Where nvcc is found the extension is built first. Nothing is timed where the build or a
test fails. The figures go to bench/results/<GPU>.json and, as a table, to the screen. On a machine without a GPU the Triton
kernels are compiled for compute capability 8.0 and 9.0 instead, by the tests that ask ptxas for registers, spills and memory.

Times are medians of CUDA events with the L2 cache flushed before each call: of a CUDA graph's replay, so that the launches of
the small kernels behind a sweep are not part of it, and of the same call from Python.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.harness import Measurement, versions
from bench.report import entry, publish, section

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Seconds that a step may take; together eight minutes for one op. More ops share the last one.
BUILD, TESTS, MEMCHECK, MEASURE = 80, 180, 60, 150
COMPILE = 600
SOURCES = {"_C": ("csrc/*.cpp", "csrc/cpu/*", "csrc/include/**/*.*", "csrc/cuda/noise.cuh"), "_cuda": ("csrc/cuda/*",)}


def milliseconds(call: Callable[[], object]) -> float:
    """The median time of a call from Python."""
    from triton.testing import do_bench

    return do_bench(call, warmup=15, rep=60, return_mode="median")


def replayed(call: Callable[[], object]) -> float:
    """The median time of a call that was captured in a CUDA graph. RuntimeError for one that cannot be captured."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return milliseconds(graph.replay)


def workspace(call: Callable[[], object]) -> float:
    """MiB that a call takes at its worst moment, beside what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def run(what: str, limit: float, *command: str, **environment: str) -> int | None:
    """The exit status of a command run from the root of the project; None if it took longer than `limit` seconds."""
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:  # with all that it has started: nothing may go on beside what is timed next
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    told = f"longer than {limit:.0f} s" if status is None else f"exit status {status}"
    print(f"[{what}: {told}, {time.monotonic() - start:.0f} s]", flush=True)
    return status


def stale(package: Path = ROOT / "vsr1", root: Path = ROOT) -> list[str]:
    """The compiled modules that are missing or older than one of their sources."""
    found = []
    for name, patterns in SOURCES.items():
        sources = [path.stat().st_mtime for pattern in patterns for path in root.glob(pattern)]
        built = [path.stat().st_mtime for path in package.glob(f"{name}.*.so")]
        if not built or max(built) < max(sources):
            found.append(f"vsr1.{name}")
    return found


def build() -> str | None:
    """Build the extension where nvcc is found; what is wrong after that, or None."""
    if shutil.which("nvcc") is None:
        print("no nvcc on the PATH: the Triton kernels are measured, and CUDA C++ as it was built before, if it was")
        return None
    if not stale():
        return None
    status = run("build", BUILD, sys.executable, "setup.py", "build_ext", "--inplace")
    if status != 0 or stale():
        return f"the build failed: {', '.join(stale()) or 'see above'}"
    return None


def passes(limit: float, tests: Sequence[str], *options: str) -> bool:
    """Whether there are such tests, and all of them pass in time."""
    return run("tests", limit, sys.executable, "-m", "pytest", "-q", *tests, *options) == 0


def memcheck(tests: Sequence[str]) -> bool:
    """False if compute-sanitizer finds an error in the tests; True also where it is not installed or does not finish."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("no compute-sanitizer on the PATH: no memcheck")
        return True
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    options = ("--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "99")
    # torch's allocator hands out parts of large blocks, past whose ends a read would go unnoticed.
    status = run("memcheck", MEMCHECK, program, *options, *pytest, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return status in (0, None)


def measure(op: str, module: ModuleType, limit: float) -> list[Measurement]:
    """The lines of one op, as many as there are within the limit, told as they come."""
    start, lines = time.monotonic(), []
    for line in module.measurements():
        lines.append(line)
        elapsed = time.monotonic() - start
        left = elapsed / len(lines) * (module.COUNT - len(lines))
        print(
            f"[{elapsed:.0f} s, {left:.0f} s to go] {op} {len(lines)}/{module.COUNT}: {line.case}: {line.ms:.3f} ms",
            flush=True,
        )
        if elapsed > limit:
            print(f"{op} stops after {len(lines)} of {module.COUNT} cases: {limit:.0f} s are over", flush=True)
            break
    return lines


def machine() -> dict[str, Any]:
    """Where GPU figures are measured, with what, and when."""
    packages = ("torch", "triton", "faiss-gpu", "faiss-gpu-cuvs", "cuvs-cu12", "cuvs-cu13", "flashlib")
    packages += ("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    return {
        "name": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "cuda": torch.version.cuda,
        **versions(*packages),
    }


def main() -> int:
    """Runs all steps; returns 1 if one fails."""
    ops = sorted(path.stem.removeprefix("gpu_") for path in HERE.glob("gpu_*.py"))
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--only", choices=ops, action="append", help="an op; all without this")
    parser.add_argument("--without-tests", action="store_true", help="when they have just been run")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    if gpu and (wrong := build()):
        print(wrong)
        return 1
    modules = {op: importlib.import_module(f"bench.gpu_{op}") for op in arguments.only or ops}
    tests = [test for module in modules.values() for test in module.TESTS]
    if not gpu:
        print("torch sees no GPU: compiling the Triton kernels for compute capability 8.0 and 9.0 instead", flush=True)
        return 0 if passes(COMPILE, tests, "-k", "compiles", "--verbose") else 1
    if not arguments.without_tests:
        if not passes(TESTS, tests):
            print("the tests do not pass on this GPU: nothing is timed")
            return 1
        if not memcheck([test for module in modules.values() for test in module.SANITIZED]):
            print("compute-sanitizer finds errors: nothing is timed")
            return 1
    where = machine()
    entries = {op: entry(where, measure(op, module, MEASURE / len(modules))) for op, module in modules.items()}
    for op, one in entries.items():
        print("", *section(op, one), sep="\n")
    print("wrote", *(path.relative_to(ROOT) for path in dict.fromkeys(publish(entries))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What all benchmarks share: a line of figures and the goals it is held to, and on the CPU how its times are taken.

A benchmark names a case, its contenders (ours first) and a check. Every contender is called once and its answer checked, so
nothing wrong is ever timed. Then they run in turns, round after round, beside a plain read of the same bytes, so that what
disturbs the machine disturbs all of them; a contender's time is its best, because a disturbance only ever adds. Ours is timed
by pytest-benchmark, whose own options (`--benchmark-json`, `--benchmark-compare`) therefore work as well.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

BUDGET = 1.5  # seconds that a contender is timed for, unless two calls take longer
LONG = 4.0  # seconds of a call that is not repeated: its own noise is small beside what all others would wait
MOST_ROUNDS = 15
FLOOR = "floor"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Goal:
    """What was measured against what should be: at most `limit`, or at least if `least`, in units of `unit`."""

    unit: str
    limit: float
    measured: float
    least: bool = False

    @property
    def shortfall(self) -> float:
        """By how much of it the limit is missed; 0 where it is met."""
        over = self.measured / self.limit
        return max(0.0, 1.0 - over if self.least else over - 1.0)

    def __str__(self) -> str:
        """`≤ 1.2 x time of floor: 1.1, met`, `≥ 14 x FAISS: 12.7, **missed by 9 %**`."""
        verdict = f"**missed by {max(1, round(100 * self.shortfall))} %**" if self.shortfall else "met"
        return f"{'≥' if self.least else '≤'} {self.limit:g} {self.unit}: {self.measured:.3g}, {verdict}"


@dataclass
class Measurement:
    """One line of a table. Times are milliseconds, memory is MiB."""

    case: str
    ms: float
    bytes: int | None = None
    """Size of the input, each byte counted once."""
    floor: float | None = None
    """The time of only reading those bytes, in the same run."""
    backend: str | None = None
    eager: float | None = None
    """On a GPU `ms` is a CUDA graph's replay, and this is the same call from Python."""
    mib: float | None = None
    """Memory at the worst moment of a call, beside what was there before it."""
    peers: dict[str, float] = field(default_factory=dict)
    peers_mib: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that could not take part, and why."""
    counts: dict[str, dict[str, float]] = field(default_factory=dict)
    """What a call costs beside time: of each thing counted, how often each contender does it, ours first."""
    goals: list[Goal] = field(default_factory=list)
    note: str = ""
    """Why a goal is missed, if it is and somebody knows."""

    def held_to(self, *bounds: Bound) -> Measurement:
        """The same line with the goals that these figures decide."""
        self.goals = [goal for bound in bounds if (goal := bound(self)) is not None]
        return self

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> Measurement:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**line, "goals": [Goal(**goal) for goal in line["goals"]]})


Bound = Callable[[Measurement], Goal | None]
"""Looks at a line's figures; None where one that it needs is missing."""


def faster_than(peer: str, times: float) -> Bound:
    """Ours is at least `times` times as fast as that peer."""
    return lambda line: Goal(f"x {peer}", times, line.peers[peer] / line.ms, least=True) if peer in line.peers else None


def within(times: float, of: str = FLOOR) -> Bound:
    """Ours takes at most `times` times what that peer, or reading the bytes, takes."""

    def bound(line: Measurement) -> Goal | None:
        other = line.floor if of == FLOOR else line.peers.get(of)
        return None if other is None else Goal(f"x time of {of}", times, line.ms / other)

    return bound


def milliseconds_at_most(limit: float) -> Bound:
    return lambda line: Goal("ms", limit, line.ms)


def mib_at_most(limit: float) -> Bound:
    return lambda line: None if line.mib is None else Goal("MiB", limit, line.mib)


def memory_within(times: float, of: str) -> Bound:
    """Ours needs at most `times` times the memory of that peer."""

    def bound(line: Measurement) -> Goal | None:
        other = line.peers_mib.get(of)
        return None if line.mib is None or not other else Goal(f"x memory of {of}", times, line.mib / other)

    return bound


def compare(
    benchmark: BenchmarkFixture,
    case: str,
    contenders: Mapping[str, Call | str],
    check: Callable[[str, Any], None],
    *,
    reads: Tensor | None = None,
    bounds: Sequence[Bound] = (),
    counts: Mapping[str, Mapping[str, float]] | None = None,
    note: str = "",
    budget: float = BUDGET,
    most_rounds: int = MOST_ROUNDS,
) -> Measurement | None:
    """Check all contenders, time them in turns, and hold the first, which is ours, to the bounds.

    A contender that is text instead of a call is absent, and the text says why. `check(name, answer)` raises AssertionError
    for an answer that is wrong. `reads` are the bytes that ours reads. `counts` joins the line as it is when all are timed, so
    the check may fill it. `budget`: seconds for each, where small differences between long calls matter.
    None under `--benchmark-disable`: checked, not timed.
    """
    calls = {name: call for name, call in contenders.items() if not isinstance(call, str)}
    ours = next(iter(calls))
    times: dict[str, list[float]] = {}
    mib: dict[str, float | None] = {}
    for name, call in calls.items():
        answers: list[Any] = []
        mib[name], seconds = peak_memory(lambda call=call, answers=answers: answers.append(call()))
        check(name, answers.pop())
        if seconds < LONG:  # what the first call loads and keeps is no part of the memory of the second
            mib[name], seconds = peak_memory(call)
        times[name] = [seconds]
    if reads is not None:
        calls[FLOOR], times[FLOOR] = fastest_read(reads), []
    others = [name for name in calls if name != ours]

    def take_turns() -> None:
        for name in others:
            spent = sum(times[name])
            if spent < budget or (len(times[name]) < 2 and spent < LONG):
                start = time.perf_counter()
                calls[name]()
                times[name].append(time.perf_counter() - start)

    rounds = min(most_rounds, max(1 if times[ours][0] >= LONG else 2, int(budget / times[ours][0])))
    benchmark.pedantic(calls[ours], setup=take_turns, rounds=rounds)
    if benchmark.stats is None:
        return None
    best = {name: 1e3 * min(taken) for name, taken in times.items()}
    line = Measurement(
        case,
        1e3 * benchmark.stats.stats.min,
        bytes=None if reads is None else reads.nbytes,
        floor=best.pop(FLOOR, None),
        mib=mib[ours],
        peers={name: best[name] for name in others if name in best},
        peers_mib={name: used for name, used in mib.items() if name != ours and used is not None},
        absent={name: why for name, why in contenders.items() if isinstance(why, str)},
        counts={what: dict(numbers) for what, numbers in (counts or {}).items()},
        note=note,
    )
    return line.held_to(*bounds)


def fastest_read(tensor: Tensor) -> Call:
    """The fastest way at hand to read every byte of a contiguous tensor once, on as many threads as torch uses."""
    words = tensor.view(-1).view(torch.int64)
    parts = np.array_split(words.numpy(), torch.get_num_threads())
    pool = _threads(len(parts))
    ways = (words.sum, words.view(torch.float32).amax, lambda: list(pool.map(np.max, parts)))

    def seconds(way: Call) -> float:
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return min(ways, key=seconds)


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)


def peak_memory(call: Call) -> tuple[float | None, float]:
    """The MiB of memory that a call takes at its worst moment, None where Linux does not count them, and its seconds."""
    gc.collect()
    before = None
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or the call would be served from what others have freed
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
    except (AttributeError, OSError):
        pass
    start = time.perf_counter()
    answer = call()
    seconds = time.perf_counter() - start
    used = None if before is None else max(0, _status("VmHWM") - before) / 1024
    del answer
    return used, seconds


def _status(name: str) -> int:
    """KiB of this process, by its name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def processor() -> str:
    """The model of this machine's CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Where CPU figures are measured, with what, and when; `name` names the file they are kept in."""
    try:
        isa = importlib.import_module("vsr1._C").isa()
    except ImportError:
        isa = "no extension"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": f"{processor()}, {cores} cores, {isa}",
        "date": date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **versions("torch", "numpy", "faiss-cpu", "usearch", "trl", "liger-kernel"),
        **versions("av", "opencv-python-headless", "decord", "torchcodec"),
    }


def versions(*packages: str) -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

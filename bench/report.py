"""The tables of speed: what a run prints at its end, what `bench/results/` keeps, and the README's section.

    python -m bench.report

takes the last `pytest --benchmark` of every op (they lie in `.benchmarks/`) into `bench/results/<machine>.json`, beside what
`python -m bench.gpu` wrote there, prints all of it, and writes into the README the cases that have a goal or lose to a peer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import Measurement
from bench.readme import README, replace

ROOT = Path(__file__).resolve().parent.parent
LAST = ROOT / ".benchmarks" / "last"
RESULTS = Path(__file__).resolve().parent / "results"
Entry = dict[str, Any]
"""What is kept of one op on one machine: `machine`, with name, date and versions, and `measurements`."""


def entry(machine: Mapping[str, Any], lines: Sequence[Measurement]) -> Entry:
    return {"machine": dict(machine), "measurements": [asdict(line) for line in lines]}


def keep_last(op: str, machine: Mapping[str, Any], lines: Sequence[Measurement], folder: Path = LAST) -> None:
    """Remember the last run of an op, whole, until it is published or measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{op}.json").write_text(json.dumps(entry(machine, lines), indent=1) + "\n")


def publish(entries: Mapping[str, Entry], folder: Path = RESULTS) -> list[Path]:
    """Write each op's entry into the file of its machine; other ops that the file holds stay. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for op, one in entries.items():
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", one["machine"]["name"]).strip("-")
        path = folder / f"{slug}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, op: one}, indent=1) + "\n")
        written.append(path)
    return written


def table(lines: Sequence[Measurement]) -> Iterator[str]:
    """A Markdown table whose columns line up, without the columns that no line fills."""
    peers = list(dict.fromkeys(name for line in lines for name in line.peers))
    counted = dict.fromkeys(what for line in lines for what in line.counts)
    columns = {
        "case": [line.case for line in lines],
        "ms": [_digits(line.ms) for line in lines],
        "GB/s": [_digits(line.bytes / line.ms / 1e6) if line.bytes else "" for line in lines],
        "% of floor speed": [f"{100 * line.floor / line.ms:.0f}" if line.floor else "" for line in lines],
        **{f"x {peer}": [_times(line, peer) for line in lines] for peer in peers},
        "MiB": ["" if line.mib is None else f"{line.mib:.0f}" for line in lines],
        **{what: [_counts(line, what) for line in lines] for what in counted},
        "from Python, ms": ["" if line.eager is None else _digits(line.eager) for line in lines],
        "backend": [line.backend or "" for line in lines],
        "goal": ["; ".join(map(str, line.goals)) for line in lines],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    widths = [max(map(len, (name, *cells))) for name, cells in filled.items()]
    for row in (filled, ["-" * width for width in widths], *zip(*filled.values(), strict=True)):
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"


def _digits(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _times(line: Measurement, peer: str) -> str:
    """How many times as fast as the peer."""
    return f"{line.peers[peer] / line.ms:.2g}" if peer in line.peers else ""


def _counts(line: Measurement, what: str) -> str:
    """Ours, and the others' behind their names: `1, public 72`."""
    first, *others = line.counts.get(what, {"": ""}).items()
    return ", ".join([str(first[1]), *(f"{name} {number}" for name, number in others)])


def remarks(lines: Sequence[Measurement]) -> Iterator[str]:
    """Why goals are missed, and why peers are absent: list items."""
    missed = [line for line in lines if line.note and any(goal.shortfall for goal in line.goals)]
    for note in dict.fromkeys(line.note for line in missed):
        yield f"- missed, {'; '.join(line.case for line in missed if line.note == note)}: {note}"
    absent = {f"{name}: {why}" for line in lines for name, why in line.absent.items()}
    yield from (f"- absent, {reason}" for reason in sorted(absent))


def telling(line: Measurement) -> bool:
    """Whether a line belongs into a short report: it has a goal, or a peer that is not another call of ours is faster."""
    return bool(line.goals) or any(time < line.ms for peer, time in line.peers.items() if not peer.startswith("own "))


def section(op: str, one: Entry, *, short: bool = False) -> list[str]:
    """One op on one machine: where and when it was measured, the table, the remarks; empty without a line to show."""
    lines = [Measurement.read(line) for line in one["measurements"]]
    if short:
        lines = [line for line in lines if telling(line)]
    if not lines:
        return []
    facts = dict(one["machine"])
    name, day = facts.pop("name"), facts.pop("date")
    measured = ", ".join(f"{key} {value}" for key, value in facts.items())
    remarked = list(remarks(lines))
    return [f"**{op}** on {name}, {day} ({measured}):", "", *table(lines), *([""] if remarked else []), *remarked, ""]


def speed(files: Sequence[Mapping[str, Entry]], *, short: bool = False) -> str:
    """All ops of all machines, with the count of goals that are met."""
    shown = [line for one in files for op, entry in one.items() for line in section(op, entry, short=short)]
    goals = [
        goal
        for one in files
        for entry in one.values()
        for line in entry["measurements"]
        for goal in Measurement.read(line).goals
    ]
    missed = sum(goal.shortfall > 0 for goal in goals)
    return "\n".join([f"{len(goals) - missed} of {len(goals)} goals are met.", "", *shown]).rstrip()


def main(last: Path = LAST, results: Path = RESULTS, readme: Path = README) -> None:
    entries = {path.stem: json.loads(path.read_text()) for path in sorted(last.glob("*.json"))}
    for path in dict.fromkeys(publish(entries, results)):
        print(f"wrote {path}")
    files = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    replace("speed", speed(files, short=True), readme)
    print(speed(files))


if __name__ == "__main__":
    main()

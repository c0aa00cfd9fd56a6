"""`vsr1 eval RUN --ablations`: a finished run's policies without parts of the loop, beside it, and in its place.

A run folder is opened, whatever made it; what is asked for is run condition by condition and kept in the run's
`ablations/`, and the figures of all that stands there are printed and written to `ablations.json`.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vsr1.command import no_bars
from vsr1.errors import ConfigError
from vsr1.eval import ablations
from vsr1.eval.ablations import EVERYTHING, METHOD, Ablations, Opened, slug
from vsr1.eval.report import write_report
from vsr1.files import write_whole
from vsr1.job import reopened
from vsr1.models.policy import Policy
from vsr1.train.monitor import Phase, Terminal

ZERO_SHOT, FINE_TUNED = "zero-shot", "fine-tuned one-shot"
Json = dict[str, Any]


def names_of(given: Sequence[str]) -> list[str]:
    """The conditions and baselines that the command line names; all of them where it names none, or `all`."""
    known = {slug(name): name for name in (*EVERYTHING, ZERO_SHOT, FINE_TUNED)}
    if unknown := [name for name in given if name not in known and name != "all"]:
        raise ConfigError(f"unknown ablation '{unknown[0]}'; known: all, {', '.join(known)}")
    return list(known.values()) if not given or "all" in given else [known[name] for name in given]


def run(arguments: Namespace) -> None:
    """Measure what is asked for, print it, and write `ablations.json` and the report."""
    folder, names = arguments.results, names_of(arguments.ablations)
    no_bars()
    opened = reopened(folder).opened()
    if arguments.stage not in (None, *opened.stages):
        raise ConfigError(f"'{folder}' has no stage '{arguments.stage}'; it has {', '.join(opened.stages)}")
    moments, console = opened.moments[: arguments.queries], Console(width=130)
    settings = replace(opened.settings, resamples=arguments.resamples)
    head: Json = {
        "seed": opened.seed,
        "queries": len(moments),
        "turns": opened.settings.turns,
        "corpus_size": len(opened.shelf.video_ids),
    }
    found = head | _earlier(folder, head)

    def work_on(policy: Policy, label: str) -> Ablations:
        given = policy, opened.embedder, opened.shelf, moments, settings, opened.seed
        return Ablations(*given, kept=folder / "ablations" / label, progress=_progress(console, label))

    for stage in [arguments.stage] if arguments.stage else opened.stages:
        work = work_on(opened.policy(stage), stage)
        wanted = {METHOD, *names, *work.standing()}
        found[stage] = ablations.figures(work, wanted) | {"by_turns": ablations.by_turns(work)}
        for drawn in _tables(stage, found[stage]):
            console.print(drawn)
    for name in (ZERO_SHOT, FINE_TUNED):
        if name in names:
            policy = opened.policy(opened.stages[0]) if name == FINE_TUNED else _zero_shot(opened, arguments.zero_shot)
            label = opened.stages[0] if name == FINE_TUNED else name
            found.setdefault("baselines", {})[name] = ablations.baseline(work_on(policy, label))
    if found.get("baselines"):
        console.print(_baselines(found["baselines"]))
    write_whole(folder / "ablations.json", json.dumps(found, indent=1))
    print(f"written: {folder / 'ablations.json'}")
    if (folder / "report.html").is_file():
        write_report(folder, lambda video_id: Path(opened.shelf.path(video_id)))
        print(f"written: {folder / 'report.html'}")


def _earlier(folder: Path, head: Json) -> Json:
    """What an earlier call found of the same queries: the stages and baselines that this one may not ask for."""
    path = folder / "ablations.json"
    before: Json = json.loads(path.read_text()) if path.is_file() else {}
    return before if head.items() <= before.items() else {}


def _progress(console: Console, label: str) -> Callable[[str, int, int], None]:
    """A line every few seconds and one at the end of every condition that is run."""
    phases: dict[str, Phase] = {}

    def tell(name: str, done: int, total: int) -> None:
        phase = phases.setdefault(name, Phase(Terminal(console), f"{label}: {name}", total, 0))
        phase.update(done)

    return tell


def _zero_shot(opened: Opened, folder: Path | None) -> Policy:
    """The policy in `folder`, or the run's own before any training."""
    if folder is not None:
        return Policy.from_pretrained(folder).to(opened.embedder.videos.device)
    policy = opened.base()
    if policy is None:
        raise ConfigError("this run does not hold the policy that it began with: name its folder with --zero-shot")
    return policy.eval()


def _tables(stage: str, found: Json) -> Iterator[Table]:
    """What the method's parts are worth, by condition, by turns and by soft tokens, and soft against hard refinement."""
    drawn = _table(f"{stage}, percent", "R@1 excluded", "method's gain", "VCMR 0.5", "method's gain")
    for name, one in found["ablations"].items():
        gain = one.get("gain", {})
        gains = _cell(gain.get("R@1"), "+"), _cell(gain.get("vcmr", {}).get("0.5"), "+")
        drawn.add_row(name, _cell(one["R@1"]), gains[0], _cell(one["vcmr"]["0.5"]), gains[1])
    yield drawn
    drawn = _table("by turns", "R@1", "VCMR 0.5", "VER", "answered")
    for one in found["by_turns"]:
        drawn.add_row(str(one["turns"]), *map(_cell, (one["R@1"], one["vcmr"]["0.5"], one["ver"], one["answered"])))
    yield drawn
    if "by_soft_tokens" in found:
        drawn = _table("by soft tokens", "R@1, first refinement", "R@1 excluded", "VCMR 0.5")
        for one in found["by_soft_tokens"]:
            loop = one.get("R@1 excluded"), one.get("vcmr", {}).get("0.5")
            drawn.add_row(str(one["tokens"]), _cell(one["R@1"]), *map(_cell, loop))
        yield drawn
    if "refinements" in found:
        drawn = _table("refinement", "generated tokens", "R@1 excluded, percent", "milliseconds")
        for kind, one in found["refinements"].items():
            drawn.add_row(kind, _cell(one["tokens"], scale=1), _cell(one["R@1"]), _cell(one["seconds"], scale=1000))
        yield drawn


def _baselines(found: Json) -> Table:
    drawn = _table("one shot, percent", "VCMR 0.3", "0.5", "0.7", "VER", "VR R@1", "R@5", "R@10", "R@100")
    for name, one in found.items():
        shares = *one["vcmr"].values(), one["ver"], *(one[f"R@{k}"] for k in (1, 5, 10, 100))
        drawn.add_row(name, *(_cell(share, bounds=False) for share in shares))
    return drawn


def _table(title: str, *columns: str) -> Table:
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    drawn.add_column(title, no_wrap=True)
    for column in columns:
        drawn.add_column(column, justify="right")
    return drawn


def _cell(interval: Json | None, sign: str = "", scale: float = 100, bounds: bool = True) -> str:
    """`value (low to high)`, or a dash where there is none."""
    if interval is None or interval["value"] is None:
        return "-"
    value, low, high = (f"{scale * interval[bound]:{sign}.1f}" for bound in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if bounds else value

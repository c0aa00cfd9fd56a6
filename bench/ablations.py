"""What stage 2 owes to each of its parts: GRPO without some of them, from the same start, on the same queries.

    python -m bench.ablations run runs/tiny runs/seed-2 --only text-only
    python -m bench.ablations table

`run` takes finished runs of `vsr1 train`, whose embedder and SFT policy every variant starts from, and keeps what it finds in
`bench/ablations.json`; `table` writes that between the markers of `docs/ablations.md`. The stage 2 of those runs needs no
run of its own here: it is what their folders hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.learning import cell, interval, pooled
from bench.readme import replace as replace_between
from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Sampling
from vsr1.agent.verdict import Memo
from vsr1.eval import ablations, metrics
from vsr1.job import reopened
from vsr1.models.policy import Policy
from vsr1.train.grpo import train_grpo
from vsr1.train.loop import Keeper
from vsr1.train.monitor import Monitor
from vsr1.train.sft import train_sft
from vsr1.train.templated import Templates
from vsr1.world_job import WorldJob

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "ablations.json"
PAGE = ROOT / "docs" / "ablations.md"

VARIANTS: dict[str, dict[str, Any]] = {
    "start": {},
    "default": {},
    "text-only": {"latent_weight": 0.0, "contrast_weight": 0.0, "distillation_weight": 0.0},
    "soft-only": {"rewards": {"verdicts": 0.0}, "latent_weight": 0.0},
    "turn-reward": {"contrast_weight": 0.0, "distillation_weight": 0.0},
    "contrast": {"latent_weight": 0.0, "distillation_weight": 0.0},
    "accumulated": {"accumulate": True},
    "supervised": {},
}
NAMES = {
    "start": "SFT, the start",
    "default": "GRPO, as above",
    "text-only": "its text alone learns",
    "soft-only": "nothing is learned from rewards: InfoNCE and distillation alone",
    "turn-reward": "soft tokens learn from the turn's retrieval reward alone",
    "contrast": "soft tokens learn from InfoNCE alone",
    "accumulated": "trained with soft tokens that accumulate",
    "supervised": "no GRPO: SFT goes on, its soft tokens distilled, for as many steps",
}
FURTHER_RATE = 3e-4  # a fifth of SFT's peak
LOOPS = {
    "refinement + exclusion": LoopSettings(),
    "exclusion only": LoopSettings(refinement="none"),
    "accumulated": LoopSettings(accumulate=True),
}
Figures = dict[str, Any]


def learn(start: WorldJob, variant: str) -> Policy:
    """The policy of a variant: trained here, except for those that the run holds."""
    if variant in ("start", "default"):
        return start.policy("sft" if variant == "start" else "grpo", start.embedder())
    policy = start.policy("sft", start.embedder())
    if variant == "supervised":
        return further(start, policy)
    settings = replace(start.config.grpo, **VARIANTS[variant], validate_every=0)
    with TemporaryDirectory() as aside, Monitor(Path(aside)) as monitor:
        keeper = Keeper(Path(aside) / "checkpoints", monitor, float("inf"))
        train_grpo(
            policy,
            start.embedder(),
            start.moments("grpo"),
            start.shelf("grpo", start.embedder(), policy),
            settings,
            start.config.seed,
            keeper,
            meanings=start.meanings(start.embedder()),
        )
    return policy.eval()


def further(start: WorldJob, policy: Policy) -> Policy:
    """As many steps of SFT as stage 2 takes, at a rate that a finished policy bears, soft tokens learning from the first."""
    settings = start.config.sft
    settings = replace(
        settings,
        optimisation=replace(
            settings.optimisation, steps=start.config.grpo.optimisation.steps, learning_rate=FURTHER_RATE, warmup=5
        ),
        head_learning_rate=FURTHER_RATE,
        refine_from=0.0,
        contrast_from=0.0,
    )
    with TemporaryDirectory() as aside, Monitor(Path(aside)) as monitor:
        keeper = Keeper(Path(aside) / "checkpoints", monitor, float("inf"))
        embedder = start.embedder()
        shelf = start.shelf("sft", embedder, policy)
        source = Templates(policy, embedder, start.world(), shelf, settings, start.config.seed + 1000)
        train_sft(policy, embedder, source, shelf, settings, keeper)
    return policy.eval()


def measure(start: WorldJob, policy: Policy) -> dict[str, Figures]:
    """Per loop, one number a test query: whether it was solved (vcmr) and whether the right video leads the last ranking once
    the rejected ones have left it (R@1)."""
    settings, embedder = start.config.evaluation, start.embedder()
    shelf = start.shelf("test", embedder, policy)
    moments = start.moments("test")[: settings.queries or None]
    rows = {video_id: row for row, video_id in enumerate(shelf.video_ids)}
    sampling = Sampling(seed=start.config.seed, max_tokens=settings.max_tokens)
    memo: Memo = {}
    found: dict[str, Figures] = {}
    for name, loop in LOOPS.items():
        loop = replace(loop, turns=settings.turns, sampling=sampling, batch=128)
        done = rollout.run(policy, embedder, shelf, moments, settings=loop, memo=memo)
        if any(one.stop == "failed" for one in done):
            raise SystemExit(f"'{start.folder}': {next(one.failure for one in done if one.failure)}")
        found[name] = {
            "vcmr": metrics.per_query(done)["vcmr 0.5"].tolist(),
            "R@1": ablations.hits(done, shelf.matrix(), rows, exclude=True).tolist(),
            "ver": metrics.verification(done)["ver"],
        }
    return found


def run(folders: Sequence[Path], only: Sequence[str]) -> None:
    """Train and measure; results of other variants and seeds stay."""
    for folder in folders:
        start = reopened(folder)
        if not isinstance(start, WorldJob):
            raise SystemExit(f"'{folder}' is no run of the rendered world")
        for variant in only or VARIANTS:
            found = measure(start, learn(start, variant))
            kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
            kept.setdefault(variant, {})[str(start.config.seed)] = found
            RESULTS.write_text(json.dumps(kept, indent=None, separators=(",", ":"), sort_keys=True) + "\n")
            shown = {name: round(100 * mean(figures["R@1"]), 1) for name, figures in found.items()}
            print(f"{folder}: {variant}: R@1 {shown}", flush=True)


def table(kept: dict[str, dict[str, dict[str, Figures]]]) -> str:
    """The table and the paired differences, means over the seeds and each seed."""
    lines = [
        "| | VCMR, IoU ≥ 0.5 | excluded only | R@1, rejected excluded | excluded only | accumulating | verification |",
        "|---|---|---|---|---|---|---|",
    ]
    columns = (
        ("refinement + exclusion", "vcmr"),
        ("exclusion only", "vcmr"),
        ("refinement + exclusion", "R@1"),
        ("exclusion only", "R@1"),
        ("accumulated", "R@1"),
        ("refinement + exclusion", "ver"),
    )
    for variant in VARIANTS:
        if variant in kept:
            seeds = [kept[variant][seed] for seed in sorted(kept[variant])]
            cells = [cell([{"value": float(np.mean(one[loop][key]))} for one in seeds]) for loop, key in columns]
            lines.append(f"| {NAMES[variant]} | {' | '.join(cells)} |")
    lines += ["", "Differences from the start in points, with 95 % intervals over the seeds of each:", ""]
    for variant in VARIANTS:
        seeds = [seed for seed in sorted(kept.get(variant, {})) if seed in kept["start"]]
        if variant == "start" or not seeds:
            continue
        for key, name in (("vcmr", "VCMR"), ("R@1", "R@1")):
            loop = "accumulated" if variant == "accumulated" else "refinement + exclusion"
            pairs = [
                (kept[variant][seed][loop][key], kept["start"][seed]["refinement + exclusion"][key]) for seed in seeds
            ]
            gains = [metrics.paired(now, before).as_dict() for now, before in pairs]
            lines.append(f"- {NAMES[variant]}, {name}: {interval(pooled(gains))}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train the variants and measure them")
    running.add_argument("folders", nargs="+", type=Path, help="finished run folders")
    running.add_argument("--only", nargs="*", default=[], choices=list(VARIANTS), help="these variants")
    commands.add_parser("table", help="write docs/ablations.md from what was measured")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.folders, arguments.only)
    else:
        replace_between("ablations", table(json.loads(RESULTS.read_text())), PAGE)

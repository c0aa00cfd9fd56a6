"""`vsr1 eval`: the figures of results that are there, or what differs between two of them.

Results are a run folder, a file with one query a line (our records, or the public code's), or a TVR prediction file with
its annotations. Nothing is run and no model is loaded, unless ablations of a run are asked for (`vsr1.ablating`).
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsr1.command import Parser, guarded
from vsr1.errors import ConfigError, Vsr1Error
from vsr1.files import write_whole

if TYPE_CHECKING:
    from vsr1.eval.metrics import Interval
    from vsr1.eval.outcomes import Floats

Json = dict[str, Any]
_COUNTED = {"text", "soft", "hard"}  # tokens, where all other figures are shares
_TITLES = {
    "ver": "right answers, all turns (VER)",
    "ver_turn1": "right answers, first turn",
    "ver_final": "right answers, last turn",
    "unparsable": "unparsable answers",
    "mean_iou": "mean IoU, right video accepted",
    "text": "tokens a reply",
    "soft": "soft tokens a refinement",
    "hard": "tokens of a refinement in words",
}
_GROUPS = {
    "before": "VR {}, first query",
    "after": "VR {}, last query",
    "vcmr": "VCMR, IoU >= {}",
    "answered": "VCMR with fall-back, IoU >= {}",
}


def main(argv: Sequence[str]) -> int:
    """`vsr1 eval RESULTS [OTHER]`."""

    def work() -> None:
        arguments = _parse(argv)
        if arguments.ablations is not None:
            from vsr1 import ablating

            ablating.run(arguments)
            return
        (_evaluate_tvr if arguments.truth else _evaluate)(arguments)

    return guarded(work, kept="nothing was written")


def _parse(argv: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="vsr1 eval",
        description="All figures of some results, with 95 %% bootstrap intervals; of two results, the paired differences.",
        epilog="vsr1 eval ROOT --policy P --run FOLDER runs a policy on a data set first (vsr1 eval --policy P --help)",
    )
    parser.add_argument("results", type=Path, help="a run folder, a jsonl of results, or TVR's prediction file")
    parser.add_argument("other", type=Path, nargs="?", help="what to compare with: its figures minus those of RESULTS")
    parser.add_argument("--truth", type=Path, metavar="JSONL", help="TVR's annotations, for TVR's prediction files")
    parser.add_argument(
        "--turns", type=int, metavar="N", help="length of the loop (default: as far as the results show)"
    )
    parser.add_argument("--resamples", type=int, default=2000, metavar="N", help="bootstrap resamples (2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (0)")
    parser.add_argument(
        "--out", type=Path, metavar="JSON", help="write the figures here, as eval.json of a run has them"
    )
    parser.add_argument(
        "--public", type=Path, metavar="JSONL", help="write the queries here, in the public field names"
    )
    ablations = parser.add_argument_group("ablations of a finished run, whose models are loaded and run")
    ablations.add_argument(
        "--ablations", nargs="*", metavar="NAME", help="these, or all; kept in the run folder as they finish"
    )
    ablations.add_argument("--queries", type=int, metavar="N", help="the first N of the run's own")
    ablations.add_argument("--stage", metavar="STAGE", help="sft or grpo (default: both)")
    ablations.add_argument("--zero-shot", type=Path, metavar="POLICY", help="in place of the policy the run began with")
    arguments = parser.parse_args(list(argv))
    for name in ("turns", "resamples", "queries"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    for path in (arguments.results, arguments.other, arguments.truth, arguments.zero_shot):
        if path is not None and not path.exists():
            raise ConfigError(f"'{path}' does not exist")
    for path in (arguments.out, arguments.public):
        if path is not None and path.exists():
            raise ConfigError(f"'{path}' exists; choose another file or delete it")
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"'{path}' cannot be written: there is no folder '{path.parent}'")
    if arguments.public and (arguments.other or arguments.truth):
        raise ConfigError("--public writes the queries of one run; give it one, and no --truth")
    if arguments.turns and arguments.truth:
        raise ConfigError("--turns is for results of the loop; TVR's prediction files have no turns")
    if arguments.ablations is None:
        for name in ("queries", "stage", "zero_shot"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is for --ablations")
    elif any((arguments.other, arguments.truth, arguments.turns, arguments.seed, arguments.out, arguments.public)):
        raise ConfigError("--ablations takes one run folder, and of the other flags --resamples alone")
    return arguments


def _evaluate(arguments: Namespace) -> None:
    from vsr1.eval import exchange, metrics, outcomes, public

    found = [exchange.read(path) for path in (arguments.results, arguments.other) if path is not None]
    n, seed = arguments.resamples, arguments.seed
    if arguments.public and found[0].public:
        raise ConfigError(f"'{arguments.results}' has the public field names already: leave out --public")
    for path, one in zip((arguments.results, arguments.other), found, strict=False):
        failed, repeated = int(one.outcomes.failed.sum()), f", {one.repeated} repeated lines" if one.repeated else ""
        print(f"{path}: {len(one.outcomes)} queries, {failed} failed and left out{repeated}")
    try:
        if len(found) == 1:
            turns = arguments.turns or found[0].turns
            table = found[0].outcomes
            summary = metrics.summary(table, turns, n, seed)
            figures = _flat(summary)
            result = {"source": str(arguments.results), **summary, "public": public.result(table, turns)}
        else:
            sides = outcomes.shared(found[0].outcomes, found[1].outcomes)
            _same_queries(len(sides[0]), *(len(one.outcomes) for one in found))
            figures = _json(metrics.difference(*sides, n, seed))
            result = _differences(arguments, len(sides[0]), figures)
    except ValueError as error:
        raise Vsr1Error(f"'{arguments.results}': {error}") from error
    _table(figures, difference=len(found) == 2)
    _write(arguments.out, result)
    if arguments.public:
        path = arguments.results
        records = (row for _, row in exchange.lines(path / "trajectories.jsonl" if path.is_dir() else path))
        try:
            exchange.write_public(arguments.public, records, arguments.turns or found[0].turns)
        except KeyError as error:
            raise Vsr1Error(
                f"'{path}' does not hold the field {error} that --public needs: evaluate it again"
            ) from error
        print(f"written: {arguments.public}")


@dataclass(frozen=True)
class _Tvr:
    figures: Json
    hits: Mapping[str, Floats]


def _evaluate_tvr(arguments: Namespace) -> None:
    from vsr1.eval import metrics, tvr

    truths = tvr.read_truths(arguments.truth)
    n, seed, found = arguments.resamples, arguments.seed, []
    for path in (arguments.results, arguments.other):
        if path is not None:
            given = tvr.read_submission(path)
            found.append(_Tvr(tvr.evaluate(given, truths), tvr.hits(given, truths)))
            print(f"{path}: {len(truths)} descriptions, {', '.join(given.tasks)}")
    if len(found) == 1:
        result: Json = {"source": str(arguments.results), "truth": str(arguments.truth), **found[0].figures}
        figures = _json(metrics.intervals(found[0].hits, n, seed))
        result["intervals"] = figures
    else:
        both = [name for name in found[0].hits if name in found[1].hits]
        if not both:
            raise Vsr1Error("the two prediction files have no task in common")
        _same_queries(len(truths), len(truths), len(truths))
        hits = [one.hits for one in found]
        figures = _json({name: metrics.paired(hits[1][name], hits[0][name], n, seed) for name in both})
        result = _differences(arguments, len(truths), figures)
    _table(figures, difference=len(found) == 2)
    _write(arguments.out, result)


def _same_queries(both: int, *held: int) -> None:
    if not both:
        raise Vsr1Error("no query is in both results without having failed in one: were both on one split?")
    print(f"differences over the {both} queries that both hold and that failed in neither, of {held[0]} and {held[1]}")


def _differences(arguments: Namespace, queries: int, figures: Json) -> Json:
    return {"source": str(arguments.results), "other": str(arguments.other), "queries": queries, "difference": figures}


def _json(figures: Mapping[str, Interval]) -> Json:
    return {name: interval.as_dict() for name, interval in figures.items()}


def _flat(summary: Json) -> Json:
    """The figures of a summary under the names that they have in differences."""
    grouped = {f"{group} {name}": one for group in _GROUPS for name, one in summary[group].items()}
    single = {name: summary[name] for name in _TITLES if name in summary}
    return grouped | single | summary["tokens"]


def _title(name: str) -> str:
    group, _, rest = name.partition(" ")
    return _GROUPS[group].format(rest) if group in _GROUPS else _TITLES.get(name, name)


def _table(figures: Json, difference: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    drawn.add_column("points, other minus results" if difference else "percent", no_wrap=True)
    drawn.add_column("difference" if difference else "value", justify="right", no_wrap=True)
    drawn.add_column("95 % interval", no_wrap=True)
    sign = "+" if difference else ""
    for name, one in figures.items():
        if one["value"] is not None:  # else nothing entered this figure
            scale = 1 if name in _COUNTED else 100
            shown = [f"{scale * one[bound]:{sign}.2f}" for bound in ("value", "low", "high")]
            drawn.add_row(_title(name), shown[0], f"{shown[1]} to {shown[2]}")
    Console(width=100).print(drawn)


def _write(path: Path | None, result: Json) -> None:
    if path is not None:
        write_whole(path, json.dumps(result, indent=1))
        print(f"written: {path}")

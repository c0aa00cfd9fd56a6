"""What each part of the loop is worth: the method without it, with something else in its place, with less of it.

Every condition is one run of the loop over the same queries and becomes one number a query and metric, so that figures,
intervals and paired differences come from the same arrays; with a folder these arrays are kept, and a condition that stands
there is not run again. A greedy verdict depends on the pair of query and video alone, not on how the loop searches, so all
conditions of a policy share their verdicts and each pair is asked about once. What refinement itself earns
shows beside excluding the rejected video without refining, random soft tokens, and soft tokens that the policy made before a
blank or another video.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vsr1.agent import rollout
from vsr1.agent.generate import OwnSpeaker
from vsr1.agent.rollout import Library, LoopSettings
from vsr1.agent.speech import Sampling, Speaker
from vsr1.agent.verdict import Memo
from vsr1.eval import metrics, outcomes, refinements
from vsr1.eval.metrics import THRESHOLDS
from vsr1.eval.outcomes import Floats
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import CorpusMatrix, scan
from vsr1.records import Moment, Trajectory

Json = dict[str, Any]
Values = dict[str, Floats]
"""One number a query and metric, NaN where a query failed or does not enter the metric."""

METHOD = "refinement + exclusion"
IN_WORDS = "refinement in words"
WITHOUT = "exclusion only"
ACCUMULATED = (
    "accumulated soft tokens"  # another loop from its second refinement on, so its second video is the method's
)
ONE_SHOT = "one shot"
CONDITIONS: dict[str, Json] = {
    METHOD: {"fall_back": True},
    WITHOUT: {"refinement": "none"},
    "refinement only": {"exclude": False},
    "no refinement": {"refinement": "none", "exclude": False},
    "random soft tokens": {"refinement": "random"},
    "blank video": {"refinement": "blank"},
    "shuffled video": {"refinement": "shuffled"},
    IN_WORDS: {"refinement": "hard"},
    ACCUMULATED: {"accumulate": True},
    "rocchio": {"refinement": "rocchio"},
    ONE_SHOT: {"turns": 1, "refinement": "none", "exclude": False},
}
SOFT_TOKENS = "soft tokens"  # the curve over their number
_FIRST = f"first refinement by {SOFT_TOKENS}"
EVERYTHING = (*CONDITIONS, SOFT_TOKENS)
_EVERY_COUNT = 100  # up to so many queries the loop is run for every number of soft tokens, beyond for powers of two


@dataclass
class EvaluationSettings:
    """turns of the loop; at most this many queries (0 for all), tokens a reply, bootstrap resamples; calibration: held-out
    queries on which the probabilities of a policy are calibrated (0: they are not); ablated: queries that everything but the
    method is run on (0: all). rows: replies that are spoken at once; pack_tokens: most tokens of prompts that are read in one
    pass."""

    turns: int = 3
    queries: int = 500
    max_tokens: int = 96
    resamples: int = 2000
    calibration: int = 200
    ablated: int = 0
    rows: int = 128
    pack_tokens: int = 32768

    def speaker(self) -> Speaker:
        """What speaks while it is measured."""
        return OwnSpeaker(self.rows, self.pack_tokens)


@dataclass(frozen=True)
class Opened:
    """A finished run, of whatever kind: its embedder, the videos that are searched and the annotated queries, as its own
    evaluation takes them. policy: a stage's policy, one of `stages`, first to last; base: the policy before any training on
    this data, or None if it is not at hand."""

    stages: Sequence[str]
    policy: Callable[[str], Policy]
    base: Callable[[], Policy | None]
    embedder: Embedder
    shelf: Library
    moments: Sequence[Moment]
    settings: EvaluationSettings
    seed: int


class Ablations:
    """One policy's conditions over one list of queries; each is run when it is first asked for, greedily.

    kept: a folder for what was measured. memo: verdicts of this policy that are known.
    `progress` is told (condition, queries done, all) of every one that is run.
    """

    def __init__(
        self,
        policy: Policy,
        embedder: Embedder,
        corpus: Library,
        moments: Sequence[Moment],
        settings: EvaluationSettings,
        seed: int = 0,
        *,
        kept: Path | None = None,
        memo: Memo | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.policy, self.embedder, self.corpus, self.moments = policy, embedder, corpus, moments
        self.settings, self.seed, self.progress = settings, seed, progress
        self.matrix = corpus.matrix().to(embedder.videos.device)
        self.rows = {video_id: row for row, video_id in enumerate(corpus.video_ids)}
        self.runs = 0  # of the loop, finished
        self.memo: Memo = {} if memo is None else memo
        self._method: list[Trajectory] | None = None
        self._values: dict[str, Values] = {}
        self._kept = None if kept is None else _Kept(kept, self._identity())

    def _identity(self) -> Json:
        """Whatever changes the numbers of every condition."""
        queries = [(one.query_id, one.text, one.video_id, one.start, one.end) for one in self.moments]
        return {
            "policy": [_fingerprint(self.policy), asdict(self.policy.settings)],
            "corpus": [self.embedder.identity, _digest(list(self.corpus.video_ids))],
            "queries": _digest(queries),
            "loop": [self.settings.turns, self.settings.max_tokens, self.seed],
        }

    def method(self) -> list[Trajectory]:
        """The method's trajectories, one a query."""
        if self._method is None:
            self._method = self._run(METHOD, CONDITIONS[METHOD])
        return self._method

    def values(self, name: str) -> Values:
        """What a condition gives; beside the metrics of `metrics.per_query`, `failed`, `R@1` (whether the right video leads
        the last ranking once the rejected ones have left it, where the condition excludes them), and `second` (whether the
        second video shown is the right one)."""
        return self._remembered(name, CONDITIONS[name], lambda: self._condition(name, CONDITIONS[name]))

    def with_soft_tokens(self, count: int) -> Values:
        """The method's values where only the first `count` soft tokens of every refinement are inserted."""
        if count in (0, self.policy.settings.soft_tokens):
            return self.values(METHOD if count else WITHOUT)
        name, options = f"{count} {SOFT_TOKENS}", {"soft_tokens": count}
        return self._remembered(name, options, lambda: self._condition(name, options))

    def first_refinement(self) -> Values:
        """Under "0", "1", ..: is the right video first in the whole corpus after the first refinement, if that inserts so
        many soft tokens."""

        def measure() -> Values:
            return refinements.first(self.policy, self.embedder, self.matrix, self.rows, self.method())

        return self._remembered(_FIRST, {}, measure)

    def refinement_seconds(self) -> Values:
        """Under "soft" and "hard": seconds a refinement, one number for each batch that was timed."""

        def measure() -> Values:
            return refinements.seconds(self.policy, self.embedder, self.corpus, self.method(), self.settings.max_tokens)

        return self._remembered("refinement seconds", {}, measure)

    def standing(self) -> list[str]:
        """Of `EVERYTHING`, what an earlier call has measured and kept."""
        marks = {name: (name, options) for name, options in CONDITIONS.items()} | {SOFT_TOKENS: (_FIRST, {})}
        kept = self._kept
        return [] if kept is None else [name for name, mark in marks.items() if kept.read(*mark) is not None]

    def counts(self) -> list[int]:
        """The numbers of soft tokens for which the whole loop is run: all if there are few queries, else powers of two."""
        every = range(self.policy.settings.soft_tokens + 1)
        few = len(self.moments) <= _EVERY_COUNT
        return [count for count in every if few or count & (count - 1) == 0 or count == every[-1]]

    def _remembered(self, name: str, options: Json, measure: Callable[[], Values]) -> Values:
        if name not in self._values:
            found = None if self._kept is None else self._kept.read(name, options)
            if found is None:
                found = measure()
                if self._kept is not None:
                    self._kept.write(name, options, found)
            self._values[name] = found
        return self._values[name]

    @torch.no_grad()
    def _run(self, name: str, options: Json) -> list[Trajectory]:
        sampling = Sampling(seed=self.seed, max_tokens=self.settings.max_tokens)
        loop = LoopSettings(**{"turns": self.settings.turns, "sampling": sampling, "batch": 128, **options})
        found = rollout.run(
            self.policy,
            self.embedder,
            self.corpus,
            self.moments,
            settings=loop,
            memo=self.memo,
            speaker=self.settings.speaker(),
            progress=None if self.progress is None else partial(self.progress, name),
        )
        self.runs += 1
        return found

    def _condition(self, name: str, options: Json) -> Values:
        found = self.method() if name == METHOD else self._run(name, options)
        whole = np.array([one.stop != "failed" for one in found])
        measured = [one for one in found if one.stop != "failed"]
        values = metrics.per_query(measured)
        values["R@1"] = hits(measured, self.matrix, self.rows, options.get("exclude", True))
        values["second"] = found_second(measured)
        if name == METHOD:
            table = outcomes.of(measured)
            for turns in range(1, self.settings.turns + 1):
                values |= {f"{turns} {name}": one for name, one in metrics.after_turns(table, turns).items()}
        spread = {metric: np.full(len(found), np.nan) for metric in values}
        for metric, array in values.items():
            spread[metric][whole] = array
        return spread | {"failed": (~whole).astype(np.float64)}


def figures(work: Ablations, names: Iterable[str] = EVERYTHING) -> Json:
    """The figures of these conditions beside the method, in the shape of a stage of `eval.json`, all over the queries that
    failed in none of them: `ablations`; `refinement_gain`, how much more often the method shows the right video second than a
    control does, of the queries whose first was wrong; `by_soft_tokens`; `refinements`, soft against hard; `compared`, how
    many queries the conditions were run on and how many of these were measured."""
    wanted = [name for name in CONDITIONS if name == METHOD or name in names]
    n, conditions = work.settings.resamples, {name: work.values(name) for name in wanted}
    counts = work.counts() if SOFT_TOKENS in names else []
    by_count = {count: work.with_soft_tokens(count) for count in counts}
    everything = [*conditions.values(), *by_count.values()]
    whole = ~np.any([values["failed"] > 0 for values in everything], axis=0)
    method = conditions[METHOD]
    wrong = whole & (method["before R@1"] == 0)

    def share(values: Values, name: str, among: Any = whole) -> Json:
        return metrics.bootstrap(values[name][among], n).as_dict()

    def more(values: Values, name: str, among: Any = whole) -> Json:
        return metrics.paired(method[name][among], values[name][among], n).as_dict()

    compared = {"queries": len(work.moments), "measured": int(whole.sum())}
    found: Json = {"compared": compared, "ablations": {}, "refinement_gain": {}}
    for name, values in conditions.items():
        one = {"R@1": share(values, "R@1")}
        if name != ONE_SHOT:  # which shows no second video
            one["R@1 wrong"] = share(values, "second", wrong)
        one["vcmr"] = {f"{at:g}": share(values, f"vcmr {at:g}") for at in THRESHOLDS}
        if name != METHOD:
            one["gain"] = {
                "R@1": more(values, "R@1"),
                "vcmr": {f"{at:g}": more(values, f"vcmr {at:g}") for at in THRESHOLDS},
            }
            if name not in (ONE_SHOT, ACCUMULATED):
                found["refinement_gain"][name] = more(values, "second", wrong)
        found["ablations"][name] = one
    if counts:
        first = work.first_refinement()
        found["by_soft_tokens"] = []
        for name in first:
            point: Json = {"tokens": int(name), "R@1": share(first, name)}
            if values := by_count.get(int(name), {}):
                point["R@1 excluded"] = share(values, "R@1")
                point["vcmr"] = {f"{at:g}": share(values, f"vcmr {at:g}") for at in THRESHOLDS}
            found["by_soft_tokens"].append(point)
    if IN_WORDS in conditions:
        found["refinements"] = _side_by_side(work, conditions, whole)
    return found


def _side_by_side(work: Ablations, conditions: dict[str, Values], whole: Any) -> Json:
    """Refinement by soft tokens and in words: generated tokens and seconds a refinement, R@1 after the loop."""
    n, seconds, found = work.settings.resamples, work.refinement_seconds(), {}
    for kind, name in (("soft", METHOD), ("hard", IN_WORDS)):
        values = conditions[name]
        tokens = metrics.bootstrap(values[kind][whole], n, weights=values["refinements"][whole])
        found[kind] = {
            "tokens": tokens.as_dict(),
            "R@1": metrics.bootstrap(values["R@1"][whole], n).as_dict(),
            "seconds": metrics.bootstrap(seconds[kind], n).as_dict(),
        }
    return found


def by_turns(work: Ablations) -> list[Json]:
    """What the method has reached after 1, 2, .. turns. A greedy loop of t turns does what a longer one does in its first t,
    so its trajectories are cut and nothing is run again."""
    method, found = work.values(METHOD), []
    for turns in range(1, work.settings.turns + 1):
        mark = f"{turns} "
        values = {name.removeprefix(mark): one for name, one in method.items() if name.startswith(mark)}
        found.append(metrics.turn_figures(turns, values, work.settings.resamples))
    return found


def baseline(work: Ablations) -> Json:
    """A policy in one shot, in the columns of the paper: it judges the first video of the plain search, and that is all."""
    values, n = work.values(ONE_SHOT), work.settings.resamples
    names = [*(f"vcmr {at:g}" for at in THRESHOLDS), "ver", "turns", *(f"before R@{k}" for k in metrics.RECALL_AT)]
    found = metrics.intervals({name: values[name] for name in names}, n)
    return {
        "vcmr": {f"{at:g}": found[f"vcmr {at:g}"].as_dict() for at in THRESHOLDS},
        "ver": found["ver"].as_dict(),
        **{f"R@{k}": found[f"before R@{k}"].as_dict() for k in metrics.RECALL_AT},
    }


def hits(trajectories: Sequence[Trajectory], matrix: CorpusMatrix, rows: dict[str, int], exclude: bool) -> Floats:
    """1 where the right video leads the final ranking; with `exclude`, the rejected videos have left that ranking."""
    if not trajectories:
        return np.zeros(0)
    right = [rows[one.moment.video_id] for one in trajectories if one.moment.video_id is not None]
    queries = torch.stack([one.final_query for one in trajectories if one.final_query is not None])
    gone = None
    if exclude:
        rejected = [[rows[turn.video_id] for turn in one.turns if turn is not one.accepted] for one in trajectories]
        gone = pad_sequence([torch.tensor(ids, dtype=torch.int64) for ids in rejected], True, padding_value=-1)
        gone = gone.to(queries.device)
    top = scan(queries, matrix, k=1, exclude=gone).ids[:, 0]
    return (top.cpu().numpy() == np.array(right)).astype(np.float64)


def found_second(trajectories: Sequence[Trajectory]) -> Floats:
    """1 where the second video shown is the right one: what one rejection and one new search are worth."""
    return np.array(
        [float(len(one.turns) > 1 and one.turns[1].video_id == one.moment.video_id) for one in trajectories]
    )


class _Kept:
    """Values in a folder, a file for each condition, which only counts for what it was measured with."""

    def __init__(self, folder: Path, identity: Json) -> None:
        self.folder, self.identity = folder, identity

    def _key(self, options: Json) -> str:
        return _digest({**self.identity, "options": options})

    def _path(self, name: str) -> Path:
        return self.folder / f"{slug(name)}.npz"

    def read(self, name: str, options: Json) -> Values | None:
        path = self._path(name)
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            found = {key: arrays[key] for key in arrays.files}
        return found if str(found.pop("key")) == self._key(options) else None

    def write(self, name: str, options: Json, values: Values) -> None:
        written = io.BytesIO()
        arrays: dict[str, Any] = {"key": np.array(self._key(options)), **values}
        np.savez_compressed(written, **arrays)
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self._path(name).with_suffix(".tmp")
        aside.write_bytes(written.getvalue())
        os.replace(aside, self._path(name))


def slug(name: str) -> str:
    """A condition's name on the command line and on disk."""
    return "-".join(word for word in name.split() if word != "+")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _fingerprint(policy: Policy) -> str:
    """Tells policies apart by a sample of their weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.named_parameters()):
        digest.update(name.encode() + parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]

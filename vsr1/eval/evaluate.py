"""Run the loop on annotated queries and say what it is worth, controls included.

A rise of R@1 after refinement proves nothing by itself: only rejected rows are refined, and any change of a wrong query can
gain. So the method stands beside excluding the rejected video without refining, random soft tokens, and soft tokens the
policy made before a blank or another video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vsr1.agent import rollout
from vsr1.agent.rollout import Library, LoopSettings
from vsr1.agent.speech import Sampling
from vsr1.agent.verdict import Memo
from vsr1.eval import calibration, metrics, outcomes, public
from vsr1.eval.exchange import as_json as as_json
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import CorpusMatrix, scan
from vsr1.records import Moment, Trajectory

METHOD = "refinement + exclusion"
CONTROLS: dict[str, dict[str, Any]] = {
    "exclusion only": {"refinement": "none"},
    "refinement only": {"exclude": False},
    "no refinement": {"refinement": "none", "exclude": False},
    "random soft tokens": {"refinement": "random"},
    "blank video": {"refinement": "blank"},
    "shuffled video": {"refinement": "shuffled"},
    "refinement in words": {"refinement": "hard"},
    "accumulated soft tokens": {"accumulate": True},
}


@dataclass
class EvaluationSettings:
    """turns of the loop; at most this many queries (0 for all), tokens a reply, bootstrap resamples; calibration: held-out
    queries on which the probabilities of a policy are calibrated (0: they are not)."""

    turns: int = 3
    queries: int = 500
    max_tokens: int = 96
    resamples: int = 2000
    calibration: int = 200


@dataclass(frozen=True)
class Evaluation:
    """The method's trajectories and the figures drawn from them, in the shape `eval.json` stores; found: by query id, whether
    the right video leads the method's last ranking once the rejected ones have left it."""

    trajectories: list[Trajectory]
    figures: dict[str, Any]
    found: dict[str, float]


@torch.no_grad()
def evaluate(
    policy: Policy,
    embedder: Embedder,
    corpus: Library,
    moments: Sequence[Moment],
    settings: EvaluationSettings,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run the method and every control on `moments` (greedy replies) and measure them."""
    conditions: dict[str, dict[str, Any]] = {METHOD: {"fall_back": True}, **CONTROLS}
    # a greedy verdict depends on the pair alone, not on how the loop searches: each pair is asked once for all conditions
    memo: Memo = {}
    runs: dict[str, list[Trajectory]] = {}
    sampling = Sampling(seed=seed, max_tokens=settings.max_tokens)
    for number, (name, options) in enumerate(conditions.items()):
        loop = LoopSettings(turns=settings.turns, sampling=sampling, batch=128, **options)

        def tell(done: int, total: int, before: int = number) -> None:
            if progress is not None:
                progress(before * total + done, len(conditions) * total)

        runs[name] = rollout.run(policy, embedder, corpus, moments, settings=loop, memo=memo, progress=tell)

    matrix, rows = corpus.matrix(), {video_id: row for row, video_id in enumerate(corpus.video_ids)}
    trajectories = runs[METHOD]
    table = outcomes.of(trajectories)
    figures = metrics.summary(table, settings.turns, settings.resamples)
    figures["public"] = public.result(table, settings.turns)
    # the controls are compared on the queries that none of them failed
    failed = {index for found in runs.values() for index, one in enumerate(found) if one.stop == "failed"}
    runs = {name: [one for index, one in enumerate(found) if index not in failed] for name, found in runs.items()}
    found = {name: hits(runs[name], matrix, rows, options.get("exclude", True)) for name, options in conditions.items()}
    wrong = np.array([one.turns[0].rank != 1 for one in runs[METHOD]])
    second = {name: found_second(kept) for name, kept in runs.items()}
    figures["ablations"] = {
        name: {
            "R@1": metrics.bootstrap(found[name], settings.resamples).as_dict(),
            "R@1 wrong": metrics.bootstrap(second[name][wrong], settings.resamples).as_dict(),
            "vcmr": _vcmr(kept, settings.resamples),
        }
        for name, kept in runs.items()
    }
    words = metrics.per_query(runs["refinement in words"])
    figures["tokens"]["hard"] = metrics.bootstrap(words["hard"], settings.resamples).as_dict()
    figures["calibration"] = {
        "scale": policy.settings.calibration[0],
        "offset": policy.settings.calibration[1],
        **calibration.errors(trajectories),
    }
    figures["refinement_gain"] = {
        name: metrics.paired(second[METHOD][wrong], second[name][wrong], settings.resamples).as_dict()
        for name in CONTROLS
    }
    figures["by_soft_tokens"] = by_soft_tokens(policy, embedder, matrix, rows, runs[METHOD], settings.resamples)
    leads = zip((one.moment.query_id for one in runs[METHOD]), found[METHOD].tolist(), strict=True)
    return Evaluation(trajectories, figures, dict(leads))


def _vcmr(trajectories: Sequence[Trajectory], resamples: int) -> dict[str, Any]:
    values = {name: one for name, one in metrics.per_query(trajectories).items() if name.startswith("vcmr ")}
    return {name.removeprefix("vcmr "): one.as_dict() for name, one in metrics.intervals(values, resamples).items()}


def hits(trajectories: Sequence[Trajectory], matrix: CorpusMatrix, rows: dict[str, int], exclude: bool) -> np.ndarray:
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


def found_second(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """1 where the second video shown is the right one: what one rejection and one new search are worth."""
    return np.array(
        [float(len(one.turns) > 1 and one.turns[1].video_id == one.moment.video_id) for one in trajectories]
    )


def by_soft_tokens(
    policy: Policy,
    embedder: Embedder,
    matrix: CorpusMatrix,
    rows: dict[str, int],
    trajectories: Sequence[Trajectory],
    resamples: int,
) -> list[dict[str, Any]]:
    """R@1 over the whole corpus when the first refinement inserts only its first n soft tokens, n = 0 .. all."""
    first = [one.turns[0] for one in trajectories]
    refined = [index for index, turn in enumerate(first) if turn.actions is not None]
    rank = np.array([turn.rank for turn in first])
    curve = []
    for count in range(policy.settings.soft_tokens + 1):
        now = rank.copy()
        if count and refined:
            actions = torch.stack([_actions(first[index].actions)[:count] for index in refined])
            texts = [trajectories[index].moment.text for index in refined]
            vectors = embedder.embed_texts(texts, policy.head.soft_tokens(actions))
            right = [rows[trajectories[index].moment.video_id or ""] for index in refined]
            positive = torch.tensor(right, device=vectors.device)
            found = scan(vectors, matrix, k=1, positive=positive).rank
            assert found is not None
            now[refined] = found.cpu().numpy()
        curve.append({"tokens": count, "R@1": metrics.bootstrap(now == 1, resamples).as_dict()})
    return curve


def _actions(actions: Tensor | None) -> Tensor:
    assert actions is not None
    return actions

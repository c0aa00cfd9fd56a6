"""Run the loop on annotated queries and say what it is worth, controls included.

A rise of R@1 after refinement proves nothing by itself: only rejected rows are refined, and any change of a wrong query can
gain. So the method stands beside the conditions of `vsr1.eval.ablations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vsr1.agent.rollout import Library
from vsr1.eval import ablations, calibration, metrics, outcomes, public
from vsr1.eval.ablations import METHOD, Ablations
from vsr1.eval.ablations import EvaluationSettings as EvaluationSettings
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.records import Moment, Trajectory


@dataclass(frozen=True)
class Evaluation:
    """The method's trajectories and the figures drawn from them, in the shape `eval.json` stores; found: by query id, whether
    the right video leads the method's last ranking once the rejected ones have left it. baseline: the policy in one
    shot; corpus_size: videos that were searched."""

    trajectories: list[Trajectory]
    figures: dict[str, Any]
    found: dict[str, float]
    baseline: dict[str, Any]
    corpus_size: int


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

    def tell(_: str, done: int, total: int) -> None:
        if progress is not None:
            # of the numbers of soft tokens, none and all are conditions of their own
            runs = len(ablations.CONDITIONS) + len(work.counts()) - 2
            progress(work.runs * total + done, runs * total)

    work = Ablations(policy, embedder, corpus, moments, settings, seed, progress=tell)
    trajectories = work.method()
    table = outcomes.of(trajectories)
    figures = metrics.summary(table, settings.turns, settings.resamples)
    figures["public"] = public.result(table, settings.turns)
    given = policy, embedder, corpus, moments[: settings.ablated or None], settings, seed
    figures |= ablations.figures(work if not settings.ablated else Ablations(*given, memo=work.memo, progress=tell))
    figures["tokens"]["hard"] = figures["refinements"]["hard"]["tokens"]
    figures["calibration"] = {
        "scale": policy.settings.calibration[0],
        "offset": policy.settings.calibration[1],
        **calibration.errors(trajectories),
    }
    values = work.values(METHOD)
    leads = zip((one.query_id for one in moments), values["R@1"].tolist(), values["failed"].tolist(), strict=True)
    found = {query_id: lead for query_id, lead, failed in leads if not failed}
    return Evaluation(trajectories, figures, found, ablations.baseline(work), len(corpus.video_ids))

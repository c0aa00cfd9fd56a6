"""What a roll-out is worth: pure functions of a `Trajectory`, added up by weight.

Most rewards read the final executed turn, the one whose reply ended the loop; `verdicts` reads all of them. The retrieval
reward needs the corpus, which these functions never see: the caller scans it with the queries (`final_query`, or
`following_query` for the reward of one turn), turns scores into probabilities with `retrieval_probability`,
and passes the result in a `RewardContext`. Failed trajectories are not rewarded; callers mask them out first.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vsr1.errors import ConfigError
from vsr1.records import Moment, Reply, Trajectory, Turn

RETRIEVAL_TEMPERATURE = 0.1
"""Temperature of the softmax over the corpus, the one the contrastive training loss uses."""


@dataclass(frozen=True)
class RewardContext:
    """What a reward may need beside the trajectory.

    `retrieval_probability`: softmax probability of the true video under the final query, at RETRIEVAL_TEMPERATURE.
    """

    retrieval_probability: float | None = None


RewardFunction = Callable[[Trajectory, RewardContext], float]


def answer(trajectory: Trajectory, context: RewardContext) -> float:
    """+1 if the verdict is right (`matched` exactly when the true video is shown), else -1, also when unparsable."""
    return 1.0 if _answer_is_right(trajectory) else -1.0


def verdicts(trajectory: Trajectory, context: RewardContext) -> float:
    """Mean of +1 for a right and -1 for a wrong verdict over all turns. Where the loop goes on, `answer` pays nothing for
    the turns before the last: a policy that rejects everything earns it almost always, the right video included."""
    _final_turn(trajectory)
    right = [answer_is_right(turn, trajectory.moment) for turn in trajectory.turns]
    return 2 * sum(right) / len(right) - 1


def found(trajectory: Trajectory, context: RewardContext) -> float:
    """What the loop is for: the temporal IoU of the accepted span if the accepted video is the right one, else 0."""
    _final_turn(trajectory)
    accepted = trajectory.accepted
    if accepted is None or not answer_is_right(accepted, trajectory.moment):
        return 0.0
    return overlap(accepted.reply, trajectory.moment)


def think_format(trajectory: Trajectory, context: RewardContext) -> float:
    """1 if the reply reasons in a non-empty think block, else 0."""
    return float(bool(_final_turn(trajectory).reply.think.strip()))


def time_format(trajectory: Trajectory, context: RewardContext) -> float:
    """1 if `matched` comes with both times or `not_matched` with neither, else 0; 0 for an unparsable verdict."""
    reply = _final_turn(trajectory).reply
    given = [time is not None for time in (reply.start, reply.end)]
    return float((reply.answer == "matched" and all(given)) or (reply.answer == "not_matched" and not any(given)))


def time_iou(trajectory: Trajectory, context: RewardContext) -> float:
    """Temporal IoU of a right `matched`; 0.5 for a right `not_matched` without times; 0 otherwise.

    The 0.5 keeps a right rejection from being worth less than a poorly localised match. A span that is incomplete or
    not longer than 0 s scores 0. Raises ValueError if the true span is unknown where it is needed.
    """
    reply = _final_turn(trajectory).reply
    if not _answer_is_right(trajectory):
        return 0.0
    if reply.answer == "not_matched":
        return 0.5 if reply.start is None and reply.end is None else 0.0
    return overlap(reply, trajectory.moment)


def overlap(reply: Reply, moment: Moment) -> float:
    """Temporal IoU of a reply's span with the true one; 0 for a span that is incomplete or not longer than 0 s. Raises
    ValueError if the true span is unknown."""
    start, end = _true_span(moment)
    if reply.start is None or reply.end is None or reply.end <= reply.start:
        return 0.0
    shared = max(0.0, min(end, reply.end) - max(start, reply.start))
    return shared / ((end - start) + (reply.end - reply.start) - shared)


def progress(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """How trajectories fare, for the log: vcmr (share that accepted the right video with a span of IoU 0.5 or more), ver
    (right answers among all), accepted_right, turns."""
    accepted = [
        one for one in trajectories if one.accepted is not None and one.accepted.video_id == one.moment.video_id
    ]
    grounded = [one for one in accepted if overlap(one.turns[-1].reply, one.moment) >= 0.5]
    answers = [answer_is_right(turn, one.moment) for one in trajectories for turn in one.turns]
    return {
        "vcmr": len(grounded) / len(trajectories),
        "ver": sum(answers) / len(answers),
        "accepted_right": len(accepted) / len(trajectories),
        "turns": sum(len(one.turns) for one in trajectories) / len(trajectories),
    }


def refine_presence(trajectory: Trajectory, context: RewardContext) -> float:
    """1 if the reply ends by asking for a refinement, else 0."""
    return float(_final_turn(trajectory).reply.refine)


def retrieval(trajectory: Trajectory, context: RewardContext) -> float:
    """exp(-L_ret), the softmax probability of the true video under the final query (arXiv 2607.00446)."""
    _final_turn(trajectory)
    probability = context.retrieval_probability
    if probability is None or not 0 <= probability <= 1 + 1e-4:  # a difference of two rounded logarithms may exceed 0
        raise ValueError(
            f"query '{trajectory.moment.query_id}': the retrieval reward needs a retrieval_probability in [0, 1] "
            f"in its context; got {probability}"
        )
    return min(float(probability), 1.0)


REWARDS: dict[str, RewardFunction] = {
    "answer": answer,
    "verdicts": verdicts,
    "found": found,
    "think_format": think_format,
    "time_format": time_format,
    "time_iou": time_iou,
    "refine_presence": refine_presence,
    "retrieval": retrieval,
}


def reward_function(name: str) -> RewardFunction:
    """The reward called `name`: one of REWARDS, or `"module:function"` for one of the user's own.

    Raises ConfigError naming what is known, or what is wrong with the module or the function.
    """
    if name in REWARDS:
        return REWARDS[name]
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise ConfigError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}, or 'module:function'")
    try:
        function = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as error:
        raise ConfigError(f"reward {name!r}: module '{module_name}' does not import ({error})") from error
    if not callable(function):
        raise ConfigError(f"reward {name!r}: module '{module_name}' has no function '{attribute}'")
    return function


def total(
    trajectory: Trajectory, weights: Mapping[str, float], context: RewardContext | None = None
) -> tuple[float, dict[str, float]]:
    """Weighted sum of the rewards named in `weights`, and each reward's own value before weighting.

    Raises ConfigError for a name that is not a reward; ValueError for a failed trajectory, one without turns or without
    a truth to compare with, a missing context value, or a reward that is not a finite number.
    """
    _final_turn(trajectory)
    parts: dict[str, float] = {}
    for name in weights:
        value = float(reward_function(name)(trajectory, context or RewardContext()))
        if not math.isfinite(value):
            raise ValueError(f"query '{trajectory.moment.query_id}': reward {name!r} is {value}")
        parts[name] = value
    return sum(weight * parts[name] for name, weight in weights.items()), parts


def retrieval_probability(
    positive_score: Tensor, log_partition: Tensor, temperature: float = RETRIEVAL_TEMPERATURE
) -> Tensor:
    """exp(score / temperature - lse), (B,), from `positive_score` and `lse` of a scan at the same temperature."""
    return (positive_score / temperature - log_partition).exp().clamp(max=1.0)


def following_query(trajectory: Trajectory, turn: int) -> Tensor:
    """The query (D,) that a turn led to: what its soft tokens made of the one before, or the same if it made none.

    The probability of the true video under it is the turn's own retrieval reward, which credits the turn with nothing that
    came later. Raises ValueError for a turn that led to none.
    """
    _final_turn(trajectory)
    later = trajectory.turns[turn + 1 :]
    query = later[0].query if later else trajectory.final_query
    if query is None:
        raise ValueError(f"query '{trajectory.moment.query_id}': turn {turn} led to no query")
    return query


def _final_turn(trajectory: Trajectory) -> Turn:
    if trajectory.stop == "failed":
        raise ValueError(
            f"query '{trajectory.moment.query_id}' failed ({trajectory.failure}): it has no reward, mask it out first"
        )
    if not trajectory.turns:
        raise ValueError(f"query '{trajectory.moment.query_id}' has no executed turn to reward")
    return trajectory.turns[-1]


def _answer_is_right(trajectory: Trajectory) -> bool:
    return answer_is_right(_final_turn(trajectory), trajectory.moment)


def answer_is_right(turn: Turn, moment: Moment) -> bool:
    """Whether the verdict is `matched` exactly when the true video is shown; ValueError where that is not known."""
    if moment.video_id is None:
        raise ValueError(f"query '{moment.query_id}' has no known video to compare with")
    return turn.reply.answer == ("matched" if turn.video_id == moment.video_id else "not_matched")


def _true_span(moment: Moment) -> tuple[float, float]:
    if moment.start is None or moment.end is None or moment.end <= moment.start:
        raise ValueError(f"query '{moment.query_id}' has no true span to compare with: [{moment.start}, {moment.end}]")
    return moment.start, moment.end

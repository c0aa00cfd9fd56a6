"""Who is credited with what: from the trajectories of a rollout to the advantages of what was said and of what was refined.

The soft tokens of a turn are judged by what they did to the ranking, among the group's refinements at that turn. What was
said is judged in one of two ways. By trajectory: every turn gets the advantage of the whole, within its query's group; what
one turn misread is then blamed on the others too. By turn: a reply is compared with those that the group gave to the same
prompt (query and shown video), so that the only difference between them is what they said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vsr1.ops.corpus_scan import scan
from vsr1.records import Moment, Trajectory
from vsr1.train import rewards
from vsr1.train.library import Shelf
from vsr1.train.losses import AdvantageMode, group_advantages

Credit = Literal["trajectory", "turn"]


@dataclass(frozen=True)
class Judged:
    """Advantages of what was said in every turn (all turns,) and of the M refinements (M,), in trajectory order; numbers to
    log."""

    text_advantage: Tensor
    turn_advantage: Tensor
    numbers: dict[str, float]


@torch.no_grad()
def judge(
    found: Sequence[Trajectory],
    shelf: Shelf,
    groups: Tensor,
    *,
    weights: dict[str, float],
    credit: Credit,
    advantage: AdvantageMode,
    temperature: float,
) -> Judged:
    """Rewards and advantages of trajectories; groups (R,) says which query each belongs to; weights of the rewards;
    temperature of the softmax over the corpus."""
    if not found:
        return Judged(torch.zeros(0), torch.zeros(0), {})
    turns = [(row, place) for row, one in enumerate(found) for place in range(len(one.turns))]
    following = torch.stack([rewards.following_query(found[row], place) for row, place in turns])
    owners = [found[row].moment for row, _ in turns]
    chances = retrieval_probability(following, owners, shelf, temperature).cpu()
    after = dict(zip(turns, chances.tolist(), strict=True))
    totals, parts = [], []
    for row, one in enumerate(found):
        value, each = _reward(one, after[row, len(one.turns) - 1], weights)
        totals.append(value)
        parts.append(each)
    text, varied = group_advantages(torch.tensor(totals), groups, mode=advantage)
    text = text[[row for row, _ in turns]]
    if credit == "turn":
        text, varied = _by_turn(found, turns, groups, after, weights, advantage)

    refined = [number for number, (row, place) in enumerate(turns) if found[row].turns[place].actions is not None]
    place = torch.tensor([turns[number][1] for number in refined])
    kind = torch.tensor([int(groups[turns[number][0]]) for number in refined]) * (1 + max(p for _, p in turns)) + place
    turn, gain = torch.zeros(0), torch.zeros(0)
    spread: list[Tensor] = []
    if refined:
        chances = chances[refined]
        queries = torch.stack([found[row].turns[at].query for row, at in (turns[number] for number in refined)])
        before = retrieval_probability(queries, [owners[number] for number in refined], shelf, temperature)
        gain = chances - before.cpu()
        turn, _ = group_advantages(chances, kind, mode=advantage)
        spread = [chances[kind == one].var() for one in kind.unique() if int((kind == one).sum()) > 1]
    numbers = {f"reward_{name}": float(np.mean([each[name] for each in parts])) for name in weights}
    numbers |= {f"refine_gain_{one + 1}": float(gain[place == one].mean()) for one in place.unique().tolist()}
    numbers |= {
        "reward": float(np.mean(totals)),
        "groups_with_variance": float(varied.float().mean()),
        "retrieval_variance": float(torch.stack(spread).mean()) if spread else 0.0,
    }
    return Judged(text, turn, numbers | rewards.progress(found))


def _by_turn(
    found: Sequence[Trajectory],
    turns: Sequence[tuple[int, int]],
    groups: Tensor,
    after: dict[tuple[int, int], float],
    weights: dict[str, float],
    advantage: AdvantageMode,
) -> tuple[Tensor, Tensor]:
    """Advantages of the turns (all turns,), each among the replies to its own prompt; which of these prompts vary."""
    totals, prompts = [], []
    for row, place in turns:
        one, turn = found[row], found[row].turns[place]
        stop: Literal["matched", "turns"] = "matched" if turn.reply.answer == "matched" else "turns"
        alone = replace(one, turns=(turn,), final_query=rewards.following_query(one, place), stop=stop)
        totals.append(_reward(alone, after[row, place], weights)[0])
        prompts.append((int(groups[row]), turn.video_id))
    number = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    return group_advantages(torch.tensor(totals), torch.tensor([number[prompt] for prompt in prompts]), mode=advantage)


def _reward(one: Trajectory, probability: float, weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    return rewards.total(one, weights, rewards.RewardContext(retrieval_probability=probability))


def retrieval_probability(queries: Tensor, moments: Sequence[Moment], shelf: Shelf, temperature: float) -> Tensor:
    """exp(-L_ret): the softmax probability (Q,) of each moment's video over the whole corpus."""
    positive = torch.tensor([shelf.row(moment.video_id) for moment in moments], device=queries.device)
    found = scan(queries, shelf.matrix(), k=1, positive=positive, temperature=temperature)
    assert found.positive_score is not None
    assert found.lse is not None
    return rewards.retrieval_probability(found.positive_score, found.lse, temperature)

"""Stage 2: group-relative policy optimisation over the live loop.

Every step runs G trajectories for each of a few queries through the real loop, with sampled text, sampled soft tokens and
live retrieval. The text of a trajectory is judged as a whole (advantage within its query's group); the soft tokens of a
turn are judged by what they did to the ranking (advantage among the group's refinements at that turn). One forward pass
over the turns' rows gives both losses: its token log-probabilities, and, continued over its cache, the soft tokens replayed
under the present weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from vsr1.agent import protocol, rollout
from vsr1.agent.generate import Sampling, SoftTokens, soft_tokens
from vsr1.agent.rollout import LoopSettings
from vsr1.errors import Vsr1Error
from vsr1.models import backbone
from vsr1.models.backbone import Row, State
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import scan
from vsr1.ops.soft_query import gaussian_logp
from vsr1.records import Moment, Trajectory, Turn
from vsr1.train import rewards
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import AdvantageMode, LossType, group_advantages, latent_loss, policy_loss
from vsr1.train.sft import trainable

MOST_FAILED = 0.01  # of the trajectories so far; beyond it the run stops instead of learning from a broken corpus


@dataclass
class GrpoTraining:
    """optimisation; videos in the corpus it searches; queries a step and trajectories a query; loop; loss; reward weights.

    bootstrapped: share of the queries whose right video is shown first: where the search rarely finds it, rejecting
    everything would otherwise be the best thing to learn.

    advantage: how the rewards of a query's group are compared (dr_grpo and leave-one-out estimates want no division by the
    deviation: "mean", "leave_one_out"); dr_grpo divides by `max_tokens`.

    sigma: exploration of the soft tokens, in units of their coordinates. beta: weight of the KL to the SFT policy.
    temperature: of the softmax over the corpus in the retrieval reward.
    """

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(steps=50, learning_rate=1e-5, warmup=5, weight_decay=0.0, muon=0.0)
    )
    head_learning_rate: float = 2e-5
    videos: int = 400
    queries: int = 2
    bootstrapped: float = 0.5
    group: int = 8
    turns: int = 3
    sampling_temperature: float = 1.0
    max_tokens: int = 88
    loss_type: LossType = "grpo"
    advantage: AdvantageMode = "std"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.01
    sigma: float = 0.1
    latent_weight: float = 1.0
    temperature: float = 0.1
    rewards: dict[str, float] = field(
        default_factory=lambda: {
            "answer": 1.2,
            "think_format": 0.05,
            "time_format": 0.05,
            "time_iou": 0.45,
            "refine_presence": 0.1,
            "retrieval": 0.8,
        }
    )


def train_grpo(
    policy: Policy,
    embedder: Embedder,
    moments: Sequence[Moment],
    shelf: Shelf,
    settings: GrpoTraining,
    seed: int,
    keeper: Keeper,
) -> None:
    """Train `policy` on `moments` against the corpus `shelf`; the policy it starts from is the reference of the KL."""
    reference = _frozen_copy(policy)
    counts = {"trajectories": 0, "failed": 0}

    def step(index: int) -> StepResult:
        rng = np.random.default_rng((seed, 4, index))
        pick = rng.choice(len(moments), min(settings.queries, len(moments)), replace=False)
        loop = LoopSettings(
            turns=settings.turns,
            sigma=settings.sigma,
            samples=settings.group,
            sampling=Sampling(settings.sampling_temperature, settings.max_tokens, seed=int(rng.integers(2**31))),
        )
        policy.eval()
        asked = [moments[i] for i in pick]
        first = [moment.video_id if rng.random() < settings.bootstrapped else None for moment in asked]
        found = rollout.run(policy, embedder, shelf, asked, settings=loop, first=first)
        groups = torch.arange(len(pick)).repeat_interleave(settings.group)
        alive = torch.tensor([one.stop != "failed" for one in found])
        counts["trajectories"] += len(found)
        counts["failed"] += int((~alive).sum())
        if counts["failed"] > max(MOST_FAILED * counts["trajectories"], 1):
            reason = next(one.failure for one in found if one.failure)
            raise Vsr1Error(f"{counts['failed']} of {counts['trajectories']} trajectories failed; the last: {reason}")
        kept = [one for one, good in zip(found, alive.tolist(), strict=True) if good]
        judged = judge(kept, shelf, settings, groups[alive])
        numbers = judged.numbers
        if not judged.text_advantage.any() and not judged.turn_advantage.any():
            return None, numbers
        loss, stats = _loss(policy, reference, shelf, kept, judged, settings)
        return loss, numbers | stats

    groups = trainable(policy, settings.head_learning_rate)
    train("grpo", policy, groups, step, settings.optimisation, keeper, log_every=1)
    policy.requires_grad_(False)


def _frozen_copy(policy: Policy) -> Policy:
    """A second policy with the same weights that never learns; the vision tower stays shared."""
    model = copy.deepcopy(policy.model)
    model.model.visual = policy.videos.visual
    twin = Policy(model, policy.tokenizer, policy.videos, policy.settings, copy.deepcopy(policy.head))
    return twin.eval().requires_grad_(False)


@dataclass(frozen=True)
class Judged:
    """Advantages of R trajectories (R,) and of their M refined turns (M,), in trajectory order; numbers to log."""

    text_advantage: Tensor
    turn_advantage: Tensor
    numbers: dict[str, float]


@torch.no_grad()
def judge(found: Sequence[Trajectory], shelf: Shelf, settings: GrpoTraining, groups: Tensor) -> Judged:
    """Rewards and advantages of a step's trajectories; groups (R,) says which query each belongs to."""
    final = torch.stack([one.final_query for one in found if one.final_query is not None])
    chance = retrieval_probability(final, [one.moment for one in found], shelf, settings.temperature)
    totals, parts = [], []
    for one, probability in zip(found, chance.tolist(), strict=True):
        context = rewards.RewardContext(retrieval_probability=probability)
        value, each = rewards.total(one, settings.rewards, context)
        totals.append(value)
        parts.append(each)
    advantage, varied = group_advantages(torch.tensor(totals), groups, mode=settings.advantage)

    queries: list[Tensor] = []
    owners: list[Moment] = []
    kinds: list[int] = []
    for row, one in enumerate(found):
        numbers_of_turns, after = rewards.refined_queries(one)
        queries.extend(after)
        owners.extend([one.moment] * len(numbers_of_turns))
        kinds.extend(int(groups[row]) * settings.turns + number for number in numbers_of_turns)
    turn_advantage, gain = torch.zeros(0), torch.zeros(0)
    if queries:
        gain = retrieval_probability(torch.stack(queries), owners, shelf, settings.temperature).cpu()
        turn_advantage, _ = group_advantages(gain, torch.tensor(kinds))
    numbers = {f"reward_{name}": float(np.mean([each[name] for each in parts])) for name in settings.rewards}
    spread = [gain[torch.tensor(kinds) == kind].var() for kind in set(kinds) if kinds.count(kind) > 1]
    return Judged(
        advantage,
        turn_advantage,
        numbers
        | {
            "reward": float(np.mean(totals)),
            "groups_with_variance": float(varied.float().mean()),
            "accepted_right": float(np.mean([_right(one) for one in found])),
            "turns": float(np.mean([len(one.turns) for one in found])),
            "retrieval_variance": float(torch.stack(spread).mean()) if spread else 0.0,
        },
    )


def _right(one: Trajectory) -> bool:
    return one.accepted is not None and one.accepted.video_id == one.moment.video_id


def retrieval_probability(queries: Tensor, moments: Sequence[Moment], shelf: Shelf, temperature: float) -> Tensor:
    """exp(-L_ret): the softmax probability (Q,) of each moment's video over the whole corpus."""
    positive = torch.tensor([shelf.row(moment.video_id) for moment in moments], device=queries.device)
    found = scan(queries, shelf.matrix(), k=1, positive=positive, temperature=temperature)
    assert found.positive_score is not None
    assert found.lse is not None
    return rewards.retrieval_probability(found.positive_score, found.lse, temperature)


def _loss(
    policy: Policy,
    reference: Policy,
    shelf: Shelf,
    found: Sequence[Trajectory],
    judged: Judged,
    settings: GrpoTraining,
) -> tuple[Tensor, dict[str, float]]:
    """Text and soft-token losses of all turns, from one forward pass over their rows."""
    turns: list[tuple[int, Turn]] = [(row, turn) for row, one in enumerate(found) for turn in one.turns]
    rows = [_row(policy, found[row].moment, turn, shelf) for row, turn in turns]
    lengths = [len(turn.token_ids) for _, turn in turns]
    hidden, state = backbone.run(policy.model.model, rows, keep_cache=True)
    assert state is not None
    logp = _token_logps(policy, hidden, turns, settings.sampling_temperature)
    with torch.no_grad():
        before, _ = backbone.run(reference.model.model, rows)
        reference_logp = _token_logps(reference, before, turns, settings.sampling_temperature)

    width = max(lengths)

    def padded(flat: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)

    mask = torch.arange(width, device=logp.device)[None] < torch.tensor(lengths, device=logp.device)[:, None]
    old = padded(torch.cat([turn.token_logps for _, turn in turns]).to(logp.device))
    owner = torch.tensor([row for row, _ in turns])
    loss, stats = policy_loss(
        padded(logp),
        old,
        judged.text_advantage[owner].to(logp.device),
        mask,
        loss_type=settings.loss_type,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=settings.beta,
        ref_logp=padded(reference_logp),
        max_length=settings.max_tokens,
    )
    refined = [index for index, (_, turn) in enumerate(turns) if turn.actions is not None]
    if refined and settings.latent_weight and settings.sigma:
        soft, old_soft = _replay(policy, hidden, state, [turns[index][1] for index in refined], refined, settings.sigma)
        latent, latent_stats = latent_loss(
            soft.means, soft.actions, old_soft, judged.turn_advantage.to(logp.device), settings.sigma, settings.clip_low
        )
        loss = loss + settings.latent_weight * latent
        stats |= {f"latent_{name}": value for name, value in latent_stats.items()}
    return loss, stats


def _row(policy: Policy, moment: Moment, turn: Turn, shelf: Shelf) -> Row:
    video = shelf.features(turn.video_id)
    prompt = protocol.prompt(policy.tokenizer, moment.text, video, system=policy.settings.system)
    return replace(prompt, token_ids=(*prompt.token_ids, *turn.token_ids))


def _token_logps(policy: Policy, hidden: Tensor, turns: Sequence[tuple[int, Turn]], temperature: float) -> Tensor:
    """Log-probabilities of every reply token, all turns behind one another."""
    replies = [turn.token_ids for _, turn in turns]
    return backbone.spoken_logps(hidden, policy.model.lm_head.weight, replies, temperature=temperature)


def _replay(
    policy: Policy, hidden: Tensor, state: State, turns: Sequence[Turn], rows: Sequence[int], sigma: float
) -> tuple[SoftTokens, Tensor]:
    """The soft tokens of `turns` under the present weights, and their log-probability when they were drawn."""
    chosen = torch.tensor(rows, device=hidden.device)
    actions = torch.stack([turn.actions for turn in turns if turn.actions is not None])
    means = torch.stack([turn.latents for turn in turns if turn.latents is not None])
    soft = soft_tokens(policy, hidden[chosen, -1], state.select(chosen), sigma=sigma, replay=actions)
    return soft, gaussian_logp(actions, means, sigma)

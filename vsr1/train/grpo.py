"""Stage 2: group-relative policy optimisation over the live loop.

Every rollout runs G trajectories for each of a few queries through the real loop, with sampled text, sampled soft tokens
and live retrieval. What was said and what was refined are judged apart (`vsr1.train.credit`).

One packed forward pass gives all losses: every prompt is read once, whatever the number of replies that continue it, and
the replies share its keys and values, with gradient. The reference reads the same packs. Behind the replies that refined,
the soft tokens are rolled out again under the present weights, once, for three losses: the policy gradient of the soft tokens
that were drawn; InfoNCE of the query that their means make, over the whole corpus; and distillation, which asks the means to
resemble a text that says what the query means, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vsr1.agent import protocol, rollout
from vsr1.agent.generate import OwnSpeaker, SoftTokens, soft_tokens
from vsr1.agent.rollout import Failures, LoopSettings
from vsr1.agent.speech import Sampling, Speaker
from vsr1.agent.vllm import VllmSpeaker
from vsr1.models import backbone
from vsr1.models.backbone import Row, State
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import info_nce, scan
from vsr1.ops.linear_logp import linear_logp
from vsr1.ops.soft_query import gaussian_logp
from vsr1.records import Moment, Trajectory, Turn
from vsr1.train import lora, parallel
from vsr1.train.credit import Credit, Judged, judge
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import AdvantageMode, LossType, distillation_loss, latent_loss, policy_loss
from vsr1.train.reference import Reference, frozen_copy
from vsr1.train.sft import trainable


@dataclass
class GrpoTraining:
    """optimisation; videos in the corpus it searches; queries a rollout and trajectories a query; loop; loss; rewards.

    bootstrapped: share of the queries whose right video is shown first: where the search rarely finds it, rejecting
    everything would otherwise be the best thing to learn. curriculum: share of the steps over which the loop grows from one
    turn to `turns`. accumulate: soft tokens of earlier turns stay in the query. updates: optimiser steps a rollout; from the
    second on, the policy has moved away from what was sampled, and the ratios say by how much. validate_every: steps between
    two looks at `validation_queries` held-out queries (0: none).

    speaker: what speaks the text, the own engine or a vLLM server at `vllm_url`, which gets the
    weights through `vllm_weights`, a folder that both see. lora_rank: train low-rank adapters of that
    rank instead of all weights (0); the reference is then the model without them, and no second copy is held.

    credit: "trajectory" gives what was said the advantage of its whole trajectory, "turn" compares each reply with the group's
    other replies to the same prompt. advantage: how the rewards of a group are compared. Rewards here differ a little even
    where all verdicts agree, and divided by the group's deviation ("std") such a hair counts as much as a right answer; "mean"
    and "leave_one_out" leave it small. dr_grpo divides by `max_tokens`.

    sigma: exploration of the soft tokens, in units of their coordinates. beta, latent_beta: weights of the KL to the policy it
    starts from, of the text and of the soft tokens (which otherwise drift while the text learns). latent_weight: of the soft
    tokens' policy gradient; contrast_weight: of their InfoNCE; distillation_weight: of what keeps them close to the meaning of
    the query. temperature: of the softmax over the corpus in InfoNCE and in the retrieval reward. rows: replies that the own
    engine has under way at once; pack_tokens: most tokens that one pass holds, of prompts that are read or of what is learned.
    """

    optimisation: Optimisation = field(
        default_factory=lambda: Optimisation(steps=60, learning_rate=4e-4, warmup=5, weight_decay=0.0)
    )
    head_learning_rate: float = 1e-3
    videos: int = 1200
    queries: int = 16
    bootstrapped: float = 0.5
    group: int = 4
    turns: int = 3
    curriculum: float = 0.0
    validate_every: int = 10
    validation_queries: int = 64
    speaker: Literal["own", "vllm"] = "own"
    vllm_url: str = "http://localhost:8000"
    vllm_weights: str = ""
    lora_rank: int = 0
    accumulate: bool = False
    updates: int = 1
    sampling_temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 88
    loss_type: LossType = "grpo"
    advantage: AdvantageMode = "mean"
    credit: Credit = "turn"
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.5
    sigma: float = 0.1
    latent_beta: float = 0.0
    latent_weight: float = 1.0
    contrast_weight: float = 0.3
    distillation_weight: float = 1.0
    temperature: float = 0.05
    rows: int = 128
    pack_tokens: int = 16384
    rewards: dict[str, float] = field(
        default_factory=lambda: {
            "found": 1.5,
            "verdicts": 1.0,
            "time_format": 0.1,
        }
    )

    @property
    def explores(self) -> bool:
        """Whether soft tokens are drawn, and learn from what the draws were worth."""
        return self.latent_weight > 0 and self.sigma > 0

    def turns_at(self, step: int) -> int:
        """The length of the loop at a step."""
        grown = step / (self.curriculum * self.optimisation.steps) if self.curriculum else 1.0
        return min(self.turns, 1 + int(grown * (self.turns - 1)))


@dataclass(frozen=True)
class Rolled:
    """What a rollout leaves for its updates: the trajectories that did not fail, their judgement, and numbers to log."""

    found: list[Trajectory]
    judged: Judged
    numbers: dict[str, float]


def train_grpo(
    policy: Policy,
    embedder: Embedder,
    moments: Sequence[Moment],
    shelf: Shelf,
    settings: GrpoTraining,
    seed: int,
    keeper: Keeper,
    validate: Callable[[], dict[str, float]] | None = None,
    meanings: Mapping[str, Tensor] | None = None,
) -> None:
    """Train `policy` on `moments` against the corpus `shelf`; the policy it starts from is the reference of the KL.
    `validate` gives numbers to log every `validate_every` steps. `meanings`: for the distillation, by query id, the embeddings
    (n, E) of a text that the soft tokens of this query should stand for."""
    for one in moments:  # found out now, not hours later
        shelf.row(one.video_id)
    if not meanings:  # a reply that only they would teach is not to be read
        settings = replace(settings, distillation_weight=0.0)
    tuner = lora.adapt(policy, settings.lora_rank) if settings.lora_rank else None
    reference = frozen_copy(policy) if tuner is None else lora.without(policy, tuner)
    speaker: Speaker = OwnSpeaker(settings.rows, settings.pack_tokens)
    if settings.speaker == "vllm":
        speaker = VllmSpeaker(settings.vllm_url, weights=settings.vllm_weights)
    learning = Learning(policy, reference, embedder, shelf, settings, meanings or {})
    failures = Failures()
    latest: list[Rolled] = []

    def asked(index: int) -> tuple[list[Moment], list[str | None], LoopSettings]:
        """This process' queries of a step, the videos that their loops begin with (None: what is found), and how the loop
        goes: with noise of its own in each process."""
        rng = np.random.default_rng((seed, 4, index))
        pick = rng.choice(len(moments), min(settings.queries, len(moments)), replace=False)
        seed_of_loop = int(rng.integers(2**31)) + parallel.rank()
        sampling = Sampling(settings.sampling_temperature, settings.top_p, settings.max_tokens, seed_of_loop)
        loop = LoopSettings(
            turns=settings.turns_at(index),
            accumulate=settings.accumulate,
            sigma=settings.sigma,
            samples=settings.group,
            sampling=sampling,
        )
        queries = [moments[i] for i in pick]
        first = [one.video_id if rng.random() < settings.bootstrapped else None for one in queries]
        return parallel.share(queries), parallel.share(first), loop

    def expect(index: int) -> None:
        """Have the videos that a step will be shown first decoded meanwhile."""
        queries, first, _ = asked(index)
        searched = [one.text for one, video_id in zip(queries, first, strict=True) if video_id is None]
        found: list[int] = []
        if searched:
            with torch.no_grad():
                found = scan(embedder.embed_texts(searched), shelf.matrix(), k=1).ids[:, 0].tolist()
        shelf.expect([*filter(None, first), *(shelf.video_ids[row] for row in found)])

    def roll_out(index: int) -> Rolled:
        queries, first, loop = asked(index)
        policy.eval()
        read = policy.videos.misses
        if parallel.first():
            speaker.sync(policy)
        parallel.wait()
        found = rollout.run(
            policy, embedder, shelf, queries, settings=loop, first=first, speaker=speaker, failures=failures
        )
        groups = torch.arange(len(queries)).repeat_interleave(settings.group)
        alive = [place for place, one in enumerate(found) if one.stop != "failed"]
        kept = [found[place] for place in alive]
        judged = judge(
            kept,
            shelf,
            groups[alive],
            weights=settings.rewards,
            credit=settings.credit,
            advantage=settings.advantage,
            temperature=settings.temperature,
        )
        return Rolled(kept, judged, judged.numbers | {"videos_encoded": float(policy.videos.misses - read)})

    def step(index: int) -> StepResult:
        if index % settings.updates == 0 or not latest:
            latest[:] = [roll_out(index)]
        (rolled,) = latest
        numbers = dict(rolled.numbers)
        if (
            validate is not None
            and parallel.first()
            and settings.validate_every
            and index % settings.validate_every == 0
        ):
            numbers |= validate()
        packs = pack(rolled, policy, shelf, settings)
        if (index + 1) % settings.updates == 0 and index + 1 < settings.optimisation.steps:
            expect(index + 1)
        if not parallel.anyone(bool(packs)):
            return None, numbers
        return losses(learning, packs, numbers), numbers

    groups = trainable(policy, settings.head_learning_rate, adapters=tuner is not None)
    train("grpo", policy, groups, step, settings.optimisation, keeper, log_every=1, save_at=settings.updates)
    if tuner is not None:
        lora.merge(policy, tuner)
    policy.requires_grad_(False)


@dataclass(frozen=True)
class Reply:
    """One turn that teaches: its trajectory, its place in it, and the advantages of its text and of its soft tokens (0: not
    learned from)."""

    one: Trajectory
    place: int
    text_advantage: float
    turn_advantage: float

    @property
    def turn(self) -> Turn:
        return self.one.turns[self.place]

    def earlier(self) -> list[Tensor]:
        """The soft tokens of the turns before."""
        return [turn.actions for turn in self.one.turns[: self.place] if turn.actions is not None]


@dataclass
class Pack:
    """Replies that share a forward pass, the distinct prompts they continue by (query, video), and each reply's prompt."""

    prompts: dict[tuple[str, str], Row] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)

    def tokens_with(self, key: tuple[str, str], prompt: Row, reply: Reply) -> int:
        """Padded tokens if this reply joined."""
        prompts = [*(row for name, row in self.prompts.items() if name != key), prompt]
        replies = [*self.replies, reply]
        return len(prompts) * max(map(len, prompts)) + len(replies) * max(len(one.turn.token_ids) for one in replies)

    def add(self, key: tuple[str, str], prompt: Row, reply: Reply) -> None:
        self.prompts.setdefault(key, prompt)
        self.replies.append(reply)
        self.owner.append(list(self.prompts).index(key))


def pack(rolled: Rolled, policy: Policy, shelf: Shelf, settings: GrpoTraining) -> list[Pack]:
    """The replies that teach anything, those of a prompt behind one another, in packs of at most `pack_tokens` tokens (one
    reply may be longer)."""
    turn_advantages = iter(rolled.judged.turn_advantage.tolist())
    teaching: dict[tuple[str, str], list[Reply]] = {}
    text_advantages = iter(rolled.judged.text_advantage.tolist())
    for one in rolled.found:
        for place, turn in enumerate(one.turns):
            advantage = next(text_advantages)
            latent = next(turn_advantages) if turn.actions is not None else 0.0
            reply = Reply(one, place, advantage, latent if settings.explores else 0.0)
            contrasted = turn.actions is not None and settings.contrast_weight + settings.distillation_weight > 0
            if turn.token_ids and (advantage or reply.turn_advantage or contrasted):
                teaching.setdefault((one.moment.query_id, turn.video_id), []).append(reply)
    packs: list[Pack] = []
    videos = shelf.features([video_id for _, video_id in teaching])
    for (key, replies), video in zip(teaching.items(), videos, strict=True):
        text = replies[0].one.moment.text
        prompt = protocol.prompt(policy.tokenizer, text, video, system=policy.settings.system)
        for reply in replies:
            if not packs or packs[-1].tokens_with(key, prompt, reply) > settings.pack_tokens:
                packs.append(Pack())
            packs[-1].add(key, prompt, reply)
    return packs


@dataclass(frozen=True)
class Learning:
    """What an update is made with. meanings: by query id, the embeddings (n, E) that its soft tokens should resemble."""

    policy: Policy
    reference: Reference
    embedder: Embedder
    shelf: Shelf
    settings: GrpoTraining
    meanings: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def refinement(self) -> bool:
        """Whether soft tokens learn, apart from staying near the reference."""
        settings = self.settings
        distilled = settings.distillation_weight > 0 and bool(self.meanings)
        return settings.explores or settings.contrast_weight > 0 or distilled

    @cached_property
    def power(self) -> Tensor:
        """The mean square of all meanings."""
        return torch.stack([one.square().mean() for one in self.meanings.values()]).mean()


def losses(learning: Learning, packs: Sequence[Pack], numbers: dict[str, float]) -> Iterator[Tensor]:
    """The loss of each pack; they add up to the loss of the step. `numbers` gets what is to be logged, at the end. Without
    packs, the process takes part in what the others average over."""
    replies = [reply for one in packs for reply in one.replies]
    spoken = [len(reply.turn.token_ids) for reply in replies if teaches(reply, learning.settings)]
    refined = sum(reply.turn.actions is not None for reply in replies)
    totals = Totals(*(parallel.per_process(count) for count in (sum(spoken), len(spoken), refined)))
    sums: dict[str, float] = {}
    for one in packs:
        loss, stats = _loss(learning, one, totals)
        for name, value in stats.items():
            sums[name] = sums.get(name, 0.0) + value
        yield loss
    numbers |= parallel.mean(sums, absent=0.0)


def teaches(reply: Reply, settings: GrpoTraining) -> bool:
    """Whether the words of a reply are learned from: by their advantage, or by staying near the reference."""
    return reply.text_advantage != 0 or settings.beta > 0


@dataclass(frozen=True)
class Totals:
    """What a step averages over: tokens and replies that are learned from, and replies that refined (of all processes, a
    process)."""

    tokens: float
    replies: float
    refined: float


def _loss(learning: Learning, one: Pack, totals: Totals) -> tuple[Tensor, dict[str, float]]:
    """A pack's part of the losses of text, soft tokens and contrast, from one forward pass, and of the numbers to log."""
    settings = learning.settings
    logps, last, state = _read(learning.policy, one, settings)
    loss = logps.new_zeros(())
    stats: dict[str, float] = {}
    learned = torch.tensor([teaches(reply, settings) for reply in one.replies], device=logps.device)
    rows = [row for row, reply in enumerate(one.replies) if reply.turn.actions is not None]
    with torch.no_grad(), learning.reference() as frozen:
        reference_logps, reference_last, reference_state = _read(frozen, one, settings)
        anchor = None
        if rows and settings.latent_beta and settings.sigma:
            turns = [one.replies[row].turn for row in rows]
            anchor = _replay(frozen, reference_last, reference_state, turns, rows, settings.sigma)[0].means
    if bool(learned.any()):
        lengths = torch.tensor([len(reply.turn.token_ids) for reply in one.replies], device=logps.device)
        mask = (torch.arange(logps.shape[1], device=logps.device) < lengths[:, None]) & learned[:, None]
        old = torch.nn.utils.rnn.pad_sequence([reply.turn.token_logps for reply in one.replies], batch_first=True)
        loss, found = policy_loss(
            logps,
            old.to(logps.device),
            logps.new_tensor([reply.text_advantage for reply in one.replies]),
            mask,
            loss_type=settings.loss_type,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            beta=settings.beta,
            ref_logp=reference_logps,
            max_length=settings.max_tokens,
            denominator=totals.tokens if settings.loss_type in ("bnpo", "dapo") else totals.replies,
        )
        share = int(mask.sum()) / totals.tokens
        stats = {name: value if name == "loss" else share * value for name, value in found.items()}
    if rows and (anchor is not None or learning.refinement):
        latent, latent_stats = _soft_losses(learning, one, rows, last, state, anchor)
        share = len(rows) / totals.refined
        loss = loss + share * latent
        stats |= {name: share * value for name, value in latent_stats.items()}
    return loss, stats


def _read(policy: Policy, one: Pack, settings: GrpoTraining) -> tuple[Tensor, Tensor, State]:
    """Log-probabilities (R, L) of the replies' tokens, right-padded with zeros; the states (R, H) that seed soft tokens; and
    what these continue."""
    model = policy.model.model
    said = [reply.turn.token_ids for reply in one.replies]
    prompts, state = backbone.run(model, list(one.prompts.values()), keep_cache=True)
    assert state is not None
    owner = torch.tensor(one.owner, device=prompts.device)
    state = state.branch(owner)
    normed = policy.settings.first_latent == "normed"
    hidden, last = backbone.feed_tokens(model, state, said, normed=normed)
    if not normed:
        hidden = model.language_model.norm(hidden)
    # a token is read off the state before its own: the first one off the prompt's end
    before = torch.cat([prompts[owner, -1][:, None], hidden[:, :-1]], 1)
    lengths = torch.tensor([len(ids) for ids in said], device=prompts.device)
    mask = torch.arange(before.shape[1], device=prompts.device) < lengths[:, None]
    target = torch.tensor([token for ids in said for token in ids], device=prompts.device)
    weight = policy.model.lm_head.weight
    flat = linear_logp(before[mask], weight, target, temperature=settings.sampling_temperature).logp
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat), last, state


def _soft_losses(
    learning: Learning, one: Pack, rows: Sequence[int], last: Tensor, state: State, anchor: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """Policy gradient of the soft tokens that were drawn, InfoNCE of the query that their means make, and the KL to the
    reference, whose means are `anchor` (M, n, D): mean (mean - anchor)^2 / (2 sigma^2), coordinates averaged as in
    `gaussian_logp`."""
    policy, settings = learning.policy, learning.settings
    replies = [one.replies[row] for row in rows]
    soft, old = _replay(policy, last, state, [reply.turn for reply in replies], rows, settings.sigma)
    loss = soft.means.new_zeros(())
    stats: dict[str, float] = {}
    if settings.explores:
        advantage = soft.means.new_tensor([reply.turn_advantage for reply in replies])
        latent, found = latent_loss(soft.means, soft.actions, old, advantage, settings.sigma, settings.clip_low)
        loss = loss + settings.latent_weight * latent
        stats |= {f"latent_{name}": value for name, value in found.items()}
    if anchor is not None:
        drift = (soft.means - anchor).square().mean() / (2 * settings.sigma**2)
        loss = loss + settings.latent_beta * drift
        stats["latent_kl"] = float(drift.detach())
    if settings.contrast_weight:
        contrast = _contrast(learning, replies, soft.means)
        loss = loss + settings.contrast_weight * contrast
        stats["contrast"] = float(contrast.detach())
    if settings.distillation_weight and learning.meanings:
        target = torch.stack([learning.meanings[reply.one.moment.query_id] for reply in replies])
        distilled = distillation_loss(policy.head.soft_tokens(soft.means), target, learning.power)
        loss = loss + settings.distillation_weight * distilled
        stats["distillation"] = float(distilled.detach())
    return loss, stats


def _contrast(learning: Learning, replies: Sequence[Reply], means: Tensor) -> Tensor:
    """Mean InfoNCE over the whole corpus of the queries that the soft tokens' means (M, n, D) make."""
    settings, shelf = learning.settings, learning.shelf
    positive = torch.tensor([shelf.row(reply.one.moment.video_id) for reply in replies], device=means.device)
    by_length: dict[int, list[int]] = {}
    kept = [reply.earlier() if settings.accumulate else [] for reply in replies]
    for row, earlier in enumerate(kept):
        by_length.setdefault(len(earlier), []).append(row)
    total = means.new_zeros(())
    for rows in by_length.values():
        tokens = torch.stack([torch.cat([*kept[row], means[row]]) for row in rows])
        texts = [replies[row].one.moment.text for row in rows]
        refined = learning.embedder.embed_texts(texts, learning.policy.head.soft_tokens(tokens))
        total = total + info_nce(refined, shelf.matrix(), positive[rows], settings.temperature).sum()
    return total / len(replies)


def _replay(
    policy: Policy, last: Tensor, state: State, turns: Sequence[Turn], rows: Sequence[int], sigma: float
) -> tuple[SoftTokens, Tensor]:
    """The soft tokens of `turns` under the present weights, and their log-probability when they were drawn."""
    chosen = torch.tensor(rows, device=last.device)
    actions = torch.stack([turn.actions for turn in turns if turn.actions is not None])
    means = torch.stack([turn.latents for turn in turns if turn.latents is not None])
    soft = soft_tokens(policy, last[chosen], state.select(chosen), sigma=sigma, replay=actions)
    old = gaussian_logp(actions, means, sigma) if sigma else soft.logps.detach()
    return soft, old

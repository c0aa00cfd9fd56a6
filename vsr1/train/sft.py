"""Stage 1: the policy learns to judge, to ground and to refine from given replies.

Where the rows come from is a `Source`'s to know: the rendered world's templates (`vsr1.train.templated`) or the files of a
data set (`vsr1.train.annotated`). Cross-entropy teaches the reply. On the rows that refine, the soft tokens are rolled out
over the same cache, and learn twice: by distillation, where the source knows what the query means, to say that in the
embedder's input space; then by InfoNCE of the refined query, over the whole corpus or a row's hard negatives. Rolled out
from random weights they would stay inert for long.

A step's rows go through the model in parts of at most `pack_tokens` tokens, whose losses add up to that of the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from vsr1.agent.generate import soft_tokens
from vsr1.errors import ConfigError
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import info_nce
from vsr1.train import lora, parallel
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import as_numbers, distillation_loss, sft_loss


@dataclass
class SftTraining:
    """optimisation; rows a step; share of matched rows; depth of the confusions; weights of token kinds and losses.

    refine: which rows roll out soft tokens, those of rejected videos or all, at most `refine_rows` a step; refine_from: the
    share of steps after which they learn; contrast_from: after which InfoNCE joins. negatives: so many hard negatives a row
    stand against the right video in InfoNCE; 0: the whole corpus does. lora_rank: train low-rank adapters of that rank instead
    of all weights (0). pack_tokens: most tokens of one forward and backward
    pass (a single row may be longer).
    """

    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=360, learning_rate=1.5e-3))
    head_learning_rate: float = 2e-3
    batch: int = 32
    matched: float = 0.5
    confusions: int = 10
    answer_weight: float = 4.0
    mark_weight: float = 4.0
    refine: Literal["rejected", "all"] = "rejected"
    refine_from: float = 0.7
    contrast_from: float = 1.0
    refine_rows: int = 12
    distillation_weight: float = 1.0
    contrast_weight: float = 0.3
    temperature: float = 0.05
    negatives: int = 0
    lora_rank: int = 0
    pack_tokens: int = 65536


@dataclass(frozen=True)
class Example:
    """One supervised row: the prompt with its reply (without the turn-closing token), the reply's ids and weights; the
    query's words and the video they ask about; corpus rows of hard negatives, where the source has any."""

    row: Row
    reply: tuple[int, ...]
    weights: tuple[float, ...]
    matched: bool
    text: str
    video_id: str
    negatives: tuple[int, ...] = ()


class Source(Protocol):
    """Where the rows of the steps come from; what a step holds depends on its number alone."""

    def draw(self, index: int) -> Sequence[Any]:
        """The rows of step `index`, `Example`s; where processes share steps, the rows of this one."""

    def expect(self, index: int) -> None:
        """Step `index` is the next one: have its videos decoded meanwhile."""

    def has_one_answer(self, example: Any) -> bool:
        """Whether only one video of the corpus shows what the example asks for."""

    def meanings(self, examples: Sequence[Any]) -> Tensor | None:
        """What the queries of these rows mean, in the embedder's input space (R, n, E); None where that is not known."""


def reply_tokens(policy: Policy, text: str, settings: SftTraining) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids of a reply with the turn-closing token, and each token's weight: comparison marks, numbers, the answer."""
    ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.eos_id]
    pieces = policy.tokenizer.convert_ids_to_tokens(ids)
    answering, weights = False, []
    for piece in pieces:
        word = piece.strip("\u0120 ")
        if word == "</answer>":
            answering = False
        heavy = settings.mark_weight if word in ("=", "!=") or word[:1].isdigit() else 1.0
        weights.append(settings.answer_weight if answering else heavy)
        if word == "<answer>":
            answering = True
    return tuple(ids), tuple(weights)


def train_sft(
    policy: Policy, embedder: Embedder, source: Source, shelf: Shelf, settings: SftTraining, keeper: Keeper
) -> None:
    """Train `policy` (its vision tower stays frozen); `shelf` is the corpus of all training videos. ConfigError if there are
    more processes than rows a step."""
    if settings.batch < parallel.size():
        raise ConfigError(f"sft.batch is {settings.batch}, and {parallel.size()} processes share it: give each a row")
    stage = _Stage(policy, embedder, source, shelf, settings)
    total = settings.optimisation.steps

    def step(index: int) -> StepResult:
        drawn = source.draw(index)
        if index + 1 < total:
            source.expect(index + 1)
        numbers: dict[str, float] = {}
        refining, contrasting = (index >= share * total for share in (settings.refine_from, settings.contrast_from))
        return stage.losses(drawn, refining, refining and contrasting, numbers), numbers

    tuner = lora.adapt(policy, settings.lora_rank) if settings.lora_rank else None
    groups = trainable(policy, settings.head_learning_rate, adapters=tuner is not None)
    train("sft", policy, groups, step, settings.optimisation, keeper)
    if tuner is not None:
        lora.merge(policy, tuner)
    policy.requires_grad_(False)


@dataclass(frozen=True)
class _Totals:
    """What a step averages over: weights of tokens, rows that refine, and those of them that InfoNCE can teach (of all
    processes, a process)."""

    weight: float
    refined: float
    contrasted: float


@dataclass(frozen=True)
class _Stage:
    policy: Policy
    embedder: Embedder
    source: Source
    shelf: Shelf
    settings: SftTraining

    def losses(
        self, drawn: Sequence[Example], refining: bool, contrasting: bool, numbers: dict[str, float]
    ) -> Iterator[Tensor]:
        """The losses of the parts of a step; they add up to that of the step. `numbers` gets what is to be logged."""
        refined = [place for place, one in enumerate(drawn) if refining and self._refines(one)]
        refined = refined[: -(-self.settings.refine_rows // parallel.size())]
        clear = [place for place in refined if contrasting and self.source.has_one_answer(drawn[place])]
        counts = sum(sum(one.weights) for one in drawn), len(refined), len(clear)
        totals = _Totals(*(parallel.per_process(count) for count in counts))
        sums: dict[str, float] = {}
        for part in backbone.parts([one.row for one in drawn], self.settings.pack_tokens):
            inside = [place - part.start for place in refined if place in part]
            unique = [row for row, place in enumerate(p for p in refined if p in part) if place in clear]
            loss, found = self._loss([drawn[place] for place in part], inside, unique, totals)
            for name, value in as_numbers(**found).items():
                sums[name] = sums.get(name, 0.0) + value
            yield loss
        numbers |= parallel.mean(sums, absent=0.0)

    def _refines(self, one: Example) -> bool:
        asks = self.policy.refine_id == one.row.token_ids[-1]  # behind it the soft tokens begin
        return asks and (self.settings.refine == "all" or not one.matched)

    def _loss(
        self, drawn: Sequence[Example], rows: Sequence[int], unique: Sequence[int], totals: _Totals
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A part's share of the losses. rows: those of `drawn` that refine; unique: of these, those with one answer."""
        policy, settings = self.policy, self.settings
        model, normed = policy.model.model, policy.settings.first_latent == "normed"
        hidden, state = backbone.run(model, [one.row for one in drawn], keep_cache=bool(rows), normed=normed)
        spoken = hidden if normed else model.language_model.norm(hidden)
        loss = say_loss(policy, spoken, drawn, totals.weight)
        numbers = {"say": loss}
        if not rows:
            return loss, numbers
        assert state is not None
        chosen = torch.tensor(rows, device=hidden.device)
        soft = soft_tokens(policy, hidden[chosen, -1], state.select(chosen))
        entering = policy.head.soft_tokens(soft.actions)
        asked = [drawn[row] for row in rows]
        target = self.source.meanings(asked)
        if target is not None and settings.distillation_weight:
            distil = distillation_loss(entering, target) * (len(rows) / totals.refined)
            loss = loss + settings.distillation_weight * distil
            numbers["distillation"] = distil
        if unique:
            refined = self.embedder.embed_texts([one.text for one in asked], entering)[list(unique)]
            contrast = self._contrast(refined, [asked[row] for row in unique]) * (len(unique) / totals.contrasted)
            loss = loss + settings.contrast_weight * contrast
            numbers["contrast"] = contrast
        return loss, numbers

    def _contrast(self, refined: Tensor, asked: Sequence[Example]) -> Tensor:
        """Mean InfoNCE of refined queries (R, D), against the whole corpus or each one's own negatives."""
        settings, matrix = self.settings, self.shelf.matrix()
        positive = torch.tensor([self.shelf.row(one.video_id) for one in asked], device=refined.device)
        if not settings.negatives:
            return info_nce(refined, matrix, positive, settings.temperature).mean()
        others = torch.tensor([one.negatives for one in asked], device=positive.device)
        against = matrix.rows[torch.cat([positive[:, None], others], 1)].to(refined.dtype)
        logits = (against @ refined[:, :, None])[..., 0] / settings.temperature
        return -logits.log_softmax(-1)[:, 0].mean()


def trainable(policy: Policy, head_learning_rate: float, *, adapters: bool = False) -> list[dict[str, Any]]:
    """Switch gradients on for everything but the vision tower, or of the model only for its `adapters`; AdamW groups with
    the refine head's own rate."""
    policy.requires_grad_(True)
    policy.videos.visual.requires_grad_(False)
    if adapters:
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return [{"params": model}, {"params": list(policy.head.parameters()), "lr": head_learning_rate}]


def say_loss(policy: Policy, hidden: Tensor, examples: Sequence[Example], denominator: float | None = None) -> Tensor:
    """Weighted cross-entropy of the replies, divided as in `sft_loss`; hidden (B, L, H) is left-padded: n tokens are read off
    the last n columns."""
    replies = [one.reply for one in examples]
    weight = torch.tensor([value for one in examples for value in one.weights], device=hidden.device)
    logp = backbone.spoken_logps(hidden, policy.model.lm_head.weight, replies, last_is_fed=False)
    return sft_loss(logp[None], weight[None], denominator=denominator)

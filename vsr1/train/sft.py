"""Stage 1: the policy learns to judge, to ground and to refine from templated replies.

Every row asks, in fresh words, about one event of one training video, and shows that video (half of the rows) or one that
the frozen embedder finds for these words; the truth of both is known, so the right reply is too. Cross-entropy teaches the
reply. (Asking only the few queries that have one answer makes the policy memorise which videos are right.) On the rejected
rows the soft tokens are rolled out over the same cache, and learn twice: by distillation, to say in the embedder's input
space what the query means in canonical words; then by InfoNCE of the refined query over the whole corpus, where only one
video answers. Rolled out from random weights they would stay inert for long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.agent.generate import soft_tokens
from vsr1.data.rationale import judge
from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, canonical_rewrite, sentence
from vsr1.data.world import World, WorldQuery
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures
from vsr1.ops.corpus_scan import info_nce, scan
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import as_numbers, distillation_loss, sft_loss


@dataclass
class SftTraining:
    """optimisation; rows a step; share of matched rows; depth of the confusions; weights of token kinds and losses.

    refine_from: the share of steps after which the soft tokens learn; contrast_from: after which InfoNCE joins.
    """

    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=360, learning_rate=1.5e-3))
    head_learning_rate: float = 2e-3
    batch: int = 32
    matched: float = 0.5
    confusions: int = 10
    answer_weight: float = 4.0
    mark_weight: float = 4.0
    refine_from: float = 0.7
    contrast_from: float = 1.0
    refine_rows: int = 12
    distillation_weight: float = 1.0
    contrast_weight: float = 0.3
    temperature: float = 0.05


@dataclass(frozen=True)
class Example:
    """One supervised row: the prompt with its reply (without the turn-closing token), the reply's ids and weights; the
    query's words, and what they mean."""

    row: Row
    reply: tuple[int, ...]
    weights: tuple[float, ...]
    matched: bool
    text: str
    attributes: dict[str, str]
    video_id: str


def build(
    policy: Policy,
    text: str,
    attributes: dict[str, str],
    video_id: str,
    shown: Scene,
    video: VideoFeatures,
    settings: SftTraining,
) -> Example:
    """The supervised row of a query (`text`, meaning `attributes`, asked about `video_id`) before `shown`."""
    reply = judge(attributes, shown)
    prompt = protocol.prompt(policy.tokenizer, text, video, system=policy.settings.system)
    ids, weights = reply_tokens(policy, protocol.render(reply), settings)
    row = Row((*prompt.token_ids, *ids[:-1]), video)
    return Example(row, ids, weights, reply.answer == "matched", text, attributes, video_id)


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


@dataclass(frozen=True)
class Questions:
    """What the rows of a step ask, the matched ones first: the event (a scene and its number), the words, the video shown."""

    asked: list[tuple[Scene, int]]
    texts: list[str]
    shown: list[str]


class Examples:
    """Draws the rows of a step from all training videos."""

    def __init__(
        self, policy: Policy, embedder: Embedder, world: World, shelf: Shelf, settings: SftTraining, seed: int
    ) -> None:
        self.policy, self.embedder, self.shelf, self.settings, self.seed = policy, embedder, shelf, settings, seed
        self.rare_fraction = world.config.rare_fraction
        self.scenes = {scene.video_id: scene for scene in world.scenes("train")}
        self.events = [(scene, number) for scene in self.scenes.values() for number in range(len(scene.events))]
        answers: dict[tuple[str, ...], set[str]] = {}
        for scene, number in self.events:
            answers.setdefault(_key(scene.attributes(number)), set()).add(scene.video_id)
        self._answers = {key: len(found) for key, found in answers.items()}
        self._expected: dict[int, Questions] = {}

    def has_one_answer(self, example: Example) -> bool:
        """Whether only one training video shows what the example asks for."""
        return self._answers[_key(example.attributes)] == 1

    def draw(self, index: int) -> list[Example]:
        """The rows of step `index`, the matched ones first."""
        questions = self._expected.pop(index, None) or self.ask(index)
        videos = self.shelf.features(questions.shown)
        return [
            build(self.policy, text, one.attributes(number), one.video_id, self.scenes[shown], video, self.settings)
            for (one, number), text, shown, video in zip(
                questions.asked, questions.texts, questions.shown, videos, strict=True
            )
        ]

    def expect(self, index: int) -> None:
        """Step `index` is the next one: have its videos decoded meanwhile."""
        self._expected[index] = self.ask(index)
        self.shelf.expect(self._expected[index].shown)

    def ask(self, index: int) -> Questions:
        """The questions of step `index`."""
        settings, names = self.settings, self.shelf.video_ids
        rng, words = np.random.default_rng((self.seed, 3, index)), Random(f"{self.seed} sft {index}")
        pick = rng.choice(len(self.events), min(settings.batch, len(self.events)), replace=False)
        asked = [self.events[i] for i in pick]
        texts = [sentence(one.attributes(number), words, rare_fraction=self.rare_fraction) for one, number in asked]
        right = round(settings.matched * len(asked))
        shown = [scene.video_id for scene, _ in asked[:right]]
        with torch.no_grad():
            vectors = self.embedder.embed_texts(texts[right:])
        own = torch.tensor([[self.shelf.row(scene.video_id)] for scene, _ in asked[right:]], device=vectors.device)
        nearest = scan(
            vectors, self.shelf.matrix(), k=min(settings.confusions, len(names) - 1), exclude=own
        ).ids.tolist()
        depths = rng.exponential(settings.confusions / 4, len(nearest))
        shown += [names[near[min(int(depth), len(near) - 1)]] for near, depth in zip(nearest, depths, strict=True)]
        return Questions(asked, texts, shown)


def _key(attributes: dict[str, str]) -> tuple[str, ...]:
    return tuple(attributes[name] for name in ATTRIBUTES)


def train_sft(
    policy: Policy, embedder: Embedder, world: World, shelf: Shelf, settings: SftTraining, seed: int, keeper: Keeper
) -> None:
    """Train `policy` (its vision tower stays frozen); `shelf` is the corpus of all training videos."""
    examples = Examples(policy, embedder, world, shelf, settings, seed)
    matrix = shelf.matrix()
    total = settings.optimisation.steps

    def step(index: int) -> StepResult:
        drawn = examples.draw(index)
        if index + 1 < total:
            examples.expect(index + 1)
        refining = index >= settings.refine_from * total
        hidden, state = backbone.run(policy.model.model, [one.row for one in drawn], keep_cache=refining)
        loss = say_loss(policy, hidden, drawn)
        numbers = {"say": loss}
        rows = [row for row, one in enumerate(drawn) if not one.matched][: settings.refine_rows]
        if refining and rows:
            assert state is not None
            chosen = torch.tensor(rows, device=hidden.device)
            soft = soft_tokens(policy, hidden[chosen, -1], state.select(chosen))
            entering = policy.head.soft_tokens(soft.actions)
            asked = [drawn[row] for row in rows]
            distil = distillation_loss(entering, canonical_embeddings(embedder, [one.attributes for one in asked]))
            loss = loss + settings.distillation_weight * distil
            numbers["distillation"] = distil
            unique = [row for row, one in enumerate(asked) if examples.has_one_answer(one)]
            if index >= settings.contrast_from * total and unique:
                clear = torch.tensor(unique, device=hidden.device)
                refined = embedder.embed_texts([one.text for one in asked], entering)[clear]
                positive = torch.tensor([shelf.row(asked[row].video_id) for row in unique], device=hidden.device)
                contrast = info_nce(refined, matrix, positive, settings.temperature).mean()
                loss = loss + settings.contrast_weight * contrast
                numbers["contrast"] = contrast
        return loss, as_numbers(**numbers)

    groups = trainable(policy, settings.head_learning_rate)
    train("sft", policy, groups, step, settings.optimisation, keeper)
    policy.requires_grad_(False)


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


def say_loss(policy: Policy, hidden: Tensor, examples: Sequence[Example]) -> Tensor:
    """Weighted cross-entropy of the replies; hidden (B, L, H) is left-padded: n tokens are read off the last n columns."""
    replies = [one.reply for one in examples]
    weight = torch.tensor([value for one in examples for value in one.weights], device=hidden.device)
    logp = backbone.spoken_logps(hidden, policy.model.lm_head.weight, replies, last_is_fed=False)
    return sft_loss(logp[None], weight[None])


@torch.no_grad()
def canonical_embeddings(embedder: Embedder, attributes: Sequence[dict[str, str]]) -> Tensor:
    """The embedder's own token embeddings of the canonical words of each query: (Q, words, E)."""
    ids = []
    for one in attributes:
        words = [
            embedder.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            for word in canonical_rewrite(one).split()
        ]
        if any(len(word) != 1 for word in words):
            raise ValueError(f"distillation needs canonical words of one token each; got {canonical_rewrite(one)!r}")
        ids.append([word[0] for word in words])
    return embedder.model.get_input_embeddings()(torch.tensor(ids, device=embedder.videos.device))


def meanings(embedder: Embedder, queries: Sequence[WorldQuery]) -> dict[str, Tensor]:
    """`canonical_embeddings` (words, E) of queries by their id: what stage 2 distils onto."""
    embeddings = canonical_embeddings(embedder, [query.attributes for query in queries])
    return {query.moment.query_id: one for query, one in zip(queries, embeddings, strict=True)}

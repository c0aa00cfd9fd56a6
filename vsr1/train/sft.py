"""Stage 1: the policy learns to judge, to ground and to refine from templated replies.

Every step shows queries with their right video (half) or with a video the frozen embedder confuses it with (half).
Cross-entropy teaches the reply. On the rejected rows the soft tokens are rolled out over the same cache, and learn twice:
first by distillation, to say in the embedder's input space what the query means in canonical words; then by InfoNCE of the
refined query over the whole corpus. Rolled out from random weights they would stay inert for long.
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
from vsr1.data.vocabulary import canonical_rewrite, sentence
from vsr1.data.world import World, WorldQuery
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures
from vsr1.ops.corpus_scan import info_nce, scan
from vsr1.ops.linear_logp import linear_logp
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import distillation_loss, sft_loss


@dataclass
class SftTraining:
    """optimisation; rows a step; share of matched rows; depth of the confusions; weights of token kinds and losses.

    refine_from: the share of steps after which the soft tokens learn; contrast_from: after which InfoNCE joins.
    """

    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=320, learning_rate=1.5e-3))
    head_learning_rate: float = 2e-3
    batch: int = 32
    matched: float = 0.5
    confusions: int = 10
    answer_weight: float = 4.0
    mark_weight: float = 2.0
    refine_from: float = 0.25
    contrast_from: float = 0.5
    refine_rows: int = 12
    distillation_weight: float = 1.0
    contrast_weight: float = 0.3
    temperature: float = 0.05


@dataclass(frozen=True)
class Example:
    """One supervised row: the prompt with its reply (without the turn-closing token), the reply's ids and weights."""

    row: Row
    reply: tuple[int, ...]
    weights: tuple[float, ...]
    matched: bool


def build(policy: Policy, query: WorldQuery, text: str, scene: Scene, video: VideoFeatures, settings: SftTraining) -> Example:
    """The supervised row of `query`, put as `text`, before `scene`, whose features are `video`."""
    reply = judge(query, scene)
    prompt = protocol.prompt(policy.tokenizer, text, video, system=policy.settings.system)
    ids, weights = reply_tokens(policy, protocol.render(reply), settings)
    return Example(Row((*prompt.token_ids, *ids[:-1]), video), ids, weights, reply.answer == "matched")


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
    policy: Policy, embedder: Embedder, world: World, shelf: Shelf, settings: SftTraining, seed: int, keeper: Keeper
) -> None:
    """Train `policy` (its vision tower stays frozen) on the queries of the world's "policy" fold; `shelf` is their corpus."""
    queries = world.queries("train", fold="policy")
    scenes = {scene.video_id: scene for scene in world.scenes("train", fold="policy")}
    confused = confusions(embedder, shelf, queries, settings.confusions)
    canonical = canonical_embeddings(embedder, queries, policy.settings.soft_tokens)
    matrix = shelf.matrix()
    total = settings.optimisation.steps

    def step(index: int) -> StepResult:
        rng = np.random.default_rng((seed, 3, index))
        pick = rng.choice(len(queries), min(settings.batch, len(queries)), replace=False)
        # the queries are few; asked in fresh words every time they teach the words and not themselves
        words = Random(f"{seed} sft {index}")
        texts = [sentence(queries[i].attributes, words, rare_fraction=world.config.rare_fraction) for i in pick]
        examples = []
        for row, query_index in enumerate(pick):
            query = queries[query_index]
            depth = min(int(rng.exponential(settings.confusions / 4)), len(confused[query_index]) - 1)
            shown = query.moment.video_id if row < settings.matched * len(pick) else confused[query_index][depth]
            assert shown is not None
            examples.append(build(policy, query, texts[row], scenes[shown], shelf.features(shown), settings))
        refining = index >= settings.refine_from * total
        hidden, state = backbone.run(policy.model.model, [one.row for one in examples], keep_cache=refining)
        loss = say_loss(policy, hidden, examples)
        numbers = {"say": loss.item()}
        if refining:
            assert state is not None
            rows = [row for row, one in enumerate(examples) if not one.matched][: settings.refine_rows]
            chosen = torch.tensor(rows)
            soft = soft_tokens(policy, hidden[chosen, -1], state.select(chosen))
            entering = policy.head.soft_tokens(soft.actions)
            mine = pick[rows]
            distil = distillation_loss(entering, canonical[torch.from_numpy(mine)])
            loss = loss + settings.distillation_weight * distil
            numbers["distillation"] = distil.item()
            if index >= settings.contrast_from * total:
                refined = embedder.embed_texts([texts[row] for row in rows], entering)
                positive = torch.tensor([shelf.row(queries[i].moment.video_id) for i in mine])
                contrast = info_nce(refined, matrix, positive, settings.temperature).mean()
                loss = loss + settings.contrast_weight * contrast
                numbers["contrast"] = contrast.item()
        return loss, numbers

    groups = trainable(policy, settings.head_learning_rate)
    train("sft", policy, groups, step, settings.optimisation, keeper)
    policy.requires_grad_(False)


def trainable(policy: Policy, head_learning_rate: float) -> list[dict[str, Any]]:
    """Switch gradients on for everything but the vision tower; AdamW groups with the refine head's own rate."""
    policy.requires_grad_(True)
    policy.videos.visual.requires_grad_(False)
    model = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    return [{"params": model}, {"params": list(policy.head.parameters()), "lr": head_learning_rate}]


def say_loss(policy: Policy, hidden: Tensor, examples: Sequence[Example]) -> Tensor:
    """Weighted cross-entropy of the replies; hidden (B, L, H) left-padded, so a reply of n tokens is read off the last n columns."""
    speaking = torch.cat([hidden[row, -len(one.reply) :] for row, one in enumerate(examples)])
    target = torch.tensor([token for one in examples for token in one.reply])
    weight = torch.tensor([value for one in examples for value in one.weights])
    logp = linear_logp(speaking, policy.model.lm_head.weight, target).logp
    return sft_loss(logp[None], weight[None])


@torch.no_grad()
def confusions(embedder: Embedder, shelf: Shelf, queries: Sequence[WorldQuery], depth: int) -> list[list[str]]:
    """For each query the `depth` videos nearest to it that are not the right one; fewer where there are no more."""
    names = list(shelf.video_ids)
    depth = min(depth, len(names) - 1)
    nearest: list[list[str]] = []
    for begin in range(0, len(queries), 256):
        some = queries[begin : begin + 256]
        vectors = embedder.embed_texts([query.moment.text for query in some])
        own = torch.tensor([[shelf.row(query.moment.video_id)] for query in some])
        found = scan(vectors, shelf.matrix(), k=depth, exclude=own)
        nearest.extend([names[row] for row in rows] for rows in found.ids.tolist())
    return nearest


@torch.no_grad()
def canonical_embeddings(embedder: Embedder, queries: Sequence[WorldQuery], count: int) -> Tensor:
    """The embedder's own token embeddings of each query's canonical words: (Q, count, E)."""
    words = [canonical_rewrite(query.attributes).split() for query in queries]
    ids = [[embedder.tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in line] for line in words]
    if any(len(line) != count or any(len(word) != 1 for word in line) for line in ids):
        raise ValueError(f"distillation needs {count} canonical words of one token each")
    return embedder.model.get_input_embeddings()(torch.tensor([[word[0] for word in line] for line in ids]))

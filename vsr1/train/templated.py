"""What the first stage of the policy learns from in the rendered world: templated replies to fresh questions.

Every row asks, in fresh words, about one event of one training video, and shows that video (half of the rows) or one that
the frozen embedder finds for these words; the truth of both is known, so the right reply is too. (Asking only the few
queries that have one answer makes the policy memorise which videos are right.) What a query means in canonical words is
known as well: the soft tokens are distilled onto it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.data.rationale import judge
from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, canonical_rewrite, sentence
from vsr1.data.world import World, WorldQuery
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures
from vsr1.ops.corpus_scan import scan
from vsr1.train import parallel
from vsr1.train.library import Shelf
from vsr1.train.sft import Example, SftTraining, reply_tokens


@dataclass(frozen=True)
class Templated(Example):
    """A supervised row whose query means `attributes`."""

    attributes: dict[str, str] = field(kw_only=True)


def build(
    policy: Policy,
    text: str,
    attributes: dict[str, str],
    video_id: str,
    shown: Scene,
    video: VideoFeatures,
    settings: SftTraining,
) -> Templated:
    """The supervised row of a query (`text`, meaning `attributes`, asked about `video_id`) before `shown`."""
    reply = judge(attributes, shown)
    prompt = protocol.prompt(policy.tokenizer, text, video, system=policy.settings.system)
    ids, weights = reply_tokens(policy, protocol.render(reply), settings)
    row = Row((*prompt.token_ids, *ids[:-1]), video)
    return Templated(row, ids, weights, reply.answer == "matched", text, video_id, attributes=attributes)


@dataclass(frozen=True)
class Questions:
    """What the rows of a step ask, the matched ones first: the event (a scene and its number), the words, the video shown."""

    asked: list[tuple[Scene, int]]
    texts: list[str]
    shown: list[str]


class Templates:
    """Draws the rows of a step from all training videos; a `vsr1.train.sft.Source`."""

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

    def has_one_answer(self, example: Templated) -> bool:
        """Whether only one training video shows what the example asks for."""
        return self._answers[_key(example.attributes)] == 1

    def draw(self, index: int) -> list[Templated]:
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

    def meanings(self, examples: Sequence[Templated]) -> Tensor:
        """What the queries of these rows mean, in the embedder's input space: (R, words, E)."""
        return canonical_embeddings(self.embedder, [one.attributes for one in examples])

    def ask(self, index: int) -> Questions:
        """This process' share of the questions of step `index`."""
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
        return Questions(parallel.share(asked), parallel.share(texts), parallel.share(shown))


def _key(attributes: dict[str, str]) -> tuple[str, ...]:
    return tuple(attributes[name] for name in ATTRIBUTES)


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

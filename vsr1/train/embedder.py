"""The tiny embedder's training: videos and sentences meet in one space.

The vector at the last token of a video's row is pulled towards the vectors of sentences about the video and away from the
rest of the batch, both ways (InfoNCE), while the row is continued with a plain description of all events (cross-entropy),
which is what teaches the language model to read the frozen vision tokens: without it the vector learns only the
background. In the same way a sentence's row is continued with what it means in canonical words, which teaches the model to
look words up. Once it reads, every other batch holds few backgrounds, so that they tell nothing apart. (Describing first and
contrasting afterwards was tried: the contrast then never leaves chance. So was letting the description count half once it
reads: R@1 then stops at 9 % where it reaches 14 %.) Sentences drop attributes at random, and some carry their canonical
words behind them, as refined queries will. Videos of the batch that fit a sentence as well as its own are not negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vsr1.data.rationale import describe
from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, canonical, sentence, values
from vsr1.data.world import World
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import as_numbers


@dataclass
class EmbedderTraining:
    """optimisation; videos a step and sentences a video; what the batches and sentences hold.

    focus_from: share of steps after which every other batch holds only `backgrounds` backgrounds; temperature of InfoNCE;
    drop: chance of an attribute to go unmentioned; keywords: chance of canonical words behind a sentence.
    """

    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=360, learning_rate=2e-3))
    batch: int = 48
    sentences: int = 1
    focus_from: float = 0.5
    backgrounds: int = 3
    temperature: float = 0.05
    drop: float = 0.15
    keywords: float = 0.3


def matches(captions: np.ndarray, scenes: np.ndarray) -> np.ndarray:
    """Which scene fits which sentence (S, B): sentences (S, A) classes with -1 for dropped, scenes (B, E, A) with -2 for no
    event."""
    wanted = captions[:, None, None, :]
    return ((wanted == -1) | (wanted == scenes[None])).all(-1).any(-1)


def event_codes(scenes: Sequence[Scene]) -> np.ndarray:
    """Attribute classes of every event of every scene: (S, max events, attributes), -2 where there is no event."""
    codes = np.full((len(scenes), max(len(scene.events) for scene in scenes), len(ATTRIBUTES)), -2)
    for row, scene in enumerate(scenes):
        for column in range(len(scene.events)):
            attributes = scene.attributes(column)
            codes[row, column] = [values(name).index(attributes[name]) for name in ATTRIBUTES]
    return codes


def mentioned(text: str) -> dict[str, str]:
    """The attributes a sentence names, in canonical words."""
    return dict(meaning for word in text.split() if (meaning := canonical(word)) is not None)


@dataclass(frozen=True)
class Sentences:
    """Sentences about the videos of a batch: texts, their meaning in canonical words, classes (S, A) with -1 for dropped,
    owner (S,) row of the batch."""

    texts: list[str]
    meanings: list[str]
    wanted: np.ndarray
    owner: Tensor


def write_sentences(scenes: Sequence[Scene], settings: EmbedderTraining, rng: Random) -> Sentences:
    """A few fresh sentences about different events of each scene."""
    texts, meanings, wanted, owner = [], [], [], []
    for row, scene in enumerate(scenes):
        for event in rng.sample(range(len(scene.events)), min(settings.sentences, len(scene.events))):
            text = sentence(scene.attributes(event), rng, drop=settings.drop)
            kept = mentioned(text)
            meaning = " ".join(kept[name] for name in ATTRIBUTES if name in kept)
            if rng.random() < settings.keywords:
                text += " " + meaning
            texts.append(text)
            meanings.append("find " + meaning)
            wanted.append([values(name).index(kept[name]) if name in kept else -1 for name in ATTRIBUTES])
            owner.append(row)
    return Sentences(texts, meanings, np.array(wanted), torch.tensor(owner))


def contrast(
    texts: Tensor, videos: Tensor, owner: Tensor, excused: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Two-way InfoNCE of sentences texts (S, D) and videos (B, D), sentence s about video owner[s]; excused (S, B) bool
    pairs are no negatives. Returns the loss and the scores (S, B)."""
    scores = (texts @ videos.T / temperature).masked_fill(excused, float("-inf"))
    right = scores.gather(1, owner[:, None])[:, 0]
    from_text = F.cross_entropy(scores, owner)
    # from a video, each of its sentences competes with the sentences of the others, not with its siblings
    own = F.one_hot(owner, len(videos)).bool()
    others = scores.masked_fill(own, float("-inf")).logsumexp(0)[owner]
    from_video = (torch.logaddexp(others, right) - right).mean()
    return (from_text + from_video) / 2, scores


def continued(embedder: Embedder, rows: Sequence[Row], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Unit vectors (B, D) of `rows`, and the cross-entropy of continuing each row with its text, from one pass."""
    said = [embedder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    longer = [Row((*row.token_ids, *ids), row.video) for row, ids in zip(rows, said, strict=True)]
    hidden, _ = backbone.run(embedder.model, longer)
    ends = torch.tensor([-len(ids) - 1 for ids in said], device=hidden.device)
    logp = backbone.spoken_logps(hidden, embedder.model.language_model.embed_tokens.weight, said)
    return embedder.pool(hidden[torch.arange(len(rows), device=hidden.device), ends]), -logp.mean()


def train_embedder(embedder: Embedder, world: World, settings: EmbedderTraining, seed: int, keeper: Keeper) -> None:
    """Train `embedder`'s language model on the world's "embedder" fold and leave it frozen."""
    scenes = world.scenes("train", fold="embedder")
    codes = event_codes(scenes)
    backgrounds = np.array([f"{scene.background_colour} {scene.texture}" for scene in scenes])
    paths = [world.video_path(scene.video_id) for scene in scenes]
    with keeper.monitor.phase("encode", len(paths)) as phase:
        features = embedder.videos.encode_all(paths, progress=phase.update)
    prompts = [embedder.video_row(feature) for feature in features]
    model = embedder.model.language_model

    def step(index: int) -> StepResult:
        rng, words = np.random.default_rng((seed, 2, index)), Random(f"{seed} embedder {index}")
        focused = index >= settings.focus_from * settings.optimisation.steps
        few = settings.backgrounds if focused and index % 2 else 0
        pick = _draw(rng, backgrounds, settings.batch, few)
        videos, describing = continued(embedder, [prompts[i] for i in pick], [describe(scenes[i]) for i in pick])
        about = write_sentences([scenes[i] for i in pick], settings, words)
        texts, meaning = continued(embedder, [embedder.text_row(text) for text in about.texts], about.meanings)
        fits = torch.from_numpy(matches(about.wanted, codes[pick])).to(texts.device)
        owner = about.owner.to(texts.device)
        excused = fits & ~F.one_hot(owner, len(pick)).bool()
        loss, scores = contrast(texts, videos, owner, excused, settings.temperature)
        accuracy = (scores.argmax(-1) == owner).float().mean()
        numbers = as_numbers(describe=describing, meaning=meaning, contrast=loss, accuracy=accuracy)
        return loss + describing + meaning, numbers

    model.train().requires_grad_(True)
    train("embedder", model, [{"params": list(model.parameters())}], step, settings.optimisation, keeper)
    model.eval().requires_grad_(False)


def _draw(rng: np.random.Generator, backgrounds: np.ndarray, batch: int, few: int) -> np.ndarray:
    """Indices of a batch; with `few` > 0 only from that many backgrounds, which then tell nothing apart."""
    pool = np.arange(len(backgrounds))
    if few:
        kinds = np.unique(backgrounds)
        pool = np.flatnonzero(np.isin(backgrounds, rng.choice(kinds, min(few, len(kinds)), replace=False)))
    return rng.choice(pool, min(batch, len(pool)), replace=False)

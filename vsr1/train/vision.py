"""Vision warm-up of the tiny preset: the tower learns to name what a pair of frames shows.

Trained end to end from captions alone, a small tower learns only the backgrounds. Here every frame pair of the training
videos is labelled with the attributes of the event on screen, small linear heads read them from the mean of the pair's
tokens, and the tower is frozen afterwards. The heads are thrown away. (Heads on the tokens side by side reach the same
accuracy, but spread an attribute over places, where the language model does not find it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, EVENT_ATTRIBUTES, values
from vsr1.data.world import World
from vsr1.errors import VideoError
from vsr1.models.vision import VideoEncoder
from vsr1.train.loop import Keeper, Optimisation, StepResult, train
from vsr1.train.losses import as_numbers

IGNORE = -100


@dataclass
class VisionTraining:
    """optimisation; videos decoded for it; frame pairs a step; weight of the shape loss (the hardest attribute)."""

    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=420, learning_rate=2e-3, clip=2.0))
    videos: int = 2000
    pairs: int = 160
    shape_weight: float = 2.0


def pair_labels(scene: Scene, seconds: Tensor, temporal: int = 2) -> np.ndarray:
    """Class of each attribute for each temporal patch: (t, attributes) int64.

    An event counts where it is on screen in every frame of the patch; a patch with a part of an event is ignored for the
    event's attributes, and so is one without any.
    """
    times = seconds.tolist()
    times += [times[-1]] * (-len(times) % temporal)
    labels = np.full((len(times) // temporal, len(ATTRIBUTES)), IGNORE, dtype=np.int64)
    for patch in range(len(labels)):
        frames = times[patch * temporal : (patch + 1) * temporal]
        for column, name in enumerate(ATTRIBUTES):
            if name not in EVENT_ATTRIBUTES:
                labels[patch, column] = values(name).index(getattr(scene, name))
                continue
            for event in scene.events:
                if all(event.start <= second < event.end for second in frames):
                    labels[patch, column] = values(name).index(getattr(event, name))
    return labels


class _Heads(nn.Module):
    """The tower with one linear head an attribute on each patch's tokens."""

    def __init__(self, visual: nn.Module, width: int) -> None:
        super().__init__()
        self.visual = visual
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values(name))) for name in ATTRIBUTES})


def train_vision(videos: VideoEncoder, world: World, settings: VisionTraining, seed: int, keeper: Keeper) -> None:
    """Train `videos.visual` on the world's training videos, leave it frozen and its cache empty."""
    scenes = world.scenes("train")
    chosen = np.random.default_rng(seed).permutation(len(scenes))[: settings.videos]
    scenes = [scenes[index] for index in chosen]
    visual = videos.visual
    modules = _Heads(visual, visual.config.out_hidden_size).to(videos.device)
    frames, labels = _frame_pairs(videos, world, scenes, keeper)
    weights = {name: settings.shape_weight if name == "shape" else 1.0 for name in ATTRIBUTES}

    def step(index: int) -> StepResult:
        rng = np.random.default_rng((seed, 1, index))
        pick = rng.choice(len(frames), min(settings.pairs, len(frames)), replace=False)
        rows, grid = videos.frames_to_rows(frames[torch.from_numpy(pick)].to(videos.device))
        output = visual(rows, grid_thw=grid).pooler_output.unflatten(0, (len(pick), -1)).mean(1)
        loss, numbers = output.new_zeros(()), {}
        for column, (name, head) in enumerate(modules.heads.items()):
            target = torch.from_numpy(labels[pick, column]).to(output.device)
            logits = head(output)
            loss = loss + weights[name] * F.cross_entropy(logits, target, ignore_index=IGNORE)
            seen = target != IGNORE
            numbers[name] = (logits.argmax(-1) == target)[seen].float().mean()
        return loss, as_numbers(**numbers)

    visual.train().requires_grad_(True)
    train("vision", modules, [{"params": list(modules.parameters())}], step, settings.optimisation, keeper)
    visual.eval().requires_grad_(False)
    videos.forget()


def _frame_pairs(
    videos: VideoEncoder, world: World, scenes: Sequence[Scene], keeper: Keeper
) -> tuple[Tensor, np.ndarray]:
    """Decode `scenes` and cut them into labelled pairs: frames (P, 2, H, W, 3) uint8, labels (P, attributes)."""
    pixels, labels = [], []
    paths = [world.video_path(scene.video_id) for scene in scenes]
    with keeper.monitor.phase("decode", len(paths)) as phase:
        shown = dict(zip(paths, scenes, strict=True))
        for count, (path, frames) in enumerate(videos.frames(paths), 1):
            if isinstance(frames, VideoError):
                raise frames
            even = len(frames.pixels) // 2 * 2
            pixels.append(frames.pixels[:even].unflatten(0, (-1, 2)))
            labels.append(pair_labels(shown[path], frames.seconds[:even]))
            phase.update(count)
    return torch.cat(pixels), np.concatenate(labels)

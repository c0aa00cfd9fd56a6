"""Complete sets of settings by name: the embedded default, and recipes for the three public data sets.

The recipes for data sets come in two: `published` has the hyper-parameters of the public code where they mean something
here, ours trains the true loop with live retrieval. What differs from the published runs in either is in docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vsr1.config import DatasetConfig, JobConfig, RunConfig
from vsr1.data.world import WorldConfig
from vsr1.errors import ConfigError
from vsr1.eval.evaluate import EvaluationSettings
from vsr1.train.embedder import EmbedderTraining
from vsr1.train.grpo import GrpoTraining
from vsr1.train.loop import Optimisation
from vsr1.train.sft import SftTraining
from vsr1.train.vision import VisionTraining


def quick() -> RunConfig:
    """Every stage of `tiny` with a handful of videos and steps: checks the machinery in a minute, learns nothing."""

    def few(steps: int) -> Optimisation:
        return Optimisation(steps=steps, learning_rate=1e-3, warmup=2)

    return RunConfig(
        run=Path("runs/quick"),
        checkpoint_every=5.0,
        world=WorldConfig(train_videos=64, validation_videos=4, test_videos=24),
        vision=VisionTraining(optimisation=few(8), videos=32, pairs=48),
        embedder=EmbedderTraining(optimisation=few(8), batch=12),
        sft=SftTraining(optimisation=few(12), batch=8, refine_rows=4, refine_from=0.4, contrast_from=0.6),
        grpo=GrpoTraining(optimisation=few(3), queries=2, group=4, turns=2, max_tokens=32, validation_queries=4),
        evaluation=EvaluationSettings(queries=8, turns=2, max_tokens=40, resamples=200, calibration=4),
    )


@dataclass(frozen=True)
class _Room:
    """What a GPU has room for: tokens of one pass, replies at once, MiB of videos' features, pixels of a frame (0: all)."""

    pack_tokens: int
    rows: int
    feature_cache: int
    max_pixels: int


# By GB of memory, as `vsr1 plan` computes it.
_ROOM = {24: _Room(8192, 8, 512, 96 * 1024), 48: _Room(16384, 8, 1024, 0), 80: _Room(16384, 16, 1024, 0)}
MEMORY = tuple(_ROOM)
FULL_FROM = {"2b": 80, "4b": 141}
"""GB of memory from which all weights train; with less, adapters do."""
LORA_RANK = 32
LORA_RATE = 10.0  # the rate that adapters take, as a multiple of that of all weights (arXiv 2405.09673)


def dataset(name: str, size: str, *, published: bool = False, memory: int = 80) -> DatasetConfig:
    """The recipe of a data set for a model `size` ("2b", "4b"), on GPUs with so many GB of `memory` (one of MEMORY)."""
    if memory not in _ROOM:
        raise ConfigError(f"--memory must be one of {', '.join(map(str, MEMORY))} GB, got {memory}")
    sft, grpo = _published(name) if published else _ours()
    room, full = _ROOM[memory], memory >= FULL_FROM[size]
    if (memory, size) == (24, "4b"):
        room = replace(room, pack_tokens=4096)
    for stage in (sft, grpo):
        stage.pack_tokens = room.pack_tokens
        if not full:
            stage.lora_rank = LORA_RANK
            stage.optimisation.learning_rate *= LORA_RATE
    grpo.rows = room.rows
    return DatasetConfig(
        run=Path(f"runs/{name}" + ("-4b" if size == "4b" else "")),
        checkpoint_every=600.0,
        dataset=name,
        root=Path("data") / name,
        policy=f"Qwen/Qwen3-VL-{size.upper()}-Instruct",
        checkpointing=True,
        max_pixels=room.max_pixels,
        feature_cache=room.feature_cache,
        sft=sft,
        grpo=grpo,
        evaluation=EvaluationSettings(
            queries=0, max_tokens=grpo.max_tokens, ablated=500, rows=room.rows, pack_tokens=room.pack_tokens
        ),
    )


def _ours() -> tuple[SftTraining, GrpoTraining]:
    """The structure of the embedded default with rates for pretrained models."""
    sft = SftTraining(
        optimisation=Optimisation(steps=375, learning_rate=2e-5, weight_decay=0.0, muon=0.0),  # 3 times 2,000 rows
        head_learning_rate=1e-4,
        batch=16,
        refine_from=0.0,
        contrast_from=0.1,
        refine_rows=16,
        distillation_weight=0.0,
        temperature=0.1,
    )
    grpo = GrpoTraining(
        optimisation=Optimisation(steps=600, learning_rate=1e-6, warmup=10, weight_decay=0.0, muon=0.0),
        head_learning_rate=2e-5,
        videos=0,
        queries=8,
        group=8,
        max_tokens=512,
        beta=0.05,
        distillation_weight=0.0,
        temperature=0.1,
        validate_every=50,
    )
    return sft, grpo


# Weights of the rewards, and the share of training rows that the public code adds with the right video shown: as many as
# make matched and rejected rows equal, so none where the first video is right more often than not.
_REWARDS = {
    "charades": {"answer": 1.6, "time_iou": 0.35, "refine_presence": 0.1},
    "didemo": {"answer": 1.2, "time_iou": 0.45, "refine_presence": 0.8},
    "activitynet": {"answer": 1.2, "time_iou": 0.45, "refine_presence": 0.8},
}
_FORMAT = {"think_format": 0.05, "time_format": 0.05, "retrieval": 0.8}
_ADDED = {"charades": 0.36, "didemo": 0.0, "activitynet": 0.0}


def _published(name: str) -> tuple[SftTraining, GrpoTraining]:
    """The hyper-parameters of the public code. It takes p - p0 for the reward of a refinement, where p0 is the same for a whole
    group: p alone gives the same advantages."""
    sft = SftTraining(
        optimisation=Optimisation(
            steps=500, learning_rate=2e-5, warmup=0, weight_decay=0.0, final_fraction=0.0, muon=0.0, decay="linear"
        ),
        head_learning_rate=5e-5,
        batch=4,
        answer_weight=1.0,
        mark_weight=1.0,
        refine="all",
        refine_from=0.0,
        contrast_from=0.0,
        refine_rows=4,
        distillation_weight=0.0,
        temperature=0.1,
        negatives=24,
    )
    grpo = GrpoTraining(
        optimisation=Optimisation(steps=6500, learning_rate=5e-7, warmup=0, weight_decay=0.01, muon=0.0, decay="none"),
        videos=0,
        queries=3,
        bootstrapped=_ADDED[name],
        group=8,
        turns=1,
        max_tokens=768,
        advantage="std",
        credit="trajectory",
        beta=0.01,
        sigma=0.0,
        latent_weight=0.0,
        contrast_weight=0.0,
        distillation_weight=0.0,
        temperature=0.1,
        validate_every=200,
        rewards=_REWARDS[name] | _FORMAT,
    )
    return sft, grpo


DATASETS = ("charades", "didemo", "activitynet")
PRESETS: dict[str, Callable[..., JobConfig]] = {"tiny": RunConfig, "quick": quick}


def names() -> list[str]:
    """What `preset` knows."""
    return [*PRESETS, *DATASETS, *(f"{name}-4b" for name in DATASETS)]


def preset(name: str, *, published: bool = False, memory: int | None = None) -> JobConfig:
    """A fresh copy of the preset called `name`; ConfigError lists the known ones. `published` and `memory` (GB of a GPU; 80)
    are for data sets."""
    if name in PRESETS:
        if published or memory is not None:
            raise ConfigError(f"preset '{name}' is the rendered world's: leave out --published and --memory")
        return PRESETS[name]()
    if name not in names():
        raise ConfigError(f"unknown preset '{name}'; known: {', '.join(names())}")
    base, _, size = name.partition("-")
    return dataset(base, size or "2b", published=published, memory=memory or 80)

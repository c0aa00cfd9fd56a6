"""All settings of a run in one typed tree, its presets, and the way from the command line and back to disk.

Each stage's settings live beside the stage; this module only puts them together. A preset is a complete tree; flags
change single fields; the result is saved with the run as `config.yaml` and loads back to the same object.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vsr1.data.world import WorldConfig
from vsr1.errors import ConfigError
from vsr1.eval.evaluate import EvaluationSettings
from vsr1.models.tiny import TinyConfig
from vsr1.train.embedder import EmbedderTraining
from vsr1.train.grpo import GrpoTraining
from vsr1.train.loop import Optimisation
from vsr1.train.sft import SftTraining
from vsr1.train.vision import VisionTraining

STAGES = ("world", "embedder", "sft", "grpo", "eval")
Stage = Literal["world", "embedder", "sft", "grpo", "eval", "all"]


@dataclass
class RunConfig:
    """Settings of one run. Times in seconds; `workers` 0 means one a core."""

    run: Path = Path("runs/tiny")
    """the folder everything is written to"""
    stage: Stage = "all"
    """stop after this stage (every stage brings its predecessors along)"""
    seed: int = 1
    workers: int = 0
    checkpoint_every: float = 30.0
    world: WorldConfig = field(default_factory=WorldConfig)
    model: TinyConfig = field(default_factory=TinyConfig)
    vision: VisionTraining = field(default_factory=VisionTraining)
    embedder: EmbedderTraining = field(default_factory=EmbedderTraining)
    sft: SftTraining = field(default_factory=SftTraining)
    grpo: GrpoTraining = field(default_factory=GrpoTraining)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def quick() -> RunConfig:
    """Every stage of `tiny` with a handful of videos and steps: checks the machinery in a minute, learns nothing."""

    def few(steps: int) -> Optimisation:
        return Optimisation(steps=steps, learning_rate=1e-3, warmup=2)

    return RunConfig(
        run=Path("runs/quick"),
        checkpoint_every=5.0,
        world=WorldConfig(train_videos=96, validation_videos=8, test_videos=32),
        vision=VisionTraining(optimisation=few(12), videos=48, pairs=64),
        embedder=EmbedderTraining(optimisation=few(12), batch=16),
        sft=SftTraining(optimisation=few(20), batch=8, refine_rows=4),
        grpo=GrpoTraining(optimisation=few(3), queries=2, group=4, turns=2),
        evaluation=EvaluationSettings(queries=24, resamples=200),
    )


PRESETS: dict[str, typing.Callable[[], RunConfig]] = {"tiny": RunConfig, "quick": quick}


def preset(name: str) -> RunConfig:
    """A fresh copy of the preset called `name`; ConfigError lists the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset '{name}'; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def to_dict(config: Any) -> Any:
    """A config tree as plain values, for YAML."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Path):
        return str(config)
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def from_dict(values: dict[str, Any], kind: type = RunConfig, where: str = "") -> Any:
    """The inverse of `to_dict`. An unknown key or a value of the wrong type is a ConfigError that names it."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    types_of = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"unknown key '{where}{unknown[0]}'; known here: {', '.join(known)}")
    arguments = {name: _value(value, types_of[name], where + name) for name, value in values.items()}
    return kind(**arguments)


def _value(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"'{where}' must hold a table of settings, got {value!r}")
        return from_dict(value, typing.cast(type, kind), where + ".")
    if kind is Path:
        return Path(value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"'{where}' must be one of {', '.join(typing.get_args(kind))}; got {value!r}")
        return value
    if typing.get_origin(kind) is dict:
        return dict(value)
    if isinstance(kind, types.UnionType):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"'{where}' must be {kind.__name__}, got {value!r}")
    return value


def save(config: RunConfig, path: Path) -> None:
    """Write the config as YAML."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load(path: Path) -> RunConfig:
    """Read a saved config; ConfigError where the file is not one."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not a readable config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' is not a config of a run")
    return from_dict(values)


def check(config: RunConfig) -> None:
    """Raise ConfigError for values that no stage could work with."""

    def positive(where: str, value: float) -> None:
        if not value > 0:
            raise ConfigError(f"'{where}' must be above 0, got {value}")

    for name in ("vision", "embedder", "sft", "grpo"):
        settings: Optimisation = getattr(config, name).optimisation
        positive(f"{name}.optimisation.steps", settings.steps)
        positive(f"{name}.optimisation.learning_rate", settings.learning_rate)
    positive("sft.batch", config.sft.batch)
    positive("embedder.batch", config.embedder.batch)
    positive("grpo.turns", config.grpo.turns)
    positive("evaluation.turns", config.evaluation.turns)
    positive("checkpoint_every", config.checkpoint_every)
    if config.grpo.group < 2:
        raise ConfigError(f"'grpo.group' must be at least 2 for an advantage within the group, got {config.grpo.group}")
    if not 0 < config.sft.matched < 1:
        raise ConfigError(f"'sft.matched' must lie between 0 and 1, got {config.sft.matched}")

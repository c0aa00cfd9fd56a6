"""All settings of a run in one typed tree, and the way from the command line and back to disk.

Each stage's settings live beside the stage; this module only puts them together. A preset (`vsr1.presets`) is a complete
tree; flags change single fields; the result is saved with the run as `config.yaml` and loads back to the same object.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vsr1.data.vocabulary import ATTRIBUTES, canonical_rewrite, values
from vsr1.data.world import WorldConfig
from vsr1.errors import ConfigError
from vsr1.eval.evaluate import EvaluationSettings
from vsr1.models.tiny import TinyConfig
from vsr1.train.embedder import EmbedderTraining
from vsr1.train.grpo import GrpoTraining
from vsr1.train.rewards import reward_function
from vsr1.train.sft import SftTraining
from vsr1.train.vision import VisionTraining

WORLD_STAGES = ("world", "embedder", "sft", "grpo", "eval")
DATASET_STAGES = ("data", "sft", "grpo", "eval")


@dataclass
class JobConfig:
    """What all kinds of runs have. Times in seconds; `workers` 0 means one a core."""

    run: Path = Path("runs/tiny")
    """the folder everything is written to"""
    seed: int = 1
    workers: int = 0
    device: str = "auto"
    """where the models live: "cpu", "cuda", "cuda:1" .. ("auto": a GPU if torch sees one)"""
    checkpoint_every: float = 30.0
    stage: str = "all"
    sft: SftTraining = field(default_factory=SftTraining)
    grpo: GrpoTraining = field(default_factory=GrpoTraining)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


@dataclass
class RunConfig(JobConfig):
    """A run on the rendered world, which makes everything itself. Times in seconds; `workers` 0 means one a core."""

    stage: Literal["world", "embedder", "sft", "grpo", "eval", "all"] = "all"
    """stop after this stage (every stage brings its predecessors along)"""
    world: WorldConfig = field(default_factory=WorldConfig)
    model: TinyConfig = field(default_factory=TinyConfig)
    vision: VisionTraining = field(default_factory=VisionTraining)
    embedder: EmbedderTraining = field(default_factory=EmbedderTraining)


@dataclass
class DatasetConfig(JobConfig):
    """A run on an annotated data set, whose files `vsr1 data build` or `vsr1 data import` has made below `root`."""

    stage: Literal["data", "sft", "grpo", "eval", "all"] = "all"
    """stop after this stage (every stage brings its predecessors along)"""
    dataset: str = "charades"
    """what the public files and splits are called: charades, didemo or activitynet"""
    root: Path = Path("data/charades")
    """where the data set lies (docs/datasets.md)"""
    policy: str = "Qwen/Qwen3-VL-2B-Instruct"
    """the model that stage 1 starts from: a folder, or a repository of the Hub"""
    embedder: str = "Qwen/Qwen3-VL-Embedding-2B"
    """the frozen embedder, the one that made the vectors below `root`"""
    protocol_from: str = ""
    """an SFT file whose system turn the policy is asked with (default: that of the SFT file it learns from)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the policy and the embedder; "auto": bfloat16 on a GPU, float32 on the CPU"""
    max_steps: int = 0
    """end each training stage after so many steps (0: after as many as it is set to)"""
    checkpointing: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    max_pixels: int = 0
    """most pixels of a frame (0: as many as the policy's folder says)"""
    feature_cache: int = 1024
    """MiB of videos' features to be kept, so that a video shown again is not encoded again"""
    hold_out: int = 200
    """queries kept from training to calibrate and watch it, where the data set has no validation split"""


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
    for name, field_ in known.items():
        if name not in values and field_.default is MISSING and field_.default_factory is MISSING:
            raise ConfigError(f"'{where}{name}' is missing")
    arguments = {name: _value(value, types_of[name], where + name) for name, value in values.items()}
    return kind(**arguments)


def _value(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"'{where}' must hold a table of settings, got {value!r}")
        return from_dict(value, typing.cast(type, kind), where + ".")
    if kind is Path:
        if not isinstance(value, str):
            raise ConfigError(f"'{where}' must be a path, got {value!r}")
        return Path(value)
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            raise ConfigError(f"'{where}' must be one of {', '.join(typing.get_args(kind))}; got {value!r}")
        return value
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"'{where}' must hold a table, got {value!r}")
        key_kind, value_kind = typing.get_args(kind)
        return {_value(k, key_kind, where): _value(v, value_kind, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, types.UnionType):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"'{where}' must be {kind.__name__}, got {value!r}")
    return value


def save(config: JobConfig, path: Path) -> None:
    """Write the config as YAML."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False))


def load(path: Path) -> RunConfig | DatasetConfig:
    """Read a saved config, of the rendered world or of a data set; ConfigError where the file is not one."""
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not a readable config: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' is not a config of a run")
    try:
        return from_dict(values, DatasetConfig if "dataset" in values else RunConfig)
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from error


def of_run(folder: str | Path) -> RunConfig | DatasetConfig:
    """The settings of a run folder; ConfigError where it is none."""
    saved = Path(folder) / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"'{folder}' is no run folder (no config.yaml in it)")
    return load(saved)


_STAGES_TRAINED = ("vision", "embedder", "sft", "grpo")
_ABOVE_ZERO = (
    "checkpoint_every",
    *(f"{stage}.optimisation.{key}" for stage in _STAGES_TRAINED for key in ("steps", "learning_rate", "clip")),
    *(f"model.{one.name}" for one in dataclasses.fields(TinyConfig)),
    *("vision.videos", "vision.pairs", "embedder.batch", "embedder.sentences", "embedder.temperature"),
    *("sft.batch", "sft.head_learning_rate", "sft.confusions", "sft.refine_rows", "sft.temperature", "sft.pack_tokens"),
    *(
        "grpo.queries",
        "grpo.turns",
        "grpo.max_tokens",
        "grpo.head_learning_rate",
        "grpo.sampling_temperature",
        "grpo.temperature",
        "grpo.updates",
        "grpo.pack_tokens",
        "grpo.rows",
    ),
    *("evaluation.turns", "evaluation.max_tokens", "evaluation.resamples", "evaluation.rows", "evaluation.pack_tokens"),
)
_SHARES = (
    *(f"{stage}.optimisation.final_fraction" for stage in _STAGES_TRAINED),
    *("embedder.focus_from", "embedder.drop", "embedder.keywords", "sft.refine_from", "sft.contrast_from"),
    *("grpo.bootstrapped", "grpo.curriculum", "grpo.clip_low"),
)
_NOT_BELOW_ZERO = (
    *("seed", "workers", "evaluation.queries", "evaluation.calibration", "evaluation.ablated"),
    *("vision.shape_weight", "embedder.backgrounds"),
    *("grpo.sigma", "grpo.beta", "grpo.latent_beta", "grpo.latent_weight", "grpo.contrast_weight", "grpo.clip_high"),
    *("grpo.distillation_weight", "grpo.validate_every", "grpo.validation_queries", "grpo.lora_rank"),
    *("max_steps", "hold_out", "max_pixels", "feature_cache", "sft.negatives", "sft.lora_rank"),
    *("sft.answer_weight", "sft.mark_weight", "sft.distillation_weight", "sft.contrast_weight"),
    *(f"{stage}.optimisation.{key}" for stage in _STAGES_TRAINED for key in ("warmup", "weight_decay", "muon")),
)


def check(config: JobConfig) -> None:
    """Raise ConfigError for values that a stage could not work with, before the first one starts."""

    def need(where: str, wish: str, good: Callable[[Any], bool]) -> None:
        value = _found(config, where)
        if value is not None and not good(value):  # a kind of run that lacks the setting cannot have it wrong
            raise ConfigError(f"'{where}' must be {wish}, got {value}")

    for where in _ABOVE_ZERO:
        need(where, "above 0", lambda value: 0 < value < math.inf)
    for where in _NOT_BELOW_ZERO:
        need(where, "0 or more", lambda value: 0 <= value < math.inf)
    for where in _SHARES:
        need(where, "from 0 to 1", lambda value: 0 <= value <= 1)
    need("grpo.group", "at least 2 for an advantage within the group", lambda value: value >= 2)
    need("grpo.top_p", "above 0 and at most 1", lambda value: 0 < value <= 1)
    if config.grpo.speaker == "vllm":
        need("grpo.vllm_weights", "a folder that the vLLM server sees too", bool)
    for name, weight in config.grpo.rewards.items():
        if not math.isfinite(weight):
            raise ConfigError(f"'grpo.rewards' must be finite numbers, got {weight} for '{name}'")
        try:
            reward_function(name)
        except ConfigError as error:
            raise ConfigError(f"'grpo.rewards': {error}") from error
    if isinstance(config, RunConfig):
        _check_world(config, need)
    else:
        need("grpo.videos", "0: the whole corpus of a data set is searched", lambda value: value == 0)


def _found(config: JobConfig, where: str) -> Any:
    """The setting at a dotted path, or None where this kind of run has none such."""
    value: Any = config
    for name in where.split("."):
        value = getattr(value, name, None)
    return value


def _check_world(config: RunConfig, need: Callable[[str, str, Callable[[Any], bool]], None]) -> None:
    model, world, sft = config.model, config.world, config.sft
    need("model.hidden", "a multiple of 8 model.heads", lambda value: value % (8 * model.heads) == 0)
    need("model.vision_hidden", "a multiple of 4 vision_heads", lambda value: value % (4 * model.vision_heads) == 0)
    need("model.pixels", "a multiple of patch x merge", lambda value: value % (model.patch * model.merge) == 0)
    words = len(canonical_rewrite({name: values(name)[0] for name in ATTRIBUTES}).split())
    need("model.soft_tokens", f"{words}, one for each canonical word", lambda value: value == words)
    need("sft.matched", "between 0 and 1", lambda value: 0 < value < 1)
    need("sft.batch", "enough for a rejected row", lambda value: math.ceil(sft.matched * value) < value)
    need("sft.negatives", "0: the rendered world lists no hard negatives", lambda value: value == 0)
    need("grpo.videos", "above 0", lambda value: value > 0)
    groups = -(-world.train_videos // world.duplicates)
    first = round(groups * world.embedder_fraction) * world.duplicates
    need("world.embedder_fraction", "above 0: both folds need videos", lambda _: first > 0)
    if world.embedder_fraction == 1:
        need("world.embedder_fraction", "below 1: both folds need videos", lambda _: False)
    need("world.train_videos", "enough for two videos in the policy's fold", lambda value: value - first >= 2)

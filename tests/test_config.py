"""Settings: every preset survives the disk, and whatever is wrong is named by its dotted key before anything runs."""

from __future__ import annotations

import dataclasses
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from vsr1 import config as configuration
from vsr1.config import RunConfig, check, from_dict, load, save, to_dict
from vsr1.errors import ConfigError
from vsr1.presets import names, preset


def changed(dotted: str, value: Any, name: str = "tiny") -> dict[str, Any]:
    """A preset as plain values with one key changed (or added)."""
    values = to_dict(preset(name))
    *path, last = dotted.split(".")
    reduce(lambda table, key: table[key], path, values)[last] = value
    return values


@pytest.mark.parametrize("name", names())
def test_every_preset_is_valid_and_survives_the_disk(name: str, tmp_path: Path) -> None:
    before = preset(name)
    check(before)
    save(before, tmp_path / "config.yaml")
    after = load(tmp_path / "config.yaml")
    assert after == before
    assert isinstance(after.run, Path)
    assert after.grpo.rewards == before.grpo.rewards


def test_changed_settings_survive_the_disk(tmp_path: Path) -> None:
    before = preset("quick")
    before.sft.optimisation.learning_rate = 3e-5  # YAML 1.1 reads 3e-05 as a string
    before.grpo.rewards = {"answer": 1.0}
    before.run = tmp_path / "a folder with spaces: and a colon"
    before = dataclasses.replace(before, world=dataclasses.replace(before.world, fps=4.0))
    save(before, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == before


def test_a_preset_is_a_fresh_copy() -> None:
    preset("tiny").grpo.rewards["found"] = 0.0
    assert preset("tiny").grpo.rewards["found"] > 0


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'enormous'.*tiny.*quick.*charades.*activitynet-4b"):
        preset("enormous")


@pytest.mark.parametrize("memory", [24, 80])
@pytest.mark.parametrize("name", ["charades", "didemo-4b", "activitynet"])
def test_recipes_of_data_sets_are_valid_and_survive_the_disk(name: str, memory: int, tmp_path: Path) -> None:
    ours, theirs = (preset(name, published=published, memory=memory) for published in (False, True))
    for one in (ours, theirs):
        check(one)
        save(one, tmp_path / "config.yaml")
        assert load(tmp_path / "config.yaml") == one
    assert (ours.sft.negatives, theirs.sft.negatives) == (0, 24)
    assert bool(ours.grpo.lora_rank) == (memory == 24 or name.endswith("4b"))


def test_the_rendered_world_has_no_published_recipe() -> None:
    with pytest.raises(ConfigError, match="--published"):
        preset("tiny", published=True)


def test_missing_keys_take_their_defaults() -> None:
    assert from_dict({"seed": 7}) == dataclasses.replace(RunConfig(), seed=7)


@pytest.mark.parametrize("key", ["colour", "sft.momentum", "grpo.optimisation.step", "world.videos"])
def test_an_unknown_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
        from_dict(changed(key, 1))


BAD_TYPES = [
    ("seed", "one"),
    ("seed", 1.5),
    ("seed", True),
    ("seed", None),
    ("run", 3),
    ("checkpoint_every", "often"),
    ("checkpoint_every", True),
    ("world", 5),
    ("world.pixels", "64"),
    ("sft.optimisation", [1, 2]),
    ("sft.optimisation.learning_rate", "fast"),
    ("grpo.rewards", ["answer"]),
    ("grpo.rewards", {"answer": "much"}),
    ("grpo.rewards", {1: 1.0}),
    ("evaluation.queries", [500]),
]


@pytest.mark.parametrize(("key", "value"), BAD_TYPES, ids=[f"{key}={value}" for key, value in BAD_TYPES])
def test_a_value_of_the_wrong_type_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}[.1a-z]*' must"):
        from_dict(changed(key, value))


def test_a_table_that_lacks_a_needed_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'sft\.optimisation\.steps' is missing"):
        from_dict({"sft": {"optimisation": {"learning_rate": 1e-3}}})


@pytest.mark.parametrize(("key", "value"), [("stage", "dessert"), ("stage", 3), ("grpo.loss_type", "ppo")])
def test_a_bad_choice_is_named_with_the_choices(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}' must be one of .*grpo"):
        from_dict(changed(key, value))


OUT_OF_RANGE = [
    ("seed", -1),
    ("workers", -2),
    ("checkpoint_every", 0.0),
    ("vision.optimisation.steps", 0),
    ("vision.videos", 0),
    ("vision.pairs", 0),
    ("embedder.optimisation.learning_rate", -1e-3),
    ("embedder.optimisation.learning_rate", float("nan")),
    ("embedder.optimisation.learning_rate", float("inf")),
    ("embedder.batch", 0),
    ("embedder.sentences", 0),
    ("embedder.temperature", 0.0),
    ("sft.optimisation.clip", 0.0),
    ("sft.optimisation.warmup", -1),
    ("sft.optimisation.weight_decay", -0.1),
    ("sft.optimisation.weight_decay", float("inf")),
    ("sft.optimisation.muon", -1.0),
    ("sft.head_learning_rate", 0.0),
    ("sft.batch", 0),
    ("sft.batch", 1),
    ("sft.matched", 0.0),
    ("sft.matched", 1.0),
    ("sft.confusions", 0),
    ("sft.refine_rows", 0),
    ("sft.temperature", 0.0),
    ("grpo.videos", 0),
    ("grpo.queries", 0),
    ("grpo.group", 1),
    ("grpo.max_tokens", 0),
    ("grpo.bootstrapped", 1.5),
    ("grpo.turns", 0),
    ("grpo.head_learning_rate", 0.0),
    ("grpo.sampling_temperature", 0.0),
    ("grpo.sigma", -0.1),
    ("grpo.temperature", 0.0),
    ("grpo.rewards", {"kindness": 1.0}),
    ("grpo.rewards", {"answer": float("nan")}),
    ("grpo.clip_low", 1.5),
    ("grpo.clip_high", -0.1),
    ("grpo.beta", -0.1),
    ("grpo.latent_weight", -1.0),
    ("sft.answer_weight", -1.0),
    ("sft.mark_weight", -1.0),
    ("sft.distillation_weight", -1.0),
    ("sft.contrast_weight", float("nan")),
    ("model.hidden", 0),
    ("model.hidden", 130),
    ("model.vision_hidden", 66),
    ("model.pixels", 65),
    ("model.soft_tokens", 4),
    ("grpo.updates", 0),
    ("grpo.pack_tokens", 0),
    ("grpo.curriculum", 1.5),
    ("grpo.top_p", 0.0),
    ("grpo.top_p", 1.5),
    ("grpo.contrast_weight", -1.0),
    ("grpo.validate_every", -1),
    ("grpo.validation_queries", -1),
    ("grpo.lora_rank", -1),
    ("sft.optimisation.final_fraction", -0.1),
    ("sft.refine_from", 1.5),
    ("sft.contrast_from", float("nan")),
    ("embedder.focus_from", -0.5),
    ("embedder.drop", 1.5),
    ("embedder.keywords", -0.1),
    ("embedder.backgrounds", -1),
    ("vision.shape_weight", -1.0),
    ("evaluation.calibration", -1),
    ("evaluation.turns", 0),
    ("evaluation.max_tokens", 0),
    ("evaluation.queries", -1),
    ("evaluation.resamples", 0),
    ("world.pixels", 7),
    ("world.rare_fraction", 1.5),
    ("world.train_videos", 4),
    ("world.embedder_fraction", 0.0),
    ("world.embedder_fraction", 1.0),
]


def test_a_vllm_speaker_needs_a_folder_for_the_weights() -> None:
    config = preset("tiny")
    config.grpo.speaker = "vllm"
    with pytest.raises(ConfigError, match=r"'grpo\.vllm_weights'.*folder"):
        check(config)
    config.grpo.vllm_weights = "shared"
    check(config)


@pytest.mark.parametrize(("key", "value"), OUT_OF_RANGE, ids=[f"{key}={value}" for key, value in OUT_OF_RANGE])
def test_a_value_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"'{key}'.*{value if isinstance(value, int) else ''}"):
        check(from_dict(changed(key, value)))


@pytest.mark.parametrize(
    "text", ["", "just words", "- a\n- list\n", "seed: [1\n", "\x00\x01", "seed: !!python/object:os.system {}\n"]
)
def test_a_file_that_is_no_config_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(path)


def test_a_bad_key_in_a_file_names_the_file_and_the_key(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("sft:\n  momentum: 0.9\n")
    with pytest.raises(ConfigError, match=r"config\.yaml.*unknown key 'sft\.momentum'"):
        load(path)


def test_bytes_that_are_no_text_are_no_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(path)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        configuration.load(tmp_path / "none" / "config.yaml")

"""`vsr1 plan` and what it computes: what fits, what is proposed where it does not, and how plans follow their numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vsr1 import cli, planning, presets
from vsr1.errors import ConfigError
from vsr1.models.shape import SHAPES
from vsr1.models.vision import VideoSettings
from vsr1.presets import MEMORY
from vsr1.train import cost, memory
from vsr1.train.cost import GPUS, Clock
from vsr1.train.estimate import Plan, estimate
from vsr1.train.memory import GIB, Models
from vsr1.train.work import VideoTokens, Work

DOCS = Path(__file__).parents[2] / "docs" / "recipes.md"
MODELS = Models(SHAPES["2b"], SHAPES["embedding-2b"])


def plan(gpu: str = "h100-80", size: str = "2b", preset: str = "charades", **changed: Any) -> Plan:
    return estimate(SHAPES[size], SHAPES["embedding-2b"], planning.work_of(preset, **changed), GPUS[gpu])


def item(work: Work, phase: str, name: str) -> float:
    return sum(one.bytes for one in memory.phases(MODELS, work) if (one.phase, one.name) == (phase, name))


def test_the_table_in_the_docs_is_the_one_that_is_computed() -> None:
    begin, end = planning.MARKS
    shown = DOCS.read_text().split(begin)[1].split(end)[0].strip()
    assert shown == planning.markdown(), "vsr1 plan --write docs/recipes.md"


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("size", planning.SIZES)
@pytest.mark.parametrize("preset", planning.PRESETS)
def test_recipes_fit_what_they_are_made_for(preset: str, size: str, memory: int) -> None:
    name = preset if size == "2b" else f"{preset}-{size}"
    for gpu in (gpu for gpu in GPUS.values() if planning._room(gpu) == memory):
        for published in (False, True):
            work = planning.work_of(name, memory=memory, published=published)
            assert estimate(SHAPES[size], SHAPES["embedding-2b"], work, gpu).fits, gpu.title


def test_one_gpu_indexes_and_evaluates_however_many_train() -> None:
    alone, eight = plan(), plan(gpus=8, cores=8 * 16)
    for phase in ("index", "eval"):
        assert eight.seconds[phase] == pytest.approx(alone.seconds[phase])
    for phase in ("sft", "grpo"):
        assert eight.seconds[phase] < alone.seconds[phase]


def test_the_plan_is_of_the_recipe() -> None:
    recipe = presets.dataset("didemo", "2b", published=True, memory=24)
    work = planning.work_of("didemo", memory=24, published=True)
    assert (work.lora_rank, work.group, work.turns, work.pack) == (presets.LORA_RANK, 8, 1, recipe.grpo.pack_tokens)
    assert (work.sft_rows, work.sft_steps, work.sft_refined) == (4, 500, 1.0)
    assert (work.grpo_queries, work.grpo_steps, work.longest_reply) == (3, 6500, 768)
    assert work.longest.of_pair <= 96 < planning.work_of("didemo").longest.of_pair


def test_frames_become_tokens_as_the_sampler_and_the_resizer_say() -> None:
    settings = VideoSettings(fps=1.0, max_frames=64, min_pixels=128 * 28 * 28, max_pixels=256 * 28 * 28)
    assert VideoTokens.of(settings, 31.4, (480, 640)) == VideoTokens(pairs=16, of_pair=192)
    assert VideoTokens.of(settings, 500.0, (480, 640)).pairs == 32
    assert VideoTokens.of(settings, 0.4, (480, 640)).visual == 192


def test_half_precision_training_takes_eighteen_bytes_a_weight() -> None:
    held = dict(memory.held(MODELS, planning.work_of("charades")))
    learning = MODELS.policy.text.parameters
    head = MODELS.head
    assert held["gradients"] == 4 * (learning + head)
    assert held["optimizer state"] == 8 * (learning + head)
    assert held["float32 weights"] == 4 * learning
    assert held["policy"] == 2 * MODELS.policy.parameters + 4 * head


def test_adapters_need_no_reference_and_hardly_any_state() -> None:
    work = planning.work_of("charades")
    assert item(work, "grpo pass", "reference") > 3 * GIB
    adapted = replace(work, lora_rank=32)
    assert item(adapted, "grpo pass", "reference") == 0
    assert item(adapted, "grpo pass", "optimizer state") < item(work, "grpo pass", "optimizer state") / 20


def test_checkpointing_saves_memory_and_costs_time() -> None:
    work = planning.work_of("charades")
    kept = replace(work, checkpointing=False)
    assert item(kept, "sft pass", "activations") > 4 * item(work, "sft pass", "activations")
    phases = [cost.totals(cost.all_phases(MODELS, one, GPUS["h100-80"])) for one in (work, kept)]
    assert phases[0]["sft"] > phases[1]["sft"]


def test_soft_tokens_of_branched_rows_copy_their_reply_only() -> None:
    work = planning.work_of("charades")
    name = "soft tokens: keys and values"
    copied, branched = item(work, "sft pass", name), item(replace(work, sft_branched=True), "sft pass", name)
    assert copied / branched == pytest.approx((7 * work.longest_row + 28) / (7 * work.longest_reply + 28))


def test_reading_prompts_in_parts_takes_less() -> None:
    work = planning.work_of("charades")
    parts = replace(work, read_pack=2 * work.longest_prompt)
    ratio = item(work, "grpo rollout", "reading prompts") / item(parts, "grpo rollout", "reading prompts")
    assert ratio == pytest.approx(max(map(work.most_read, range(work.turns))) / 2, rel=0.01)


def test_more_gpus_share_the_work_and_not_the_weights() -> None:
    alone, many = plan(gpus=1, cores=16), plan(gpus=8, cores=128)
    assert many.seconds["grpo"] < alone.seconds["grpo"]
    assert many.memory["optimizer step"] == alone.memory["optimizer step"]


def test_videos_that_are_still_at_hand_are_not_encoded_again() -> None:
    work = planning.work_of("charades", cache_bytes=100)
    assert work.misses(500, 50, 10.0) == pytest.approx(50 + 450 * 0.8)
    assert work.misses(30, 50, 10.0) == 30
    assert replace(work, cache_bytes=500).misses(500, 50, 10.0) == 50


def test_small_passes_take_as_long_as_their_launch_and_large_ones_as_their_products() -> None:
    clock, text = Clock(MODELS, planning.work_of("charades"), GPUS["h100-80"]), MODELS.policy.text
    assert clock.read(text, 1, 1) == pytest.approx(text.layers * cost.LAUNCH)
    assert clock.read(text, 2e5, 0) == pytest.approx(clock.products(text.flops(2e5, 0)))
    assert clock.read(text, 4e5, 0) == pytest.approx(2 * clock.read(text, 2e5, 0))


@pytest.mark.parametrize(("gpu", "size"), [("3090-24", "2b"), ("a6000-48", "4b"), ("h100-80", "4b")])
def test_what_is_proposed_fits(gpu: str, size: str) -> None:
    asked = plan(gpu, size)
    assert not asked.fits
    assert asked.changes
    assert asked.fitting is not None
    proposed = estimate(SHAPES[size], SHAPES["embedding-2b"], asked.fitting, GPUS[gpu])
    assert proposed.fits
    assert proposed.changes == []
    assert proposed.fitting == asked.fitting


def test_what_no_change_can_make_fit_is_said() -> None:
    asked = estimate(SHAPES["4b"], SHAPES["4b"], planning.work_of("charades"), replace(GPUS["3090-24"], memory=12.0))
    assert asked.fitting is None
    assert f"LoRA of rank {32}" in asked.changes
    assert "take larger GPUs" in planning._verdict(asked, None)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "plan.json"
    flags = [
        "--preset",
        "didemo",
        "--gpu",
        "l40s-48",
        "--lora",
        "16",
        "--rows",
        "4",
        "--explain",
        "--json",
        str(written),
    ]
    assert cli.main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    for expected in ("LoRA of rank 16", "didemo", "prompts' keys", "assumed:", "it fits"):
        assert expected in said
    values = json.loads(written.read_text())
    assert values["fits"] is True
    assert values["work"]["decoded_rows"] == 4
    assert values["peak"] == max(values["memory"].values())


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--pack 2048", "pack", 2048),
        ("--pack 2048", "sft_pack", 2048),
        ("--pack 2048", "read_pack", 2048),
        ("--no-checkpointing", "checkpointing", False),
        ("--gpus 4", "gpus", 4),
        ("--cores 3", "cores", 3),
        ("--rows 4", "decoded_rows", 4),
        ("--lora 5", "lora_rank", 5),
        ("--published", "grpo_steps", 6500),
    ],
)
def test_every_flag_reaches_the_recipe(flags: str, field: str, value: Any, tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    assert cli.main(["plan", *flags.split(), "--json", str(written)]) == 0
    assert json.loads(written.read_text())["work"][field] == value != getattr(planning.work_of("charades"), field)


def test_shapes_come_from_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.train.planned import configuration

    (tmp_path / "config.json").write_text(json.dumps(configuration(SHAPES["4b"]).to_dict()))
    found: list[Any] = []
    for flags in (["--size", "4b"], ["--size", "4b", "--policy", str(tmp_path)]):
        assert cli.main(["plan", *flags, "--json", str(tmp_path / "plan.json")]) == 0
        found.append(json.loads((tmp_path / "plan.json").read_text()))
    assert found[0] == found[1]
    assert str(tmp_path) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gpu", "abacus"], "invalid choice"),
        (["--gpus", "0"], "--gpus must be at least 1"),
        (["--policy", "nowhere"], "nowhere/config.json"),
        (["--json", "nowhere/plan.json"], "there is no folder 'nowhere'"),
        (["--write", "nowhere.md"], "cannot be read"),
    ],
)
def test_mistakes_end_in_one_line(flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *flags]) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.err.count("\n") == 1


def test_the_table_goes_between_its_marks_only(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before <!-- plan -->old<!-- /plan --> behind")
    assert cli.main(["plan", "--write", str(page)]) == 0
    begin, end = planning.MARKS
    assert page.read_text() == f"before {begin}\n{planning.markdown()}\n{end} behind"
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="no place for the table"):
        planning._write(page)

"""A run on an annotated data set, through the command that people give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.train import datasets
from vsr1 import cli
from vsr1.agent import protocol
from vsr1.config import DatasetConfig, load
from vsr1.data.layout import Layout
from vsr1.data.world import World
from vsr1.dataset_job import DatasetJob
from vsr1.engine import Engine
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.train import parallel
from vsr1.train.monitor import Monitor


@pytest.fixture(scope="module")
def models(tiny_embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tiny_embedder.save_pretrained(folder / "embedder")
    Policy.tiny(tiny_embedder, soft_tokens=8).save_pretrained(folder / "policy")
    return folder


@pytest.fixture(scope="module")
def layout(world: World, tiny_embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return datasets.write(tmp_path_factory.mktemp("data"), world, tiny_embedder)


def flags(layout: Layout, models: Path, run: Path) -> list[str]:
    few = "--sft.batch 4 --grpo.queries 2 --grpo.group 2 --grpo.max-tokens 24 --evaluation.max-tokens 24"
    return [
        *("train", "--preset", "charades", "--root", str(layout.root), "--run", str(run), "--max-steps", "2"),
        *("--policy", str(models / "policy"), "--embedder", str(models / "embedder"), *few.split()),
    ]


@pytest.fixture(scope="module")
def run(layout: Layout, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert cli.main(flags(layout, models, folder)) == 0
    return folder


def test_all_stages_run(run: Path, layout: Layout, models: Path) -> None:
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [max(one["step"] for one in steps if one.get("stage") == stage) for stage in ("sft", "grpo")] == [1, 1]
    figures = json.loads((run / "eval.json").read_text())
    assert (figures["dataset"], figures["split"], figures["queries"]) == ("charades", "test", 4)
    assert figures["policy"] == str(models / "policy")
    assert len((run / "trajectories.jsonl").read_text().splitlines()) == 4
    assert (run / "report.html").is_file()


def test_the_policy_adopts_the_system_turn_it_learns_from(run: Path) -> None:
    for stage in ("sft", "grpo"):
        assert Policy.from_pretrained(run / "models" / f"policy-{stage}").settings.system == datasets.SYSTEM


def test_another_protocol_can_be_adopted(layout: Layout, models: Path, tmp_path: Path) -> None:
    rows = json.loads(layout.sft.read_text())
    for row in rows:
        row["messages"][0]["content"] = "Look well."
    (tmp_path / "other.json").write_text(json.dumps(rows))
    config = cli.parse_train([*flags(layout, models, tmp_path)[1:], "--protocol-from", str(tmp_path / "other.json")])
    with Monitor(tmp_path) as monitor:
        job = DatasetJob(config, monitor, torch.device("cpu"))
        assert job.start(job.embedder()).settings.system == "Look well."


def test_the_policy_keeps_a_tower_of_its_own(run: Path, models: Path) -> None:
    config = load(run / "config.yaml")
    assert isinstance(config, DatasetConfig)
    with Monitor(run) as monitor:
        job = DatasetJob(config, monitor, torch.device("cpu"))
        embedder = job.embedder()
        policy = job.start(embedder)
    assert policy.videos is not embedder.videos
    assert policy.videos.visual is not embedder.videos.visual
    assert policy.model.model.visual is policy.videos.visual


def test_held_out_queries_are_not_trained_on(layout: Layout, models: Path, tmp_path: Path, world: World) -> None:
    config = cli.parse_train([*flags(layout, models, tmp_path / "run")[1:], "--hold-out", "3"])
    with Monitor(tmp_path) as monitor:
        job = DatasetJob(config, monitor, torch.device("cpu"))
        kept, trained = job.moments("validation"), job.moments("grpo")
        embedder = job.embedder()
        policy = job.start(embedder)
        rows = job.source(policy, embedder, job.shelf("sft", embedder, policy)).rows
    asked = {one.query_id for one in datasets.moments(world, "train")}
    assert {one.query_id for one in (*kept, *trained)} == asked
    assert len(kept) + len(trained) == len(asked)  # augmented rows are no queries of their own
    assert 0 < len(kept) <= len(asked) // 5
    outside = {one.video_id for one in kept}
    assert outside.isdisjoint(one.video_id for one in trained)
    assert outside.isdisjoint(row.video_id for row in rows)


def test_a_second_call_does_nothing_again(run: Path, layout: Layout, models: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert cli.main(flags(layout, models, run)) == 0
    changed = {path.name for path, stamp in before.items() if path.stat().st_mtime_ns != stamp}
    assert changed <= {"seconds.json", "log.jsonl"}


def test_the_run_answers_questions(run: Path, world: World) -> None:
    found = Engine.open_run(run).ask(datasets.moments(world, "test")[0].text, turns=1)
    assert found.turns[0].video_id in {scene.video_id for scene in world.scenes("test")}


@pytest.mark.parametrize("what", ["sft", "corpus", "annotations"])
def test_what_is_missing_is_said_before_anything_starts(
    layout: Layout, models: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for path in layout.root.iterdir():
        if not (what == "sft" and path.name == "sft_data") and not (what == "annotations" and "raw" in path.name):
            (root / path.name).symlink_to(path)
    if what == "corpus":
        (root / "test").unlink()
    other = Layout(root)
    lacking = {"sft": other.sft, "corpus": other.corpus("test"), "annotations": other.annotations("train")}[what]
    assert cli.main(flags(other, models, tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert str(lacking) in said and "vsr1 data build charades" in said
    assert not (tmp_path / "run").exists()  # the corrected command may take its name


def test_settings_of_a_data_set_survive_the_disk(run: Path, layout: Layout) -> None:
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert values["root"] == str(layout.root) and values["max_steps"] == 2
    assert load(run / "config.yaml").sft.batch == 4


@pytest.mark.parametrize("there", [True, False])
def test_a_validation_split_is_watched_where_there_is_one(
    layout: Layout, models: Path, tmp_path: Path, world: World, there: bool
) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for path in layout.root.iterdir():
        (root / path.name).symlink_to(path)
    if there:  # the test split under another name
        (root / "val.jsonl").symlink_to(layout.annotations("test"))
        (root / "val").symlink_to(layout.root / "test")
    given = flags(Layout(root), models, tmp_path / "run")
    given[given.index("charades")] = "didemo"
    with Monitor(tmp_path) as monitor:
        job = DatasetJob(cli.parse_train(given[1:]), monitor, torch.device("cpu"))
        job.run_data()
        kept, trained = job.moments("validation"), job.moments("grpo")
        ids = job.shelf("validation", job.embedder(), job.start(job.embedder())).video_ids
    asked = datasets.moments(world, "train")
    if there:
        assert kept == job.moments("test") and len(trained) == len(asked)
        assert set(ids) == {one.video_id for one in kept}
    else:
        assert len(kept) > 0 and len(kept) + len(trained) == len(asked)
        assert set(ids) == {one.video_id for one in asked}


def measure(layout: Layout, models: Path, run: Path, *more: str) -> int:
    given = ["--policy", str(models / "policy"), "--embedder", str(models / "embedder"), "--max-tokens", "16"]
    return cli.main(["eval", str(layout.root), *given, "--run", str(run), *more])


def test_a_policy_is_measured_without_training(
    layout: Layout, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert measure(layout, models, tmp_path / "own", "--turns", "2") == 0
    assert measure(layout, models, tmp_path / "public", "--turns", "2", "--compat", "public", "--queries", "3") == 0
    own, public = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("own", "public"))
    assert (own["dataset"], own["queries"], own["given"]["queries"], own["corpus_size"]) == ("charades", 4, 4, 4)
    assert (own["loop"]["exclude"], public["loop"]["exclude"]) == (True, False)
    assert (own["loop"]["turns"], public["queries"]) == (2, 3)
    shown = [
        [turn["video_id"] for turn in json.loads(line)["turns"]]
        for line in (tmp_path / "own" / "trajectories.jsonl").read_text().splitlines()
    ]
    assert all(len(set(ids)) == len(ids) for ids in shown)
    page = (tmp_path / "own" / "report.html").read_text()
    assert "no training here" in page and "published" in page
    capsys.readouterr()
    assert cli.main(["eval", str(tmp_path / "own")]) == 0
    assert "4 queries, 0 failed" in capsys.readouterr().out
    assert measure(layout, models, tmp_path / "own") == 2
    assert "exists" in capsys.readouterr().err


def test_a_released_checkpoint_brings_its_embedder(
    layout: Layout, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = tmp_path / "released"
    Policy.from_pretrained(models / "policy").save_pretrained(
        released, layout="public", embedder=Embedder.from_pretrained(models / "embedder")
    )
    asked: list[str] = []
    plain = protocol.prompt

    def heard(*given: Any, **options: Any) -> Any:
        asked.append(options["system"])
        return plain(*given, **options)

    monkeypatch.setattr(protocol, "prompt", heard)
    flags = ["--policy", str(released), "--run", str(tmp_path / "run"), "--max-tokens", "8", "--turns", "1"]
    assert cli.main(["eval", str(layout.root), *flags, "--protocol-from", str(layout.sft)]) == 0
    assert set(asked) == {datasets.SYSTEM}
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["embedder"] == str(released)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--turns", "0"], "--turns must be at least 1"),
        (["--compat", "private"], "invalid choice"),
        (["--preset", "msrvtt"], "known are charades"),
        (["--memory", "7"], "one of 24, 48, 80"),
    ],
)
def test_mistakes_of_measuring_are_one_line(
    layout: Layout, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert measure(layout, models, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_processes_need_a_row_and_a_query_each(
    layout: Layout, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 3)
    assert cli.main(flags(layout, models, tmp_path / "run")) == 2
    assert "'grpo.queries' is 2, and 3 processes share it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert parallel.cores() == 4

"""The world on disk: same seed same bytes, groups that differ in one thing, queries with one answer, resuming."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vsr1.data import world as world_module
from vsr1.data.annotations import read_fig
from vsr1.data.scene import Scene
from vsr1.data.vocabulary import ATTRIBUTES, EVENT_ATTRIBUTES, WORDS, canonical
from vsr1.data.world import FOLDS, SPLITS, World, WorldConfig, build
from vsr1.errors import ConfigError, VideoError, Vsr1Error
from vsr1.video import decode, probe

SMALL = WorldConfig(train_videos=24, validation_videos=6, test_videos=12, pixels=32, workers=1)
RARE = {synonyms[2] for table in WORDS.values() for synonyms in table.values()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "finished"
    build(folder, SMALL, seed=3)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished world that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "world")


@pytest.fixture(scope="module")
def many() -> list[world_module._Placed]:
    """The scenes of a world of the default size; nothing is rendered."""
    return world_module._placed_scenes(WorldConfig(), seed=0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differences(a: Scene, b: Scene) -> list[str]:
    """Every attribute in which two scenes of equal timing differ."""
    assert [(e.start, e.end) for e in a.events] == [(e.start, e.end) for e in b.events]
    found = [name for name in ("background_colour", "texture") if getattr(a, name) != getattr(b, name)]
    for first, second in zip(a.events, b.events, strict=True):
        found += [name for name in EVENT_ATTRIBUTES if getattr(first, name) != getattr(second, name)]
    return found


def test_files_and_mark(finished: Path) -> None:
    names = set(contents(finished))
    videos = {
        f"videos/{split}/{split}-{index:05d}.mp4"
        for split, n in (("train", 24), ("validation", 6), ("test", 12))
        for index in range(n)
    }
    assert names == videos | {"world.json", "scenes.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl"}
    assert json.loads((finished / "world.json").read_text())["seed"] == 3


def test_equal_seed_equal_bytes_on_any_number_of_workers(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_module, "CHUNK", 20)
    build(tmp_path / "again", replace(SMALL, workers=2), seed=3)
    mine, again = contents(finished), contents(tmp_path / "again")
    del mine["world.json"], again["world.json"]  # it records the number of workers
    assert mine == again


def test_other_seed_other_world(finished: Path) -> None:
    other = world_module._placed_scenes(SMALL, seed=4)
    assert [item.scene for item in other if item.split == "test"] != World.open(finished).scenes("test")


def test_videos_are_real_files_of_the_scene(finished: Path) -> None:
    world = World.open(finished)
    for scene in world.scenes("validation"):
        info = probe(world.video_path(scene.video_id))
        assert (info.seconds, info.frames, info.width) == (scene.duration, 2 * scene.duration, 32)
        assert decode(world.video_path(scene.video_id), fps=1).seconds.tolist() == list(range(scene.duration))


def test_open_gives_what_build_gave(finished: Path) -> None:
    built, opened = build(finished, SMALL, seed=3), World.open(finished)
    assert (opened.seed, opened.config, opened.folder) == (3, SMALL, finished)
    for split in SPLITS:
        assert opened.scenes(split) == built.scenes(split)
        assert opened.queries(split) == built.queries(split)


def test_scenes_keep_their_rules(many: list[world_module._Placed]) -> None:
    for item in many:
        scene = item.scene
        assert 12 <= scene.duration <= 16
        assert 2 <= len(scene.events) <= 3
        edges = [0, *(edge for event in scene.events for edge in (event.start, event.end)), scene.duration]
        assert edges == sorted(edges)
        assert all(3 <= event.end - event.start <= 5 for event in scene.events)
    assert any(item.scene.events[0].start > 0 for item in many)
    assert Counter(len(item.scene.events) for item in many).keys() == {2, 3}


def test_near_duplicates_differ_in_exactly_one_attribute(many: list[world_module._Placed]) -> None:
    groups = defaultdict(list)
    for item in many:
        groups[item.split, item.group].append(item)
    varied, places = Counter(), set()
    for members in groups.values():
        assert len(members) == 4
        assert len({item.fold for item in members}) == 1
        found = {tuple(differences(a.scene, b.scene)) for a in members for b in members if a is not b}
        assert len(found) == 1
        [names] = found
        assert len(names) == 1
        varied[names[0]] += 1
        pairs = zip(members[0].scene.events, members[1].scene.events, strict=True)
        places |= {index for index, (first, second) in enumerate(pairs) if first != second}
    assert set(varied) == {"colour", "shape", "motion", "background_colour"}
    assert places == {0, 1, 2}
    assert min(varied.values()) > 0.15 * sum(varied.values())


def test_pairs_may_differ_in_any_attribute() -> None:
    placed = world_module._placed_scenes(replace(SMALL, train_videos=400, duplicates=2), seed=0)
    pairs = zip(placed[0:400:2], placed[1:400:2], strict=True)
    assert {differences(a.scene, b.scene)[0] for a, b in pairs} == set(ATTRIBUTES)


def test_splits_and_folds_part_the_videos(finished: Path) -> None:
    world = World.open(finished)
    names = [scene.video_id for split in SPLITS for scene in world.scenes(split)]
    assert len(names) == len(set(names)) == 42
    embedder, policy = (world.scenes("train", fold) for fold in FOLDS)
    assert [*embedder, *policy] == world.scenes("train")
    assert len(embedder) == 16  # 68 % of six groups of four
    groups = [{world.group(scene.video_id) for scene in scenes} for scenes in (embedder, policy)]
    assert not groups[0] & groups[1]
    assert {query.fold for query in world.queries("test")} == {None}
    assert world.queries("train", "embedder") + world.queries("train", "policy") == world.queries("train")


def test_a_query_names_one_event_of_its_split(finished: Path) -> None:
    world = World.open(finished)
    ids = [query.moment.query_id for split in SPLITS for query in world.queries(split)]
    assert len(ids) == len(set(ids)) > 30
    for split in SPLITS:
        events = [(scene, index) for scene in world.scenes(split) for index in range(len(scene.events))]
        asked = set()
        for query in world.queries(split):
            named = dict(canonical(word) for word in query.moment.text.split() if canonical(word))
            assert named == query.attributes
            assert [(scene, index) for scene, index in events if scene.attributes(index) == named] == [
                (query.scene, query.event)
            ]
            event = query.scene.events[query.event]
            assert (query.moment.start, query.moment.end) == (event.start, event.end)
            assert (query.moment.video_id, query.moment.duration) == (query.scene.video_id, query.scene.duration)
            coarse = dict(canonical(word) for word in query.coarse_text.split() if canonical(word))
            assert coarse == {name: named[name] for name in ("colour", "shape", "motion")}
            asked.add((query.scene.video_id, query.event))
        keys = Counter(tuple(scene.attributes(index).values()) for scene, index in events)
        assert len(asked) == sum(number == 1 for number in keys.values())


def test_annotations_are_fig_files(finished: Path) -> None:
    world = World.open(finished)
    for split in SPLITS:
        assert read_fig(finished / f"{split}.jsonl") == [query.moment for query in world.queries(split)]


def test_rare_words_stay_away_from_the_embedder(finished: Path) -> None:
    world = World.open(finished)

    def rare(queries: list[world_module.WorldQuery]) -> int:
        return sum(word in RARE for query in queries for word in (query.moment.text + " " + query.coarse_text).split())

    assert rare(world.queries("train", "embedder")) == 0
    assert rare(world.queries("train", "policy")) > 0
    assert rare(world.queries("test")) > 0


def test_the_default_world_asks_enough(many: list[world_module._Placed]) -> None:
    scenes = [item.scene for item in many if item.split == "test"]
    keys = Counter(tuple(scene.attributes(index).values()) for scene in scenes for index in range(len(scene.events)))
    assert len(scenes) == 400
    assert sum(number == 1 for number in keys.values()) >= 450


def test_deleted_files_come_back_the_same_and_nothing_else_is_touched(folder: Path) -> None:
    before = contents(folder)
    gone = sorted(folder.glob("videos/*/*3.mp4"))
    kept = folder / "videos/test/test-00000.mp4"
    kept.write_bytes(b"kept")
    for path in gone:
        path.unlink()
    seen: list[tuple[int, int]] = []
    build(folder, SMALL, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(42 - len(gone), 42), (42, 42)]
    assert contents(folder) == before | {"videos/test/test-00000.mp4": b"kept"}


def test_a_build_that_was_cut_short_is_unfinished_and_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "cut"
    real, calls = world_module.encode, []

    def dies(path: Path, pixels: object, fps: float) -> Path:
        calls.append(path)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(path, pixels, fps)

    monkeypatch.setattr(world_module, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        build(target, SMALL, seed=3)
    with pytest.raises(ConfigError, match="no finished world"):
        World.open(target)
    with pytest.raises(ConfigError, match="seed is 3, wanted 4"):
        build(target, SMALL, seed=4)
    build(target, SMALL, seed=3)
    assert len(calls) == 10 + 42 - 9
    assert contents(target) == contents(finished)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_leave_with_a_killed_parent(tmp_path: Path) -> None:
    code = "import sys; from vsr1.data.world import *; build(sys.argv[1], WorldConfig(workers=2), seed=0)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "world")], start_new_session=True) as builder:
        wait_until(lambda: any(tmp_path.rglob("*.mp4")))
        builder.kill()
    # The session's other processes: workers and what multiprocessing starts beside them.
    wait_until(lambda: not alive(builder.pid))


def alive(group: int) -> bool:
    """Whether a process of the group runs; one that only waits to be reaped does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def wait_until(happened: Callable[[], bool], patience: float = 60.0) -> None:
    limit = time.monotonic() + patience
    while not happened():
        assert time.monotonic() < limit, f"waited for {patience:.0f} s in vain"
        time.sleep(0.05)


def test_another_world_is_refused_by_name(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"pixels is 32, wanted 64; rare_fraction is 0.3, wanted 0.5"):
        build(folder, replace(SMALL, pixels=64, rare_fraction=0.5), seed=3)
    with pytest.raises(ConfigError, match="seed is 3, wanted 4"):
        build(folder, SMALL, seed=4)
    build(folder, replace(SMALL, workers=2), seed=3)
    assert contents(folder) == before


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not an empty folder"):
        build(tmp_path, SMALL, seed=3)
    with pytest.raises(ConfigError, match="not an empty folder"):
        build(tmp_path / "thesis.tex", SMALL, seed=3)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "world.json").write_text('{"planet": "earth"}')
    with pytest.raises(ConfigError, match="not the mark of a world"):
        build(tmp_path / "other", SMALL, seed=3)


def test_damaged_marks_and_other_formats(folder: Path) -> None:
    mark = json.loads((folder / "world.json").read_text())
    (folder / "world.json").write_text(json.dumps({**mark, "format": 99}))
    with pytest.raises(ConfigError, match="format 99"):
        World.open(folder)
    with pytest.raises(ConfigError, match="format is 99, wanted 1"):
        build(folder, SMALL, seed=3)
    (folder / "world.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        World.open(folder)


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, pixels: object, fps: float) -> Path:
        raise VideoError(path, "cannot be written: No space left on device")

    monkeypatch.setattr(world_module, "encode", full)
    with pytest.raises(Vsr1Error, match="disk is full"):
        build(tmp_path / "w", SMALL, seed=3)


@pytest.mark.parametrize(
    "change",
    [
        {"train_videos": 0},
        {"pixels": 33},
        {"fps": 0.5},
        {"min_events": 4},
        {"min_seconds": 8},
        {"min_seconds": 17},
        {"duplicates": 9},
        {"rare_fraction": 1.5},
        {"embedder_fraction": -0.1},
        {"workers": -1},
    ],
    ids=str,
)
def test_bad_settings_are_named(change: dict[str, float]) -> None:
    [name] = change
    with pytest.raises(ConfigError, match=name):
        replace(SMALL, **change)


def test_unknown_splits_folds_and_videos(finished: Path) -> None:
    world = World.open(finished)
    with pytest.raises(ValueError, match="split must be one of"):
        world.scenes("dev")
    with pytest.raises(ValueError, match="fold must be one of"):
        world.queries("test", "policy")
    with pytest.raises(KeyError):
        world.video_path("nobody")

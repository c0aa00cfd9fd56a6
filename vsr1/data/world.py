"""The rendered world: thousands of small, really encoded videos whose truth is known, and queries with one answer.

`build` invents scenes from a seed, renders and encodes them on all cores, asks fine queries about their events and
leaves a folder: `videos/<split>/<id>.mp4`, `<split>.jsonl` (FIG annotations), `scenes.jsonl` (the truth) and, last of
all, `world.json`, the mark that it is complete. `World.open` reads such a folder.

Videos come in groups of near-duplicates: the members of a group differ in exactly one attribute of one event or of
the background, and stay in one split and fold. A query names all six attributes of one event and is kept only if no
other event of its split shares them, so it points at one moment of one video. The train split has two folds: videos
and common words for the embedder, videos and rare words for the policy, so that refinement meets words and videos
the embedder has not learnt.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from vsr1.data.annotations import read_rows, write_fig
from vsr1.data.scene import Event, Scene, draw
from vsr1.data.vocabulary import BACKGROUND_ATTRIBUTES, EVENT_ATTRIBUTES, coarse_sentence, sentence, values
from vsr1.errors import ConfigError, VideoError, Vsr1Error
from vsr1.files import write_whole
from vsr1.records import Moment
from vsr1.video.encode import encode

FORMAT: Final = 1
SPLITS: Final = ("train", "validation", "test")
FOLDS: Final = ("embedder", "policy")
MARK: Final = "world.json"
UNFINISHED_MARK: Final = "world.unfinished.json"
CHUNK: Final = 32  # videos a task: a quarter of a second of work, so progress moves and a failure stops soon
SHORTEST_EVENT: Final = 3  # seconds; 1 frame/s must see a beginning, a middle and an end
LONGEST_EVENT: Final = 5
# Where the background differs, every event of a group can be asked for; where one event differs, only that one can.
# With this weight a third of the groups of four differ in the background, and 400 videos give some 500 queries.
BACKGROUND_WEIGHT: Final = 1.5


@dataclass(frozen=True)
class WorldConfig:
    """What to build. Sizes in videos, `pixels` a side, `fps` of the files, lengths in whole seconds.

    `duplicates` videos form a group; `embedder_fraction` of the train groups are fold "embedder"; `rare_fraction` of
    the words are rare synonyms, outside that fold. `workers` (0: one per core) does not change what is built.
    """

    train_videos: int = 4000
    validation_videos: int = 200
    test_videos: int = 400
    pixels: int = 64
    fps: float = 2.0
    min_seconds: int = 12
    max_seconds: int = 16
    min_events: int = 2
    max_events: int = 3
    duplicates: int = 4
    rare_fraction: float = 0.3
    embedder_fraction: float = 0.7
    workers: int = 0

    def __post_init__(self) -> None:
        widest = max(len(values(name)) for name in (*EVENT_ATTRIBUTES, *BACKGROUND_ATTRIBUTES))
        checks = {
            "train_videos": (self.train_videos >= 1, "at least 1"),
            "validation_videos": (self.validation_videos >= 1, "at least 1"),
            "test_videos": (self.test_videos >= 1, "at least 1"),
            "pixels": (self.pixels >= 32 and self.pixels % 2 == 0, "even and at least 32"),
            "fps": (1 <= self.fps <= 60, "from 1 to 60"),
            "min_events": (1 <= self.min_events <= self.max_events, f"from 1 to max_events={self.max_events}"),
            "min_seconds": (
                SHORTEST_EVENT * self.max_events <= self.min_seconds <= self.max_seconds,
                f"room for {self.max_events} events of {SHORTEST_EVENT} s, at most max_seconds={self.max_seconds}",
            ),
            "duplicates": (1 <= self.duplicates <= widest, f"from 1 to {widest}"),
            "rare_fraction": (0 <= self.rare_fraction <= 1, "from 0 to 1"),
            "embedder_fraction": (0 <= self.embedder_fraction <= 1, "from 0 to 1"),
            "workers": (self.workers >= 0, "0 or more"),
        }
        for name, (good, wish) in checks.items():
            if not good:
                raise ConfigError(f"'world.{name}' must be {wish}, got {getattr(self, name)}")


@dataclass(frozen=True)
class WorldQuery:
    """A fine query and its truth: `event` indexes `scene.events`; `attributes` are canonical words."""

    moment: Moment
    scene: Scene
    event: int
    attributes: dict[str, str]
    coarse_text: str
    fold: str | None


@dataclass(frozen=True)
class _Placed:
    """A scene with its place in the world; `fold` is None outside the train split."""

    split: str
    fold: str | None
    group: int
    scene: Scene


class World:
    """A finished world on disk. `seed` and `config` are those it was built from; `folder` holds its files."""

    def __init__(self, folder: Path, config: WorldConfig, seed: int, placed: Sequence[_Placed]) -> None:
        self.folder = folder
        self.config = config
        self.seed = seed
        self._placed = {item.scene.video_id: item for item in placed}
        self._queries: dict[str, list[WorldQuery]] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> World:
        """Open a folder that `build` finished.

        Raises:
            ConfigError: there is no finished world, or it has another format.
        """
        root = Path(folder)
        mark = _read_mark(root / MARK)
        if mark is None:
            raise ConfigError(
                f"'{root}' holds no finished world ({MARK} is missing); build it with vsr1.data.world.build"
            )
        if mark["format"] != FORMAT:
            raise ConfigError(f"world '{root}' has format {mark['format']}, this version reads {FORMAT}; rebuild it")
        with open(root / "scenes.jsonl", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        placed = [_Placed(row["split"], row["fold"], row["group"], Scene.from_dict(row)) for row in rows]
        return cls(root, WorldConfig(**mark["config"]), mark["seed"], placed)

    def scenes(self, split: str, fold: str | None = None) -> list[Scene]:
        """The scenes of a split, or of one fold of the train split, in order."""
        _check_place(split, fold)
        return [item.scene for item in self._placed.values() if item.split == split and fold in (None, item.fold)]

    def group(self, video_id: str) -> int:
        """The number of a video's near-duplicate group within its split."""
        return self._placed[video_id].group

    def queries(self, split: str, fold: str | None = None) -> list[WorldQuery]:
        """The fine queries of a split, or of one fold of the train split, in file order."""
        _check_place(split, fold)
        if split not in self._queries:
            self._queries[split] = [self._query(row) for row in read_rows(self.folder / f"{split}.jsonl")]
        return [query for query in self._queries[split] if fold in (None, query.fold)]

    def video_path(self, video_id: str) -> Path:
        """Where a video's file lies; raises KeyError for an id the world does not have."""
        return _video_path(self.folder, self._placed[video_id])

    def _query(self, row: dict[str, Any]) -> WorldQuery:
        scene = self._placed[row["video"]].scene
        start, end = row["time"]
        moment = Moment(f"{row['desc_id']}_fig", row["fig_desc"], scene.video_id, start, end, row["duration"])
        return WorldQuery(moment, scene, row["event"], scene.attributes(row["event"]), row["cog_desc"], row["fold"])


def build(
    folder: str | os.PathLike[str],
    config: WorldConfig,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> World:
    """Build a world, or finish or reuse the one already in `folder`; equal seeds give equal bytes.

    Files that exist are kept, so a build that was cut short goes on where it stopped. Large worlds are rendered in
    processes started afresh: a script that calls this at top level needs the usual `if __name__ == "__main__"`.

    Args:
        progress: called with (videos finished, videos in all) as the work proceeds.

    Raises:
        ConfigError: `folder` holds something else, or a world of another config, seed or format.
        Vsr1Error: the files cannot be written, for instance because the disk is full.
    """
    root = Path(folder)
    placed = _placed_scenes(config, seed)
    try:
        _claim(root, config, seed)
        for split in SPLITS:
            (root / "videos" / split).mkdir(parents=True, exist_ok=True)
        present = {(split, name) for split in SPLITS for name in os.listdir(root / "videos" / split)}
        missing = [item for item in placed if (item.split, f"{item.scene.video_id}.mp4") not in present]
        _render_all(root, config, missing, len(placed), progress)
        if not (root / MARK).exists():
            for leftover in (root / "videos").glob("*/.*.tmp"):  # of workers that were killed
                leftover.unlink(missing_ok=True)
            _write_truth(root, config, seed, placed)
            os.replace(root / UNFINISHED_MARK, root / MARK)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _disk_full(root) from error
        raise Vsr1Error(f"world '{root}' cannot be written: {error}") from error
    except VideoError as error:
        if os.strerror(errno.ENOSPC) in error.reason:
            raise _disk_full(root) from error
        raise
    return World.open(root)


def _check_place(split: str, fold: str | None) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
    if fold is not None and (split != "train" or fold not in FOLDS):
        raise ValueError(f"fold must be one of {', '.join(FOLDS)} and belongs to split 'train', got '{split}'/'{fold}'")


# Inventing: everything below depends on (config, seed) alone; string seeds of `Random` are stable across platforms.


def _placed_scenes(config: WorldConfig, seed: int) -> list[_Placed]:
    sizes = {"train": config.train_videos, "validation": config.validation_videos, "test": config.test_videos}
    placed: list[_Placed] = []
    for split, number in sizes.items():
        groups = -(-number // config.duplicates)
        embedder_groups = round(groups * config.embedder_fraction)
        for group in range(groups):
            fold = FOLDS[group >= embedder_groups] if split == "train" else None
            members = _group(config, split, group, Random(f"{seed}/{split}/{group}"))
            rest = number - group * config.duplicates
            placed.extend(_Placed(split, fold, group, scene) for scene in members[:rest])
    return placed


def _group(config: WorldConfig, split: str, group: int, rng: Random) -> list[Scene]:
    """A base scene and its near-duplicates: one attribute of one event, or of the background, takes distinct values."""
    events, duration = _events(config, rng)
    first = group * config.duplicates
    names = [f"{split}-{first + member:05d}" for member in range(config.duplicates)]
    base = Scene(
        video_id=names[0],
        duration=duration,
        background_colour=rng.choice(values("background_colour")),
        texture=rng.choice(values("texture")),
        events=events,
    )
    able = [name for name in (*EVENT_ATTRIBUTES, *BACKGROUND_ATTRIBUTES) if len(values(name)) >= config.duplicates]
    weights = [BACKGROUND_WEIGHT if name in BACKGROUND_ATTRIBUTES else 1 for name in able]
    [varied] = rng.choices(able, weights)
    index = rng.randrange(len(events))
    own = base.attributes(index)[varied]
    others = rng.sample([value for value in values(varied) if value != own], config.duplicates - 1)
    members = [base]
    for name, value in zip(names[1:], others, strict=True):
        members.append(replace(base.changed(index, varied, value), video_id=name))
    return members


def _events(config: WorldConfig, rng: Random) -> tuple[tuple[Event, ...], int]:
    """Events that do not overlap, with the seconds left over spread before, between and after them."""
    duration = rng.randint(config.min_seconds, config.max_seconds)
    lengths = [duration + 1]
    while sum(lengths) > duration:
        number = rng.randint(config.min_events, config.max_events)
        lengths = [rng.randint(SHORTEST_EVENT, LONGEST_EVENT) for _ in range(number)]
    spare = duration - sum(lengths)
    starts_of_spare = sorted(rng.randint(0, spare) for _ in lengths)
    events = []
    for index, (length, gaps) in enumerate(zip(lengths, starts_of_spare, strict=True)):
        start = gaps + sum(lengths[:index])
        events.append(Event(start, start + length, *(rng.choice(values(name)) for name in EVENT_ATTRIBUTES)))
    return tuple(events), duration


# Writing.


def _claim(root: Path, config: WorldConfig, seed: int) -> None:
    """Make `root` the place of this world, or refuse it."""
    mine = {"format": FORMAT, "seed": seed, "config": asdict(config)}
    mark = _read_mark(root / MARK) or _read_mark(root / UNFINISHED_MARK)
    if mark is not None:
        differences = _differences(mark, mine)
        if differences:
            raise ConfigError(
                f"'{root}' holds another world ({'; '.join(differences)}); choose another folder or remove this one"
            )
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"'{root}' is not a world and not an empty folder; choose another folder")
    root.mkdir(parents=True, exist_ok=True)
    write_whole(root / UNFINISHED_MARK, json.dumps(mine, indent=2) + "\n")


def _read_mark(path: Path) -> dict[str, Any] | None:
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(WorldConfig)}
        if {"format", "seed", "config"} <= set(mark) and (mark["format"] != FORMAT or set(mark["config"]) == known):
            return mark
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"'{path}' is damaged ({error}); remove its folder and build the world anew") from error
    raise ConfigError(f"'{path}' is not the mark of a world; choose another folder")


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    if found["format"] != wanted["format"]:
        return [f"format is {found['format']}, wanted {wanted['format']}"]
    pairs = {"seed": (found["seed"], wanted["seed"])} | {
        name: (found["config"][name], value) for name, value in wanted["config"].items() if name != "workers"
    }
    return [f"{name} is {old}, wanted {new}" for name, (old, new) in pairs.items() if old != new]


def _render_all(
    root: Path, config: WorldConfig, missing: list[_Placed], total: int, progress: Callable[[int, int], None] | None
) -> None:
    done = total - len(missing)
    if progress is not None:
        progress(done, total)
    chunks = [missing[first : first + CHUNK] for first in range(0, len(missing), CHUNK)]
    workers = min(config.workers or os.cpu_count() or 1, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            done += _render(root, config, chunk)
            if progress is not None:
                progress(done, total)
        return
    # Started afresh, not forked: the caller may hold torch's threads and locks, which a fork would copy half-alive.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_parent)
    try:
        for future in as_completed([executor.submit(_render, root, config, chunk) for chunk in chunks]):
            done += future.result()
            if progress is not None:
                progress(done, total)
    finally:
        executor.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """Ends this worker when its parent is killed: a pool's workers wait for work from each other's ends of a pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _render(root: Path, config: WorldConfig, chunk: list[_Placed]) -> int:
    for item in chunk:
        encode(_video_path(root, item), draw(item.scene, config.pixels, config.fps), config.fps)
    return len(chunk)


def _write_truth(root: Path, config: WorldConfig, seed: int, placed: list[_Placed]) -> None:
    rows = [{"split": item.split, "fold": item.fold, "group": item.group} | asdict(item.scene) for item in placed]
    write_whole(root / "scenes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    number = 0
    for split in SPLITS:
        members = [item for item in placed if item.split == split]
        known = Counter(_key(item.scene, event) for item in members for event in range(len(item.scene.events)))
        moments, extra = [], []
        for item in members:
            scene = item.scene
            for index, event in enumerate(scene.events):
                if known[_key(scene, index)] > 1:
                    continue
                rng = Random(f"{seed}/query/{scene.video_id}/{index}")
                rare = 0.0 if item.fold == "embedder" else config.rare_fraction
                text = sentence(scene.attributes(index), rng, rare)
                coarse = coarse_sentence(scene.attributes(index), rng, rare)
                span = (float(event.start), float(event.end), float(scene.duration))
                moments.append(Moment(f"{number}_fig", text, scene.video_id, *span))
                extra.append({"cog_desc": coarse, "event": index, "fold": item.fold})
                number += 1
        write_fig(root / f"{split}.jsonl", moments, extra)


def _key(scene: Scene, event: int) -> tuple[str, ...]:
    return tuple(scene.attributes(event).values())


def _video_path(root: Path, item: _Placed) -> Path:
    return root / "videos" / item.split / f"{item.scene.video_id}.mp4"


def _disk_full(root: Path) -> Vsr1Error:
    return Vsr1Error(f"world '{root}': the disk is full; free some space and build again, finished videos are kept")

"""Folders of videos become a corpus: what each file becomes, what is not done twice, and what a bad file costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ingest.conftest import Colours, colour, film
from vsr1 import ingest
from vsr1.corpus import Corpus, FileMark
from vsr1.errors import ConfigError, CorpusError
from vsr1.ingest import IngestReport, decoding, plan, work

Add = Callable[..., IngestReport]


@pytest.fixture
def add(tmp_path: Path, colours: Colours) -> Add:
    def add(*paths: str, **options: Any) -> IngestReport:
        options.setdefault("batch", 2)
        return ingest.add(
            tmp_path / "corpus", [tmp_path / path for path in paths or ("films",)], colours, workers=2, **options
        )

    return add


@pytest.fixture
def seen(tmp_path: Path) -> Callable[[], dict[str, int]]:
    """Video id -> the colour number of its vector."""
    wanted = torch.nn.functional.normalize(torch.stack([torch.from_numpy(colour(n)).float() for n in range(12)]), dim=1)

    def read() -> dict[str, int]:
        corpus = Corpus.open(tmp_path / "corpus")
        numbers = (corpus.matrix().rows @ wanted.T).argmax(1).tolist()
        return dict(zip(corpus.video_ids, numbers, strict=True))

    return read


@pytest.fixture
def work_done(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The names of files that were read for their hash, and of those that were decoded."""
    done: dict[str, list[str]] = {"read": [], "decoded": []}
    mark_of, decoded = plan.mark_of, decoding.decoded

    def mark(video: plan.Video) -> Any:
        done["read"].append(Path(video.path).name)
        return mark_of(video)

    def decode(paths: Any, *rest: Any) -> Iterator[Any]:
        for path, frames in decoded(paths, *rest):
            done["decoded"].append(path.name)
            yield path, frames

    monkeypatch.setattr(plan, "mark_of", mark)
    monkeypatch.setattr(decoding, "mark_of", mark)
    monkeypatch.setattr(decoding, "decoded", decode)
    return done


def counts(report: IngestReport) -> tuple[int, int, int, int]:
    return report.added, report.replaced, report.renamed, report.unchanged


def reasons(report: IngestReport) -> dict[str, str]:
    return {Path(one.path).name: one.reason for one in report.failures}


def test_files_of_a_folder_go_in_by_their_path_below_it(add: Add, seen, tmp_path: Path) -> None:
    names = ["a.mp4", "deep/er/b.MP4", "with space.mp4", "grün 字.mp4", "two\nlines.mp4"]
    for number, name in enumerate(names):
        film(tmp_path / "films" / name.replace("MP4", "mp4"), number)
    (tmp_path / "films/deep/er/b.mp4").rename(tmp_path / "films/deep/er/b.MP4")
    film(tmp_path / "films/.hidden.mp4", 9)
    (tmp_path / "films/notes.txt").write_text("no video")
    assert counts(add()) == (5, 0, 0, 0)
    assert seen() == {name: number for number, name in enumerate(names)}
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.path("two\nlines.mp4") == tmp_path / "films" / "two\nlines.mp4"
    assert corpus.duration("a.mp4") == 1.0


def test_an_unchanged_file_is_neither_read_nor_decoded(add: Add, seen, tmp_path: Path, work_done) -> None:
    for number in range(3):
        film(tmp_path / f"films/{number}.mp4", number)
    assert counts(add()) == (3, 0, 0, 0)
    assert len(work_done["read"]) == len(work_done["decoded"]) == 3
    for did in work_done.values():
        did.clear()
    assert counts(add()) == (0, 0, 0, 3)
    assert work_done == {"read": [], "decoded": []}
    os.utime(tmp_path / "films/1.mp4", ns=(1, 1))  # touched: read, found equal, and then known again
    assert counts(add()) == (0, 0, 0, 3)
    assert work_done == {"read": ["1.mp4"], "decoded": []}
    assert counts(add()) == (0, 0, 0, 3)
    assert work_done["read"] == ["1.mp4"]


def test_a_changed_file_replaces_its_row(add: Add, seen, tmp_path: Path, work_done) -> None:
    for number in range(3):
        film(tmp_path / f"films/{number}.mp4", number)
    add()
    work_done["decoded"].clear()
    film(tmp_path / "films/1.mp4", 7)
    assert counts(add()) == (0, 1, 0, 2)
    assert work_done["decoded"] == ["1.mp4"]
    assert seen() == {"0.mp4": 0, "2.mp4": 2, "1.mp4": 7}
    assert counts(add()) == (0, 0, 0, 3)


def test_same_size_and_other_content_is_a_change(add: Add, tmp_path: Path) -> None:
    path = film(tmp_path / "films/a.mp4", 1)
    add()
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    os.utime(path, ns=(5, 5))
    assert counts(add()) == (0, 1, 0, 0)


def test_a_renamed_file_keeps_its_vector_and_loses_its_old_id(add: Add, seen, tmp_path: Path, work_done) -> None:
    for number in range(3):
        film(tmp_path / f"films/{number}.mp4", number)
    add()
    work_done["decoded"].clear()
    (tmp_path / "films/1.mp4").rename(tmp_path / "films/one.mp4")
    assert counts(add()) == (0, 0, 1, 2)
    assert seen() == {"0.mp4": 0, "2.mp4": 2, "one.mp4": 1}
    shutil.copy(tmp_path / "films/0.mp4", tmp_path / "films/copy.mp4")  # both are there: both have a row
    assert counts(add()) == (1, 0, 0, 3)
    assert seen() == {"0.mp4": 0, "2.mp4": 2, "one.mp4": 1, "copy.mp4": 0}
    assert Corpus.open(tmp_path / "corpus").duration("one.mp4") == 1.0
    assert work_done["decoded"] == []


def test_files_that_swap_names_swap_vectors(add: Add, seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate("ab"):
        film(tmp_path / f"films/{name}.mp4", number)
    add()
    a, b, c = (tmp_path / f"films/{name}.mp4" for name in "abc")
    a.rename(c), b.rename(a), c.rename(b)
    monkeypatch.setattr(work, "TWINS_AT_ONCE", 1)  # the second vector must not be read after the first row moved
    add()
    assert seen() == {"a.mp4": 1, "b.mp4": 0}


def test_a_moved_folder_keeps_ids_and_learns_its_place(add: Add, seen, tmp_path: Path, work_done) -> None:
    film(tmp_path / "films/a.mp4", 3)
    add()
    work_done["decoded"].clear()
    (tmp_path / "films").rename(tmp_path / "elsewhere")
    assert counts(add("elsewhere")) == (0, 0, 1, 0)
    assert work_done["decoded"] == []
    assert Corpus.open(tmp_path / "corpus").places() == {"a.mp4": str(tmp_path / "elsewhere/a.mp4")}


def test_copies_in_a_moved_folder_all_stay(add: Add, seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "films/b.mp4", 3)
    film(tmp_path / "films/c.mp4", 3)
    add()
    (tmp_path / "films").rename(tmp_path / "elsewhere")
    for name in "ad":  # before and after the one whose vector they take
        film(tmp_path / f"elsewhere/{name}.mp4", 3)
    monkeypatch.setattr(work, "TWINS_AT_ONCE", 1)
    assert counts(add("elsewhere")) == (2, 0, 2, 0)
    assert seen() == dict.fromkeys(("a.mp4", "b.mp4", "c.mp4", "d.mp4"), 3)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")  # the same files by another way
    assert counts(add("link")) == (0, 0, 4, 0)
    assert len(seen()) == 4


def test_a_path_keeps_its_id_whatever_folder_is_given_later(add: Add, seen, tmp_path: Path) -> None:
    film(tmp_path / "films/deep/a.mp4", 0)
    assert counts(add("films/deep")) == (1, 0, 0, 0)
    assert counts(add("films", "films/deep/a.mp4")) == (0, 0, 0, 1)
    assert seen() == {"a.mp4": 0}


def test_one_id_for_two_files_is_refused_by_name(add: Add, seen, tmp_path: Path) -> None:
    one, other = (film(tmp_path / name / "a.mp4", n) for n, name in enumerate(("one", "other")))
    with pytest.raises(ConfigError) as caught:
        add("one", "other")
    assert all(part in str(caught.value) for part in ("'a.mp4'", f"'{one}'", f"'{other}'"))
    add("one")
    with pytest.raises(ConfigError, match=str(one)):  # also against what came in earlier
        add("other")
    assert counts(add(".")) == (1, 0, 0, 1)  # the way out it names
    assert seen() == {"a.mp4": 0, "other/a.mp4": 1}


def test_bad_files_are_failures_kept_and_tried_again(add: Add, seen, tmp_path: Path) -> None:
    films = tmp_path / "films"
    film(films / "good.mp4", 0)
    (films / "empty.mp4").touch()
    (films / "junk.mp4").write_bytes(b"no video" * 100)
    (films / "dangling.mp4").symlink_to(films / "nowhere.mp4")
    os.mkfifo(films / "pipe.mp4")
    with open(os.fsencode(films) + b"/\xff.mp4", "wb") as file:
        file.write(b"x")
    report = add()
    assert counts(report) == (1, 0, 0, 0)
    found = reasons(report)
    assert found.pop("\udcff.mp4") == "its name is not UTF-8: rename it"
    assert found.pop("junk.mp4")
    assert found == {
        "empty.mp4": "the file is empty",
        "dangling.mp4": "No such file or directory",
        "pipe.mp4": "is no regular file",
    }
    kept = [json.loads(line) for line in (tmp_path / "corpus" / ingest.FAILURES).read_text().splitlines()]
    assert kept == [vars(one) for one in report.failures]
    assert "path " in str(report) and str(films / "junk.mp4") in str(report) and "\\udcff" in str(report)
    for name in ("empty", "dangling", "pipe"):
        (films / f"{name}.mp4").unlink()
    os.unlink(os.fsencode(films) + b"/\xff.mp4")
    film(films / "junk.mp4", 5)
    report = add()
    assert counts(report) == (1, 0, 0, 1) and not report.failures
    assert not (tmp_path / "corpus" / ingest.FAILURES).exists()
    assert seen() == {"good.mp4": 0, "junk.mp4": 5}


def test_a_file_that_breaks_keeps_its_old_row(add: Add, seen, tmp_path: Path) -> None:
    path = film(tmp_path / "films/a.mp4", 2)
    add()
    path.write_bytes(b"broken")
    assert counts(add()) == (0, 0, 0, 0)
    assert list(reasons(add())) == ["a.mp4"]
    assert seen() == {"a.mp4": 2}


def test_files_that_vanish_or_change_under_the_hand_fail(add: Add, seen, tmp_path: Path, monkeypatch) -> None:
    for number in range(8):
        film(tmp_path / f"films/{number}.mp4", number)
    decoded = decoding.decoded

    def disturbed(paths: Any, *rest: Any) -> Iterator[Any]:
        (tmp_path / "films/7.mp4").unlink()
        for path, frames in decoded(paths, *rest):
            if path.name == "3.mp4":
                os.utime(path, ns=(7, 7))
            yield path, frames

    monkeypatch.setattr(decoding, "decoded", disturbed)
    report = add()
    assert reasons(report) == {
        "7.mp4": "No such file or directory",
        "3.mp4": "the file changed while it was read; the next run takes it as it is then",
    }
    assert seen() == {f"{number}.mp4": number for number in (0, 1, 2, 4, 5, 6)}


def test_links_are_followed_and_loops_end(add: Add, tmp_path: Path) -> None:
    film(tmp_path / "films/deep/a.mp4", 0)
    film(tmp_path / "outside/b.mp4", 1)
    (tmp_path / "films/deep/loop").symlink_to(tmp_path / "films")
    (tmp_path / "films/0 link").symlink_to(tmp_path / "films/deep")  # sorts first, and still names nothing
    (tmp_path / "films/out").symlink_to(tmp_path / "outside")
    add()
    assert Corpus.open(tmp_path / "corpus").video_ids == ["deep/a.mp4", "out/b.mp4"]


def test_a_folder_that_cannot_be_read_is_a_failure(add: Add, seen, tmp_path: Path, monkeypatch) -> None:
    film(tmp_path / "films/a.mp4", 0)
    film(tmp_path / "films/closed/b.mp4", 1)
    scandir = os.scandir

    def refuse(path: str | os.PathLike[str]) -> Any:
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert reasons(add()) == {"closed": "the folder cannot be read: Permission denied"}
    monkeypatch.undo()
    assert seen() == {"a.mp4": 0}


def test_what_the_model_cannot_take_costs_one_file(add: Add, seen, tmp_path: Path, colours: Colours) -> None:
    for number in range(6):
        film(tmp_path / f"films/{number}.mp4", number)
    colours.refuses = lambda frames: frames.source.name == "2.mp4"
    embed = colours.embed_videos

    def broken(features: Any) -> torch.Tensor:
        vectors = embed(features)
        return vectors.masked_fill(vectors[:, :1] > 0.91, torch.nan)  # the two reddest

    colours.embed_videos = broken  # type: ignore[method-assign]
    report = add(batch=6)
    assert reasons(report) == {
        "2.mp4": "cannot be embedded: no size for this shape",
        "0.mp4": "cannot be embedded: its vector is not finite",
        "1.mp4": "cannot be embedded: its vector is not finite",
    }
    assert seen() == {"3.mp4": 3, "4.mp4": 4, "5.mp4": 5}


def test_groups_are_bounded_in_videos_and_in_bytes(add: Add, tmp_path: Path, colours: Colours, monkeypatch) -> None:
    for number in range(5):
        film(tmp_path / f"films/{number}.mp4", number)
    monkeypatch.setattr(decoding, "GROUP_BYTES", 4 * 2 * 16 * 16 * 3)  # four videos of two frames
    add(batch=3)
    assert colours.batches == [3, 2]
    film(tmp_path / "more/9.mp4", 9), film(tmp_path / "more/10.mp4", 10)
    monkeypatch.setattr(decoding, "GROUP_BYTES", 1)
    add("more", batch=3)
    assert colours.batches == [3, 2, 1, 1]


def test_progress_and_rates(add: Add, tmp_path: Path) -> None:
    for number in range(5):
        film(tmp_path / f"films/{number}.mp4", number)
    told: list[tuple[str, int, int, str]] = []

    def progress(name: str, done: int, total: int, note: str = "") -> None:
        told.append((name, done, total, note))

    report = add(progress=progress)
    assert [(name, done, total) for name, done, total, _ in told] == [("index", done, 5) for done in (0, 2, 4, 5)]
    assert "videos/s (decode " in told[-1][3] and ", embed " in told[-1][3]
    assert report.decoded == report.embedded == 5
    assert 0 < report.decode_seconds < report.seconds and 0 < report.embed_seconds < report.seconds
    told.clear()
    os.utime(tmp_path / "films/0.mp4", ns=(1, 1))
    film(tmp_path / "films/new.mp4", 8, frames=8)
    add(progress=progress)
    assert [one[:3] for one in told] == [("check", 1, 1), ("index", 5, 6), ("index", 6, 6)]


def test_rates_are_videos_over_seconds() -> None:
    report = IngestReport(Path("c"), decoded=30, embedded=20, seconds=10, decode_seconds=5, embed_seconds=2)
    assert report.rates() == "2 videos/s (decode 6/s, embed 10/s)"


def test_decoding_goes_on_while_the_model_works(add: Add, tmp_path: Path, colours: Colours, work_done) -> None:
    """The model's first batch waits for the second to be decoded: it would wait for ever if one came after the other."""
    for number in range(4):
        film(tmp_path / f"films/{number}.mp4", number)
    embed = colours.embed_videos

    def slow(features: Any) -> torch.Tensor:
        for _ in range(1000):
            if len(work_done["decoded"]) == 4:
                return embed(features)
            decoding.time.sleep(0.01)
        raise AssertionError("nothing was decoded meanwhile")

    colours.embed_videos = slow  # type: ignore[method-assign]
    assert add().added == 4


def test_an_error_of_the_decoder_itself_ends_the_run(add: Add, tmp_path: Path, monkeypatch) -> None:
    film(tmp_path / "films/a.mp4", 0)

    def broken(*_: Any) -> Iterator[Any]:
        raise RuntimeError("a mistake of ours")
        yield

    monkeypatch.setattr(decoding, "decoded", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        add()


def test_errors_of_the_run(add: Add, tmp_path: Path, colours: Colours, monkeypatch) -> None:
    (tmp_path / "films").mkdir()
    with pytest.raises(ConfigError, match="no video below"):
        add()
    with pytest.raises(ConfigError, match="nowhere' is not there"):
        add("nowhere")
    assert not (tmp_path / "corpus").exists()
    film(tmp_path / "films/a.mp4", 0)
    add()
    film(tmp_path / "films/b.mp4", 1)
    with work.alone(tmp_path / "corpus", "added to"), pytest.raises(CorpusError, match="by another process"):
        add()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vsr1.corpus.store.write_segment", full)
    with pytest.raises(CorpusError, match="No space left"):
        add()
    monkeypatch.undo()
    colours.identity = "other"  # type: ignore[misc]
    for corpus in (tmp_path / "corpus", Corpus.open(tmp_path / "corpus")):
        with pytest.raises(CorpusError, match="'colours', the one asked for is 'other'"):
            ingest.add(corpus, [tmp_path / "films"], colours)
    (tmp_path / "corpus2").mkdir()
    (tmp_path / "corpus2/photo").touch()
    with pytest.raises(CorpusError, match="not empty"):
        ingest.add(tmp_path / "corpus2", [tmp_path / "films"], colours)


def test_videos_without_a_file_are_named(add: Add, tmp_path: Path) -> None:
    for number in range(2):
        film(tmp_path / f"films/{number}.mp4", number)
        film(tmp_path / f"others/o{number}.mp4", number + 2)
    add("films", "others")
    (tmp_path / "films/1.mp4").unlink()
    (tmp_path / "others/o1.mp4").unlink()
    assert add("films").missing == ("1.mp4",)
    assert "'1.mp4'" in str(add("films"))


def test_many_small_files_of_vectors_become_few(add: Add, seen, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(work, "MANY_SEGMENTS", 2)
    for number in range(5):
        film(tmp_path / f"films/{number}.mp4", number)
    add(batch=1)
    assert Corpus.open(tmp_path / "corpus").segment_count == 1
    assert seen() == {f"{number}.mp4": number for number in range(5)}
    assert counts(add()) == (0, 0, 0, 5)


def test_marks_belong_to_the_row_they_came_with(tmp_path: Path) -> None:
    corpus = Corpus.create(tmp_path / "c", 2, "e")
    assert corpus.marks() == {}
    one, other = FileMark(1, 2, "a"), FileMark(3, 4, "b")
    corpus.add(["v", "w"], torch.eye(2), paths=["/v", None], marks={"v": one})
    assert corpus.marks() == {"v": one} and corpus.places() == {"v": "/v"}
    corpus.add(["v"], torch.ones(1, 2), replacing=["v", "not there"])
    assert corpus.video_ids == ["w", "v"] and corpus.marks() == {}  # the new row said nothing of its file
    assert corpus.matrix().rows.tolist() == [[0, 1], [1, 1]] == Corpus.open(tmp_path / "c").matrix().rows.tolist()
    corpus.mark({"v": other})
    corpus.compact()
    assert Corpus.open(tmp_path / "c").marks() == {"v": other}
    with pytest.raises(CorpusError, match="no video 'x'"):
        corpus.mark({"x": other})
    corpus.delete(["v"])
    assert corpus.marks() == {}
    with pytest.raises(CorpusError, match="already in"):
        corpus.add(["w"], torch.ones(1, 2), replacing=["v"])


def test_videos_can_be_given_their_ids(add: Add, seen: Callable[[], dict[str, int]], tmp_path: Path) -> None:
    film(tmp_path / "films" / "one.mp4", 1)
    film(tmp_path / "films" / "two.mp4", 2)
    names = {str(tmp_path / "films" / "one.mp4"): "first"}
    assert add(names=names).added == 2 and seen() == {"first": 1, "two.mp4": 2}
    assert add(names=names).unchanged == 2

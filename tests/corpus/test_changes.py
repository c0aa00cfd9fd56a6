"""A corpus that is compacted, closed, refreshed, shared with other processes, or may only be read."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.corpus.shared import D, files, unit, vectors_of
from vsr1.corpus import Corpus, catalogue, compaction, segments
from vsr1.errors import CorpusError

ROOT = Path(__file__).parents[2]


def test_compaction_keeps_rows_and_frees_space(corpus: Corpus) -> None:
    corpus.delete(["b", "d"])
    corpus.add(["f", "b"], unit(2, seed=5), paths=["f.mp4", None], durations=[7.0, None])
    before, ids, old = vectors_of(corpus), corpus.video_ids, files(corpus)
    corpus.compact()
    assert len(files(corpus)) == 1
    assert not set(files(corpus)) & set(old)
    for compacted in (corpus, Corpus.open(corpus.folder)):
        assert compacted.video_ids == ids == ["a", "c", "e", "f", "b"]
        assert torch.equal(vectors_of(compacted), before)
        assert compacted.path("f") == Path("f.mp4").absolute()
        assert (compacted.duration("a"), compacted.duration("f"), compacted.duration("b")) == (1.5, 7.0, None)
    corpus.delete(["a"])
    corpus.add(["a"], unit(1, seed=6))
    assert Corpus.open(corpus.folder).video_ids == ["c", "e", "f", "b", "a"]


def test_a_compaction_writes_bounded_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus.create(tmp_path / "corpus", D, "e", "float16")
    for step in range(10):
        corpus.add([f"v{step}-{n}" for n in range(5)], unit(5, seed=step))
    corpus.delete([f"v{step}-0" for step in range(10)])
    expected = vectors_of(corpus)
    read: list[str] = []
    real = segments.load_file
    monkeypatch.setattr(segments, "load_file", lambda path: read.append(path.name) or real(path))
    corpus.compact(segment_bytes=10 * D * 2 + 1)  # 40 rows by 10, of segments of 4
    assert len(read) == len(set(read)) == 10  # once each, though parts end inside them
    contents = sorted(len(real(path)["vectors"]) for path in (corpus.folder / "vectors").iterdir())
    assert contents == [10, 10, 10, 10]
    assert torch.equal(vectors_of(Corpus.open(corpus.folder)), expected)


def test_a_compact_corpus_is_left_alone(corpus: Corpus) -> None:
    corpus.compact()
    left = files(corpus)
    corpus.compact()
    Corpus.open(corpus.folder).compact()
    assert files(corpus) == left
    corpus.compact(segment_bytes=1)
    assert files(corpus) == left  # fewer files than asked for are no reason to make more
    with pytest.raises(ValueError, match="segment_bytes must be at least 1"):
        corpus.compact(segment_bytes=0)


def test_a_name_is_never_used_twice(corpus: Corpus) -> None:
    """A reader that knows a file by name must not find other vectors there, whatever was emptied in between."""
    reader = Corpus.open(corpus.folder)
    used = set(files(corpus))
    for step in range(3):
        corpus.delete(corpus.video_ids)
        corpus.compact()
        assert files(corpus) == []
        corpus.add(["a", "b", "c"], unit(3, seed=step + 10))
        assert not used & set(files(corpus))
        used |= set(files(corpus))
    assert torch.equal(vectors_of(reader), vectors_of(corpus))
    assert reader.video_ids == ["a", "b", "c"]


def test_a_compaction_elsewhere_is_no_error_for_a_reader(corpus: Corpus) -> None:
    corpus.delete(["b"])
    late, early = Corpus.open(corpus.folder), Corpus.open(corpus.folder)
    expected = vectors_of(early)
    corpus.compact()
    assert torch.equal(vectors_of(late), expected)  # its segments are gone: it reads the catalogue again
    assert torch.equal(vectors_of(early), expected)  # has all it needs
    assert early.refresh()
    assert torch.equal(vectors_of(early), expected)
    assert not late.refresh()


def test_a_segment_that_vanishes_between_catalogue_and_reading(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compaction after each look at the catalogue; the reader goes on until it gets hold of all segments."""
    reader, writer = Corpus.open(corpus.folder), Corpus.open(corpus.folder)
    expected, left = vectors_of(corpus), [3]
    real = Corpus._gather

    def hurried(self: Corpus, *arguments: object) -> object:
        if self is reader and left[0]:
            left[0] -= 1
            writer.add([f"x{left[0]}"], unit(1))
            writer.compact()
            writer.delete([f"x{left[0]}"])
        return real(self, *arguments)

    monkeypatch.setattr(Corpus, "_gather", hurried)
    assert torch.equal(vectors_of(reader), expected)
    assert left == [0]
    for path in (corpus.folder / "vectors").iterdir():
        path.unlink()
    with pytest.raises(CorpusError, match="with 6 vectors is missing: restore"):
        Corpus.open(corpus.folder).matrix()


def test_a_compaction_verifies_what_it_copies_and_changes_nothing_otherwise(corpus: Corpus) -> None:
    corpus.matrix()  # verified once: a checksum of what goes bad later must not be taken for granted
    corpus.delete(["a"])
    path = corpus.folder / "vectors" / "000004.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorpusError, match=r"000004.safetensors' is damaged"):
        corpus.compact(segment_bytes=D * 4)
    path.write_bytes(good)
    assert Corpus.open(corpus.folder).video_ids == corpus.video_ids == ["b", "c", "d", "e"]
    corpus.compact()
    assert files(corpus) == ["000006.safetensors"]


@pytest.mark.parametrize("bad", ["truncated", "no safetensors", "other rows"])
def test_a_segment_that_is_not_what_the_catalogue_says(corpus: Corpus, bad: str) -> None:
    path = corpus.folder / "vectors" / "000001.safetensors"
    if bad == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif bad == "no safetensors":
        path.write_bytes(b"junk" * 9)
    else:
        shutil.copy(corpus.folder / "vectors" / "000004.safetensors", path)
    with pytest.raises(CorpusError, match=r"000001.safetensors' is damaged: .*restore the folder"):
        Corpus.open(corpus.folder).search(unit(1), 1)
    reader = Corpus.open(corpus.folder)
    reader._verified.add(1)  # it went bad between two readings of one process
    way = "holds (2, 6)" if bad == "other rows" else "cannot be read"
    with pytest.raises(CorpusError, match=r"000001.safetensors' " + way.replace("(", r"\(").replace(")", r"\)")):
        reader.search(unit(1), 1)


MOMENTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "amid the new segments": lambda m: m.setattr(compaction, "insert", lambda *a: os._exit(9)),
    "before the commit": lambda m: m.setattr(compaction, "count_commit", lambda *a: os._exit(9)),
    "after the commit": lambda m: m.setattr(Path, "unlink", lambda *a, **b: os._exit(9)),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_compaction_loses_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    corpus.delete(["c"])
    expected, before = vectors_of(corpus), files(corpus)
    child = os.fork()
    if child == 0:
        MOMENTS[moment](monkeypatch)
        corpus.compact(segment_bytes=2 * D * 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert set(before) < set(files(corpus))
    again = Corpus.open(corpus.folder)
    assert again.video_ids == ["a", "b", "d", "e"]
    assert torch.equal(vectors_of(again), expected)
    again.delete(["e"])
    assert files(corpus) == (["000006.safetensors", "000008.safetensors"] if moment.startswith("after") else before)
    assert torch.equal(vectors_of(again), expected[:3])


USES: dict[str, Callable[[Corpus], object]] = {
    "len": len,
    "contains": lambda c: "a" in c,
    "video_ids": lambda c: c.video_ids,
    "row": lambda c: c.row("a"),
    "path": lambda c: c.path("a"),
    "duration": lambda c: c.duration("a"),
    "search": lambda c: c.search(unit(1), 1),
    "matrix": lambda c: c.matrix(),
    "numpy": lambda c: c.numpy(),
    "add": lambda c: c.add(["x"], unit(1)),
    "add nothing": lambda c: c.add([], torch.empty(0, D)),
    "delete": lambda c: c.delete(["a"]),
    "compact": lambda c: c.compact(),
    "refresh": lambda c: c.refresh(),
    "export_faiss": lambda c: c.export_faiss("never.faiss"),
    "export_prepared": lambda c: c.export_prepared("never.npy", "never.json"),
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_corpus_says_so(corpus: Corpus, use: str) -> None:
    with corpus as same:
        assert same is corpus
        rows = corpus.numpy()
        total = rows.sum()
    with pytest.raises(CorpusError, match=r"/corpus' is closed: open it again"):
        USES[use](corpus)
    assert "closed" in repr(corpus)
    assert rows.sum() == total
    corpus.close()
    assert len(Corpus.open(corpus.folder)) == 5


def test_a_refresh_reads_only_what_is_new(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Corpus.open(corpus.folder)
    assert not reader.refresh()
    before = reader.matrix()
    read: list[str] = []
    real = segments.load_file
    monkeypatch.setattr(segments, "load_file", lambda path: read.append(path.name) or real(path))
    corpus.add(["f"], unit(1, seed=8))
    assert reader.video_ids[-1] == "e"
    assert reader.refresh()
    assert not reader.refresh()
    corpus.delete(["b"])
    assert reader.refresh()
    assert reader.video_ids == ["a", "c", "d", "e", "f"]
    expected = torch.cat([unit(3)[[0, 2]], unit(2, seed=1), unit(1, seed=8)])
    assert torch.equal(reader.matrix().rows, expected)
    assert read == ["000006.safetensors"]
    assert torch.equal(before.rows, torch.cat([unit(3), unit(2, seed=1)]))  # what was handed out stays as it was


SEARCHER = """
import sys
import torch
from tests.corpus.shared import D, unit
from vsr1.corpus import Corpus

reader, seen, changes = Corpus.open(sys.argv[1]), 0, 0
while "end" not in reader:
    ids, scores = reader.search(torch.eye(D), 8)
    for names, values, axis in zip(ids, scores, range(D)):
        for name, value in zip(names, values.tolist()):
            assert abs(unit(1, seed=int(name[1:]))[0, axis] - value) < 1e-6, (name, axis, value)
    if not seen:
        print("ready", flush=True)  # the first search imports much
    seen += 1
    changes += reader.refresh()
print(seen, changes)
"""


def test_another_process_searches_while_this_one_writes(tmp_path: Path) -> None:
    corpus, chance = Corpus.create(tmp_path / "corpus", D, "e"), random.Random(0)
    for number in range(30):
        corpus.add([f"v{number}"], unit(1, seed=number))
    with subprocess.Popen(
        [sys.executable, "-c", SEARCHER, str(corpus.folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as searcher:
        assert searcher.stdout is not None
        assert searcher.stdout.readline() == "ready\n"
        for number in range(30, 90):
            corpus.add([f"v{number}"], unit(1, seed=number))
            corpus.delete(chance.sample(corpus.video_ids, 1))
            if number % 5 == 0:
                corpus.compact(segment_bytes=10 * D * 4)
        corpus.add(["end"], unit(1))
        seen, changes = map(int, searcher.stdout.read().split())
    assert searcher.returncode == 0
    assert seen >= changes >= 1


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that any user of the machine can reach."""
    tmp_path.chmod(0o755)
    yield tmp_path
    for path in tmp_path.rglob("*"):
        path.chmod(0o755)


def without_rights(folder: Path, act: Callable[[], None]) -> None:
    """Runs `act` in a child that may only read the folder; root, who may write anywhere, becomes nobody for it."""
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            act()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_that_may_only_be_read_can_be_searched(public: Path) -> None:
    made = Corpus.create(public / "corpus", D, "e")
    made.add(["a", "b"], unit(2))
    expected = vectors_of(made)  # also: the child has nothing left to import from packages that it may not read

    def act() -> None:
        reader = Corpus.open(made.folder)
        assert torch.equal(vectors_of(reader), expected)
        assert not reader.refresh()
        for change in (lambda: reader.add(["c"], unit(1)), lambda: reader.delete(["a"]), reader.compact):
            with pytest.raises(CorpusError, match="may only be read here: copy the folder"):
                change()

    without_rights(made.folder, act)
    assert sorted(path.name for path in made.folder.iterdir()) == ["catalogue.sqlite", "vectors"]


@pytest.mark.parametrize("index", ["with its index", "without"])
def test_a_read_only_folder_with_commits_still_in_the_log(public: Path, index: str) -> None:
    """What a killed writer leaves, or a copy taken while one wrote: the catalogue file alone would be out of date."""
    made, copy, again = Corpus.create(public / "corpus", D, "e"), public / "copy", public / "again"
    with catalogue.connect(made.folder) as reading:  # which keeps the log from being folded in
        catalogue.read_generation(reading)
        made.add(["a", "b", "c"], unit(3))
        shutil.copytree(made.folder, copy)
    assert (copy / "catalogue.sqlite-wal").stat().st_size > 0
    if index == "without":
        (copy / "catalogue.sqlite-shm").unlink()
    expected = vectors_of(made)

    def act() -> None:
        if index == "without":
            with pytest.raises(CorpusError, match=r"last commits of .* are still in 'catalogue.sqlite-wal'.*copy"):
                Corpus.open(copy)
        else:
            assert torch.equal(vectors_of(Corpus.open(copy)), expected)

    without_rights(copy, act)
    shutil.copytree(copy, again)
    for path in (again, *again.rglob("*")):
        path.chmod(0o755)
    assert Corpus.open(again).video_ids == ["a", "b", "c"]


def test_a_catalogue_written_while_it_was_read_unlocked(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    writable = os.access
    monkeypatch.setattr(catalogue.os, "access", lambda *a: False)
    assert Corpus.open(corpus.folder).video_ids == corpus.video_ids
    reading = catalogue.connect(corpus.folder)
    reading.__enter__()
    monkeypatch.setattr(catalogue.os, "access", writable)
    corpus.delete(["a"])
    with pytest.raises(CorpusError, match="was written while it was read: try again"):
        reading.__exit__(None, None, None)


def test_views_share_memory(corpus: Corpus) -> None:
    rows = corpus.matrix().rows
    for view in (corpus.numpy(), np.from_dlpack(corpus.matrix())):
        assert np.array_equal(view, rows.numpy())
        assert view.ctypes.data == rows.data_ptr()
    with pytest.raises(ValueError, match="read-only"):
        corpus.numpy()[0, 0] = 1
    assert torch.from_dlpack(corpus.matrix()).data_ptr() == rows.data_ptr()
    assert corpus.matrix().__dlpack_device__() == rows.__dlpack_device__()


def test_views_of_half_precision(tmp_path: Path) -> None:
    half = Corpus.create(tmp_path / "half", D, "e", "float16")
    half.add(["x"], unit(1))
    assert half.numpy().dtype == np.float16
    short = Corpus.create(tmp_path / "short", D, "e", "bfloat16")
    short.add(["x"], unit(1))
    with pytest.raises(TypeError, match=r"bfloat16, which NumPy lacks: use corpus.matrix\(\).rows.float\(\)"):
        short.numpy()
    assert short.matrix().rows.view(torch.uint16).numpy().shape == (1, D)
    assert torch.from_dlpack(short.matrix()).dtype == torch.bfloat16
    cupy = pytest.importorskip("cupy")
    if torch.cuda.is_available():
        on_gpu = half.matrix().to(torch.device("cuda"))
        assert cupy.from_dlpack(on_gpu).data.ptr == on_gpu.rows.data_ptr()


def test_queries_that_cannot_find_anything(corpus: Corpus) -> None:
    query = unit(3)
    query[1, 2] = torch.nan
    ids, scores = corpus.search(query.double().numpy(), 5)
    assert [len(row) for row in ids] == [5, 0, 5]
    assert scores[1].eq(-torch.inf).all()
    assert corpus.search(unit(2), 0)[0] == [[], []]
    with pytest.raises(ValueError, match=r"k is 2049; expected 0 <= k <= 2048"):
        corpus.search(unit(1), 2049)

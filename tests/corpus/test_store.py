"""The corpus on disk: what is committed is found, in order, and nothing else ever is."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.corpus.shared import D, files, scratch, unit, vectors_of
from vsr1.corpus import Corpus, catalogue, segments, store
from vsr1.errors import CorpusError


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_was_added_is_there_after_reopening(tmp_path: Path, dtype: str) -> None:
    made = Corpus.create(tmp_path / "new" / "corpus", D, "embedder-a", dtype)
    made.add(["x", "y"], unit(2).numpy(), paths=["x.mp4", None], durations=[2.0, None])
    made.add(["z"], unit(1, seed=1))
    again = Corpus.open(tmp_path / "new" / "corpus", "embedder-a")
    expected = torch.cat([unit(2), unit(1, seed=1)]).to(getattr(torch, dtype)).float()
    assert (again.video_ids, len(again), again.dimension) == (["x", "y", "z"], 3, D)
    assert (again.dtype, again.embedder_id) == (getattr(torch, dtype), "embedder-a")
    assert again.path("x") == Path("x.mp4").absolute()
    assert (again.duration("x"), again.duration("y"), again.row("z")) == (2.0, None, 2)
    assert "x" in again
    assert "w" not in again
    torch.testing.assert_close(vectors_of(again), expected, rtol=1e-6, atol=1e-6)


def test_search_ranks_by_inner_product_and_excludes(corpus: Corpus) -> None:
    rows = torch.cat([unit(3), unit(2, seed=1)])
    query = unit(2, seed=2)
    order = (query @ rows.T).argsort(dim=1, descending=True)
    names = np.array(corpus.video_ids)
    ids, scores = corpus.search(query, 3)
    assert ids == names[order[:, :3]].tolist()
    torch.testing.assert_close(scores, (query @ rows.T).gather(1, order[:, :3]), rtol=1e-5, atol=1e-6)
    ids, _ = corpus.search(query, 2, exclude=[[ids[0][0], "never added"], []])
    assert ids == [names[order[0, 1:3]].tolist(), names[order[1, :2]].tolist()]


def test_search_by_int8_codes_finds_the_same(corpus: Corpus) -> None:
    query = unit(4, seed=2)
    for change in (lambda: None, lambda: corpus.add(["f"], unit(1, seed=8)), lambda: corpus.delete(["b"])):
        change()
        ids, scores = corpus.search(query, 3, exclude=[["a"], [], [], []], int8=True)
        wanted_ids, wanted = corpus.search(query, 3, exclude=[["a"], [], [], []])
        assert ids == wanted_ids
        torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-7)
        assert corpus.matrix().quantized is not None


def test_search_for_more_than_there_is(corpus: Corpus) -> None:
    ids, scores = corpus.search(unit(1), 7, exclude=[["a"]])
    assert sorted(ids[0]) == ["b", "c", "d", "e"]
    assert scores.shape == (1, 7)
    assert scores[0, 4:].eq(-torch.inf).all()


def test_an_empty_corpus_finds_nothing(tmp_path: Path) -> None:
    made = Corpus.create(tmp_path / "corpus", D, "e")
    made.add([], torch.empty(0, D))
    ids, scores = made.search(unit(2), 3)
    assert ids == [[], []]
    assert scores.eq(-torch.inf).all()
    assert files(made) == []


def test_deletion_moves_rows_up_and_frees_the_id(corpus: Corpus) -> None:
    before = vectors_of(corpus)
    corpus.delete(["b", "d"])
    assert corpus.video_ids == ["a", "c", "e"]
    assert torch.equal(vectors_of(corpus), before[[0, 2, 4]])
    corpus.add(["b"], unit(1, seed=5))
    assert (corpus.video_ids, corpus.row("b")) == (["a", "c", "e", "b"], 3)
    again = Corpus.open(corpus.folder)
    assert again.video_ids == corpus.video_ids
    assert torch.equal(vectors_of(again), vectors_of(corpus))


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True)),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True)),
        st.tuples(st.sampled_from(["search", "reopen", "hand over", "search late", "compact"]), st.just([])),
    ),
    max_size=16,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_any_sequence_of_changes_equals_a_dictionary(changes: list[tuple[str, list[int]]]) -> None:
    """`made` writes, `other` stays behind on `seen` until one hands over to the other."""
    with scratch() as folder:
        follow(changes, Path(folder) / "corpus")


def follow(changes: list[tuple[str, list[int]]], folder: Path) -> None:
    made = Corpus.create(folder, D, "e")
    other = Corpus.open(made.folder)
    model: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for step, (what, numbers) in enumerate(changes):
        names = [f"v{n}" for n in numbers]
        vectors = unit(len(names), seed=step)
        if what == "add" and not model.keys() & set(names):
            made.add(names, vectors)
            model.update(zip(names, vectors, strict=True))
        elif what == "delete" and set(names) <= model.keys():
            made.delete(names)
            model = {k: v for k, v in model.items() if k not in names}
        elif what in ("add", "delete"):
            with pytest.raises(CorpusError):
                made.add(names, vectors) if what == "add" else made.delete(names)
        elif what == "reopen":
            made = Corpus.open(made.folder)
        elif what == "search":
            same(made, model)
        elif what == "hand over":
            made, other, seen = other, made, dict(model)
            made.refresh()
            assert not made.refresh()
        elif what == "search late":
            found = vectors_of(other)
            seen = seen if other.video_ids == list(seen) else dict(model)
            assert other.video_ids == list(seen)
            assert_rows(found, seen)
        elif what == "compact":
            made.compact(segment_bytes=2 * D * 4)
            assert len(files(made)) <= (len(model) + 1) // 2
        assert made.video_ids == list(model)
    same(Corpus.open(made.folder), model)
    same(made, model)


def same(corpus: Corpus, model: dict[str, torch.Tensor]) -> None:
    assert corpus.video_ids == list(model)
    assert_rows(vectors_of(corpus), model)


def assert_rows(found: torch.Tensor, model: dict[str, torch.Tensor]) -> None:
    expected = torch.stack(list(model.values())) if model else torch.empty(0, D)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


REFUSED: dict[str, tuple[Callable[[Corpus], object], str]] = {
    "twice in one call": (lambda c: c.add(["x", "x"], unit(2)), r"'x' is given twice for .*delete it first"),
    "already there": (lambda c: c.add(["x", "a"], unit(2)), r"'a' is already in .*1 such of 2"),
    "dimension": (lambda c: c.add(["x"], torch.ones(1, 9)), r"holds 6-d vectors, the new ones have 9.*'embedder-a'"),
    "nan": (lambda c: c.add(["x", "y"], torch.tensor([[0.0] * D, [torch.nan] * D])), r"video 'y' is not finite"),
    "infinite": (lambda c: c.add(["x"], torch.full((1, D), torch.inf)), r"video 'x' is not finite"),
    "delete unknown": (lambda c: c.delete(["a", "w"]), r"holds no video 'w'"),
    "row of unknown": (lambda c: c.row("w"), r"holds no video 'w'"),
    "path never said": (lambda c: c.path("b"), r"does not know where the file of video 'b' lies"),
    "query dimension": (lambda c: c.search(torch.ones(1, 9), 1), r"holds 6-d vectors .*the query has 9"),
    "another embedder": (lambda c: Corpus.open(c.folder, "embedder-b"), r"'embedder-a'.*'embedder-b'.*index .* again"),
    "create again": (lambda c: Corpus.create(c.folder, D, "e"), r"already holds a corpus"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_both_sides_and_change_nothing(corpus: Corpus, name: str) -> None:
    call, message = REFUSED[name]
    before = files(corpus)
    with pytest.raises(CorpusError, match=message):
        call(corpus)
    assert corpus.video_ids == Corpus.open(corpus.folder).video_ids == ["a", "b", "c", "d", "e"]
    assert files(corpus) == before


def test_a_vector_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    made = Corpus.create(tmp_path / "corpus", D, "e", "float16")
    with pytest.raises(CorpusError, match=r"not finite in torch.float16"):
        made.add(["x"], torch.full((1, D), 1e6))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda c: c.add(["x"], unit(2)), ValueError, r"shape \(1, 6\), got \(2, 6\)"),
        (lambda c: c.add(["x"], unit(1), durations=[1.0, 2.0]), ValueError, r"1 video ids, 1 paths and 2 durations"),
        (lambda c: c.add([""], unit(1)), TypeError, "strings that are not empty"),
        (lambda c: c.add(["x"], torch.ones(1, D, dtype=torch.int64)), TypeError, "floating point"),
        (lambda c: c.search(unit(1)[0], 1), ValueError, r"shape \(B, 6\), got \(6,\)"),
        (lambda c: c.search(unit(2), 1, exclude=[["a"]]), ValueError, "each of the 2 queries, got 1"),
        (lambda c: Corpus.create(c.folder / "x", 0, "e"), ValueError, "at least 1"),
        (lambda c: Corpus.create(c.folder / "x", D, ""), ValueError, "embedder_id"),
        (lambda c: Corpus.create(c.folder / "x", D, "e", "int8"), ValueError, "bfloat16.*'int8'"),
    ],
)
def test_wrong_arguments(corpus: Corpus, call: Callable[[Corpus], object], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        call(corpus)


def test_folders_that_are_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no such folder; make one"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"is not a corpus: it has no catalogue.sqlite"):
        Corpus.open(tmp_path)
    (tmp_path / "holiday.mp4").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"is not empty .*holiday.mp4"):
        Corpus.create(tmp_path, D, "e")
    with pytest.raises(CorpusError, match="it is a file"):
        Corpus.create(tmp_path / "holiday.mp4", D, "e")
    foreign = sqlite3.connect(tmp_path / "catalogue.sqlite")
    foreign.execute("CREATE TABLE t (x)")
    foreign.close()
    with pytest.raises(CorpusError, match=r"was not written by vsr1"):
        Corpus.open(tmp_path)


def test_another_format_is_refused(corpus: Corpus) -> None:
    connection = sqlite3.connect(corpus.folder / "catalogue.sqlite")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(CorpusError, match=r"has format 9, this vsr1 reads format 1"):
        Corpus.open(corpus.folder)


def test_damage_is_found_when_a_segment_is_first_read(corpus: Corpus) -> None:
    path = corpus.folder / "vectors" / "000004.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = Corpus.open(corpus.folder)
    assert damaged.duration("a") == 1.5
    with pytest.raises(CorpusError, match=r"000004.safetensors' is damaged: its SHA-256 is .*restore"):
        damaged.matrix()
    path.unlink()
    with pytest.raises(CorpusError, match=r"000004.safetensors' with 2 vectors is missing"):
        damaged.search(unit(1), 1)
    (corpus.folder / "catalogue.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorpusError, match=r"catalogue .* is damaged"):
        Corpus.open(corpus.folder)


def test_a_segment_is_verified_once(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    real = segments._sha256

    def spy(path: Path) -> str:
        hashed.append(path)
        return real(path)

    monkeypatch.setattr(segments, "_sha256", spy)
    corpus = Corpus.open(corpus.folder)
    corpus.matrix()
    corpus.matrix()
    corpus.delete(["a"])
    corpus.matrix()
    assert sorted(path.name for path in hashed) == ["000001.safetensors", "000004.safetensors"]


def die(*args: object) -> None:
    os._exit(9)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the segment is flushed": lambda m: m.setattr(segments, "flush", die),
    "before the rename": lambda m: m.setattr(segments, "_sha256", die),
    "after the rename": lambda m: m.setattr(store, "insert", die),
    "before the commit": lambda m: m.setattr(store, "count_commit", die),
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_writer_leaves_the_last_commit(corpus: Corpus, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    vectors = vectors_of(corpus)
    child = os.fork()
    if child == 0:
        KILLS[moment](monkeypatch)
        corpus.add(["lost"], unit(1, seed=9))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = "000006.safetensors" + (".aside" if moment.endswith(("flushed", "before the rename")) else "")
    assert files(corpus)[-1] == left
    again = Corpus.open(corpus.folder)
    assert again.video_ids == ["a", "b", "c", "d", "e"]
    assert torch.equal(vectors_of(again), vectors)
    again.delete(["a"])
    assert files(corpus) == ["000001.safetensors", "000004.safetensors"]
    again.add(["kept"], unit(1, seed=3))
    assert Corpus.open(corpus.folder).video_ids[-1] == "kept"


def test_a_writer_clears_away_leftovers_and_nothing_else(corpus: Corpus) -> None:
    leftovers = [".tmp9JIWkY", "000006.safetensors", "000999.safetensors.aside", "1000000.safetensors"]
    strangers = ["notes.txt", "mine.safetensors", ".tmp-of-mine"]
    for name in (*leftovers, *strangers):
        (corpus.folder / "vectors" / name).write_bytes(b"")
    corpus.delete(["a"])
    assert files(corpus) == sorted([*strangers, "000001.safetensors", "000004.safetensors"])


def test_a_killed_creation_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(catalogue, "flush", die)
        Corpus.create(tmp_path / "corpus", D, "e")
    os.waitpid(child, 0)
    with pytest.raises(CorpusError, match="is not a corpus"):
        Corpus.open(tmp_path / "corpus")
    assert len(Corpus.create(tmp_path / "corpus", D, "e")) == 0
    assert sorted(p.name for p in (tmp_path / "corpus").iterdir()) == ["catalogue.sqlite", "vectors"]


def test_a_second_writer_waits_its_turn_and_sees_the_first(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Corpus.open(corpus.folder)
    other.add(["f"], unit(1, seed=7))
    with pytest.raises(CorpusError, match="'f' is already in"):
        corpus.add(["f"], unit(1))
    corpus.delete(["a"])
    assert corpus.video_ids == ["b", "c", "d", "e", "f"]
    monkeypatch.setattr(catalogue, "_LOCK_SECONDS", 0.05)
    with (
        catalogue.connect(corpus.folder, write=True),
        pytest.raises(CorpusError, match=r"locked by another writer for 0\.05 s: try again when it has ended"),
    ):
        other.add(["g"], unit(1))
    assert other.search(unit(1), 1)[0][0]


def test_threads_search_while_one_adds_and_deletes(corpus: Corpus) -> None:
    query = unit(3, seed=4)
    stop, wrong = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            ids, scores = corpus.search(query, 3, exclude=[["a"], [], ["e", "n1"]])
            if any("a" in row for row in ids[:1]) or not scores.isfinite().all():
                wrong.append(ids)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(8):
        corpus.add([f"n{step}"], unit(1, seed=step))
        corpus.delete([f"n{step - 1}"] if step else ["b"])
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert corpus.video_ids == ["a", "c", "d", "e", "n7"]

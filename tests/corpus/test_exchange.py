"""Vectors that come from elsewhere or go there: FAISS indexes, .npy files with a JSON of rows."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.corpus.shared import D, files, unit, vectors_of
from vsr1.corpus import Corpus, catalogue, creation, exchange, segments
from vsr1.errors import BackendUnavailable, CorpusError

faiss = pytest.importorskip("faiss")

NAMES = [f"v{n}" for n in range(11)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of four rows, so that eleven make three."""
    monkeypatch.setattr(exchange, "in_parts", functools.partial(segments.in_parts, part_bytes=4 * D * 4))


def flat(count: int = 11) -> Any:
    index = faiss.IndexFlatIP(D)
    index.add(unit(count).numpy())
    return index


def prepare(folder: Path, vectors: Any, row_of: Any) -> tuple[Path, Path]:
    np.save(folder / "vectors.npy", vectors)
    (folder / "docid2row.json").write_text(row_of if isinstance(row_of, str) else json.dumps(row_of))
    return folder / "vectors.npy", folder / "docid2row.json"


def test_one_vector_all_the_way_to_faiss(tmp_path: Path) -> None:
    """add, compact, export: FAISS finds in the file what the corpus finds, by the same score."""
    corpus = Corpus.create(tmp_path / "corpus", D, "e")
    corpus.add(["lost", *NAMES[:5]], unit(6, seed=1))
    corpus.add(["mine", *NAMES[5:]], torch.cat([unit(1, seed=9), unit(6, seed=2)]))
    corpus.delete(["lost", "v7"])
    corpus.compact()
    ids_path = corpus.export_faiss(tmp_path / "index.faiss")
    names = json.loads(ids_path.read_text())
    index = faiss.read_index(str(tmp_path / "index.faiss"))
    assert (type(index), index.ntotal, names[5]) == (faiss.IndexFlatIP, 11, "mine")
    assert np.array_equal(index.reconstruct(5), unit(1, seed=9)[0].numpy())
    query = torch.cat([unit(1, seed=9), unit(4, seed=3)])
    scores, rows = index.search(query.numpy(), 11)
    ids, expected = corpus.search(query, 11)
    assert [[names[row] for row in found] for found in rows] == ids
    assert ids[0][0] == "mine"
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)
    again = Corpus.import_faiss(tmp_path / "again", tmp_path / "index.faiss", names, "e")
    assert again.video_ids == corpus.video_ids
    assert torch.equal(again.matrix().rows, corpus.matrix().rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "corpus", "index.faiss", "index.faiss.ids.json"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_of_a_flat_index(tmp_path: Path, dtype: str) -> None:
    corpus = Corpus.import_faiss(
        tmp_path / "corpus", flat(), NAMES, "embedder-a", dtype, paths={"v3": "v3.mp4"}, durations={"v10": 2.5}
    )
    assert (corpus.video_ids, corpus.embedder_id, len(files(corpus))) == (NAMES, "embedder-a", 3)
    assert torch.equal(corpus.matrix().rows, unit(11).to(getattr(torch, dtype)))
    assert (corpus.path("v3"), corpus.duration("v10"), corpus.duration("v3")) == (Path("v3.mp4").absolute(), 2.5, None)
    corpus.add(["x"], unit(1))
    corpus.delete(["v3"])
    corpus.compact()
    assert Corpus.open(corpus.folder).video_ids == [*NAMES[:3], *NAMES[4:], "x"]


@pytest.mark.parametrize("kind", ["IndexIDMap", "IndexIDMap2"])
def test_import_of_an_index_with_ids(tmp_path: Path, kind: str) -> None:
    index = getattr(faiss, kind)(faiss.IndexFlatIP(D))
    numbers = np.array([2**40 + n * n for n in range(11)])
    index.add_with_ids(unit(11).numpy(), numbers)
    index.remove_ids(numbers[:1])
    faiss.write_index(index, str(tmp_path / "index"))
    name_of = dict(zip(numbers.tolist(), NAMES, strict=True))
    corpus = Corpus.import_faiss(tmp_path / "corpus", str(tmp_path / "index"), name_of, "e")
    assert corpus.video_ids == NAMES[1:]
    assert torch.equal(corpus.matrix().rows, unit(11)[1:])
    with pytest.raises(CorpusError, match=f"a vector of id {2**40 + 1}, for which video_ids has no video"):
        Corpus.import_faiss(tmp_path / "other", index, NAMES, "e")


def test_export_and_import_of_prepared_vectors(tmp_path: Path) -> None:
    corpus = Corpus.import_faiss(tmp_path / "corpus", flat(), NAMES, "e")
    npy, rows = tmp_path / "out.npy", tmp_path / "out.json"
    for _ in range(2):  # the second export replaces the first
        corpus.export_prepared(npy, rows)
        assert np.array_equal(np.load(npy), unit(11).numpy())
        assert json.loads(rows.read_text()) == {name: row for row, name in enumerate(NAMES)}
    again = Corpus.import_prepared(tmp_path / "again", npy, rows, "e", durations={"v0": 1.0})
    assert (again.video_ids, again.duration("v0")) == (NAMES, 1.0)
    assert torch.equal(again.matrix().rows, corpus.matrix().rows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "corpus", "out.json", "out.npy"]


@pytest.mark.parametrize(("dtype", "written"), [("float16", np.float16), ("bfloat16", np.float32)])
def test_export_of_half_precision(tmp_path: Path, dtype: str, written: type) -> None:
    corpus = Corpus.import_faiss(tmp_path / "corpus", flat(), NAMES, "e", dtype)
    corpus.export_prepared(tmp_path / "out.npy", tmp_path / "out.json")
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == written
    assert np.array_equal(found, corpus.matrix().rows.float().numpy())
    ids = json.loads(corpus.export_faiss(tmp_path / "index").read_text())
    assert np.array_equal(faiss.read_index(str(tmp_path / "index")).reconstruct_n(0, 11), found)
    assert ids == NAMES


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_prepared_vectors_of_any_layout(tmp_path: Path, dtype: str, order: str) -> None:
    vectors = np.asarray(unit(11).numpy(), dtype=dtype, order=order)  # type: ignore[call-overload]
    row_of = {name: 10 - row for row, name in enumerate(NAMES)}
    corpus = Corpus.import_prepared(tmp_path / "corpus", *prepare(tmp_path, vectors, row_of), "e")
    assert corpus.video_ids == NAMES[::-1]
    assert np.array_equal(corpus.numpy(), vectors.astype(np.float32))


def test_imports_of_nothing(tmp_path: Path) -> None:
    empty = Corpus.import_faiss(tmp_path / "a", faiss.IndexFlatIP(D), [], "e")
    assert (len(empty), empty.dimension, empty.search(unit(1), 2)[0]) == (0, D, [[]])
    empty.export_prepared(tmp_path / "out.npy", tmp_path / "out.json")
    again = Corpus.import_prepared(tmp_path / "b", tmp_path / "out.npy", tmp_path / "out.json", "e")
    assert (len(again), again.dimension) == (0, D)
    assert json.loads(again.export_faiss(tmp_path / "index").read_text()) == []


ROWS = {name: row for row, name in enumerate(NAMES)}
NAN = unit(11).numpy()
NAN[9, 3] = np.nan
PREPARED: dict[str, tuple[Any, Any, str]] = {
    "out of range": (unit(11), {**ROWS, "v3": 11}, r"says row 11 for video 'v3'; .* has 11 rows"),
    "negative": (unit(11), {**ROWS, "v3": -1}, r"says row -1 for video 'v3'"),
    "no number": (unit(11), {**ROWS, "v3": "3"}, r"says row '3' for video 'v3'"),
    "true is no row": (unit(11), {**ROWS, "v1": True}, r"says row True for video 'v1'"),
    "twice": (unit(11), {**ROWS, "v3": 4}, r"gives row 4 to both video 'v3' and video 'v4'"),
    "missing": (unit(12), ROWS, r"names no video for row 11 of .*\(1 such\)"),
    "name twice": (unit(2), '{"a": 0, "a": 1}', r"cannot be read as JSON: it names 'a' twice"),
    "a list": (unit(2), ["a", "b"], r"holds a list; expected an object"),
    "no JSON": (unit(2), '{"a": 0', r"cannot be read as JSON"),
    "one dimension": (torch.ones(3), ROWS, r"holds \(3,\); expected vectors \(N, D\)"),
    "three dimensions": (torch.ones(3, 2, 2), ROWS, r"holds \(3, 2, 2\)"),
    "no width": (torch.ones(3, 0), ROWS, r"holds \(3, 0\); expected vectors \(N, D\) with D > 0"),
    "whole numbers": (torch.ones(11, 2, dtype=torch.int64), ROWS, r"holds int64; expected float16"),
    "not finite": (NAN, ROWS, r"the vector of video 'v9' is not finite in torch.float32"),
    "empty name": (unit(1), {"": 0}, r"not empty, got ''"),
}


@pytest.mark.parametrize("name", PREPARED)
def test_prepared_vectors_that_do_not_fit(tmp_path: Path, name: str) -> None:
    vectors, row_of, message = PREPARED[name]
    with pytest.raises((CorpusError, TypeError), match=message):
        Corpus.import_prepared(tmp_path / "corpus", *prepare(tmp_path, vectors, row_of), "e")
    nothing_is_left(tmp_path / "corpus")


def test_npy_files_that_cannot_be_read(tmp_path: Path) -> None:
    npy, rows = prepare(tmp_path, unit(11), ROWS)

    def refused(message: str) -> None:
        with pytest.raises(CorpusError, match=message):
            Corpus.import_prepared(tmp_path / "corpus", npy, rows, "e")

    data = npy.read_bytes()
    for length in (len(data) - 1, 40, 3, 0):
        npy.write_bytes(data[:length])
        refused(r"vectors.npy' cannot be read as .npy: ")
    np.save(npy, np.array([{}]), allow_pickle=True)
    refused(r"vectors.npy' cannot be read as .npy: ")
    with npy.open("wb") as file:
        np.savez(file, a=np.ones(3))
    refused(r"an archive of arrays; expected vectors")
    npy.unlink()
    refused(r"vectors.npy' cannot be read as .npy: .*No such file")
    npy.write_bytes(data)
    rows.unlink()
    refused(r"docid2row.json' cannot be read as JSON: .*No such file")


def other_index(name: str) -> Any:
    if name == "IndexFlatL2":
        return faiss.IndexFlatL2(D)
    if name == "IndexHNSWFlat":
        return faiss.IndexHNSWFlat(D, 4, faiss.METRIC_INNER_PRODUCT)
    if name == "IndexScalarQuantizer":
        return faiss.IndexScalarQuantizer(D, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexIDMap(faiss.IndexFlatL2(D))


@pytest.mark.parametrize(
    "name", ["IndexFlatL2", "IndexHNSWFlat", "IndexScalarQuantizer", "IndexIDMap over IndexFlatL2"]
)
def test_other_indexes_are_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorpusError, match=f"index is a {name}, and only IndexFlatIP.*import_prepared"):
        Corpus.import_faiss(tmp_path / "corpus", other_index(name), [], "e")
    nothing_is_left(tmp_path / "corpus")


FAISS: dict[str, tuple[Callable[[Path], object], type, str]] = {
    "too few names": (
        lambda f: Corpus.import_faiss(f, flat(), NAMES[1:], "e"),
        CorpusError,
        "11 vectors, 10 video ids",
    ),
    "a name twice": (lambda f: Corpus.import_faiss(f, flat(2), ["a", "a"], "e"), CorpusError, "'a' several vectors"),
    "no string": (lambda f: Corpus.import_faiss(f, flat(2), [0, 1], "e"), TypeError, "strings"),
    "unknown path": (
        lambda f: Corpus.import_faiss(f, flat(1), ["a"], "e", paths={"b": "b.mp4"}),
        CorpusError,
        "paths speaks of video 'b', which the FAISS index lacks",
    ),
    "no index": (lambda f: Corpus.import_faiss(f, f / "none", NAMES, "e"), CorpusError, "none' cannot be read: .*none"),
    "dtype": (lambda f: Corpus.import_faiss(f, flat(), NAMES, "e", "int8"), ValueError, "'int8'"),
    "too large": (lambda f: Corpus.import_faiss(f, large(), NAMES, "e", "float16"), CorpusError, "'v10' is not finite"),
}


def large() -> Any:
    index = flat(10)
    index.add(np.full((1, D), 1e6, np.float32))
    return index


@pytest.mark.parametrize("name", FAISS)
def test_faiss_imports_that_do_not_fit(tmp_path: Path, name: str) -> None:
    call, kind, message = FAISS[name]
    with pytest.raises(kind, match=message):
        call(tmp_path / "corpus")
    nothing_is_left(tmp_path / "corpus")


def nothing_is_left(folder: Path) -> None:
    """The folder is as good as new."""
    assert not folder.exists() or not any(path.is_file() for path in folder.rglob("*"))
    assert len(Corpus.create(folder, D, "e")) == 0


def test_an_import_needs_a_new_folder(tmp_path: Path) -> None:
    made = Corpus.import_faiss(tmp_path / "corpus", flat(), NAMES, "e")
    with pytest.raises(CorpusError, match="already holds a corpus"):
        Corpus.import_faiss(made.folder, flat(), NAMES, "e")
    assert torch.equal(Corpus.open(made.folder).matrix().rows, unit(11))
    (made.folder / "catalogue.sqlite").unlink()  # what is left may be all somebody has
    with pytest.raises(CorpusError, match=r"is not empty \(it holds \['vectors'\]\)"):
        Corpus.import_faiss(made.folder, flat(), NAMES, "e")
    assert len(files(made)) == 3


@pytest.mark.parametrize("moment", ["amid the parts", "before the end"])
def test_a_killed_import_is_no_corpus_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder, insert = tmp_path / "corpus", catalogue.insert
    child = os.fork()
    if child == 0:
        if moment == "amid the parts":
            monkeypatch.setattr(exchange, "insert", lambda c, s, v: os._exit(9) if s.number > 4 else insert(c, s, v))
        else:
            monkeypatch.setattr(catalogue, "flush", lambda path: os._exit(9))
        Corpus.import_faiss(folder, flat(), NAMES, "e")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list((folder / "vectors").iterdir())) == (2 if moment == "amid the parts" else 3)
    with pytest.raises(CorpusError, match="is not a corpus yet: its making has not ended"):
        Corpus.open(folder)
    made = Corpus.import_faiss(folder, flat(4), NAMES[:4], "e")
    assert (Corpus.open(folder).video_ids, files(made)) == (NAMES[:4], ["000001.safetensors"])
    assert sorted(path.name for path in folder.iterdir()) == ["catalogue.sqlite", "vectors"]


def test_two_imports_into_one_folder(tmp_path: Path) -> None:
    identity = catalogue.Identity("e", D, "float32")
    with (
        creation.making(tmp_path / "corpus", identity),
        pytest.raises(CorpusError, match=r"is being made at .*/corpus' by another process"),
    ):
        Corpus.import_faiss(tmp_path / "corpus", flat(), NAMES, "e")
    assert len(Corpus.open(tmp_path / "corpus")) == 0


def test_without_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = Corpus.import_faiss(tmp_path / "corpus", flat(), NAMES, "e")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(BackendUnavailable, match="pip install faiss-cpu"):
        corpus.export_faiss(tmp_path / "index")
    with pytest.raises(BackendUnavailable, match="pip install faiss-cpu"):
        Corpus.import_faiss(tmp_path / "other", "index", NAMES, "e")
    assert torch.equal(vectors_of(corpus), vectors_of(Corpus.open(corpus.folder)))


def test_exports_that_cannot_be_written(tmp_path: Path) -> None:
    corpus = Corpus.import_faiss(tmp_path / "corpus", flat(), NAMES, "e")
    with pytest.raises(CorpusError, match=r"cannot write .*nowhere/index"):
        corpus.export_faiss(tmp_path / "nowhere" / "index")
    with pytest.raises(CorpusError, match=r"cannot write .*nowhere/out.npy"):
        corpus.export_prepared(tmp_path / "nowhere" / "out.npy", tmp_path / "out.json")
    corpus.export_prepared(tmp_path / "out.npy", tmp_path / "out.json")
    with pytest.raises(CorpusError, match=r"cannot write .*nowhere/out.json"):
        corpus.export_prepared(tmp_path / "out.npy", tmp_path / "nowhere" / "out.json")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(CorpusError, match=r"cannot write .*new.npy' and .*taken.json"):
        corpus.export_prepared(tmp_path / "new.npy", tmp_path / "taken.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out.json", "out.npy", "taken.json"]

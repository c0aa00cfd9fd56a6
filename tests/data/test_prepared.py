"""Prepared artefacts: their vectors become a corpus with true times, and nothing vanishes on the way."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.data.prepared_layout import VIDEOS, annotation, unit, write_json, write_lines, write_split
from vsr1.corpus import Corpus
from vsr1.data.annotations import AnnotationError
from vsr1.data.layout import Layout
from vsr1.data.prepared import UNNAMED, import_split
from vsr1.data.prepared_queries import read_queries, recalls
from vsr1.errors import ConfigError, CorpusError
from vsr1.video import decode


@dataclass
class Named:
    """What an import asks of an embedder."""

    identity: str = "the one"
    dimension: int = 8


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return write_split(tmp_path / "charades")


def found(layout: Layout, **options: object) -> dict[str, list[str]]:
    """The videos of each finding."""
    findings = import_split(layout, "train", **options).findings
    return {name: [video for video, _ in rows] for name, rows in findings.items() if rows}


def test_vectors_times_and_frames(layout: Layout) -> None:
    imported = import_split(layout, "train", embedder=Named())
    corpus = Corpus.open(layout.corpus("train"), embedder_id="the one")
    assert corpus.video_ids == list(VIDEOS)
    np.testing.assert_array_equal(corpus.numpy(), unit(1, 2, 3, 4))
    assert [corpus.duration(video) for video in VIDEOS] == [19.5, 20.5, 21.5, 22.5]  # the arrays', not the annotated 20
    frames = decode(corpus.path("V2"), times=[8.0])
    assert (frames.seconds.tolist(), frames.duration) == ([9.0], 20.5)
    assert (imported.arrays, imported.files, imported.lost, imported.fresh) == (4, 0, 0, True)
    assert not any(imported.findings.values())


def test_what_stands_is_left_alone_and_another_is_replaced_on_demand(layout: Layout) -> None:
    import_split(layout, "train")
    before = sorted(path.stat().st_mtime_ns for path in layout.corpus("train").rglob("*"))
    assert not import_split(layout, "train").fresh
    assert sorted(path.stat().st_mtime_ns for path in layout.corpus("train").rglob("*")) == before
    vectors = unit(1, 2, 3, 5)
    np.save(layout.segment_embeddings("train"), vectors)
    for options in ({}, {"embedder": Named()}):
        with pytest.raises(CorpusError, match=r"holds something else .*--again"):
            import_split(layout, "train", **options)
    assert Corpus.open(layout.corpus("train")).embedder_id == UNNAMED
    assert import_split(layout, "train", again=True).fresh
    np.testing.assert_array_equal(Corpus.open(layout.corpus("train")).numpy(), vectors)
    assert [path.name for path in (layout.root / "train").glob("corpus*")] == ["corpus"]


def test_a_failed_replacement_leaves_what_was_there(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    import_split(layout, "train")

    def fails(folder: Path, *_: object) -> None:
        folder.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr("vsr1.data.prepared.exchange.make", fails)
    with pytest.raises(OSError, match="disk full"):
        import_split(layout, "train", embedder=Named(), again=True)
    assert Corpus.open(layout.corpus("train")).embedder_id == UNNAMED


@pytest.mark.parametrize("killed", ["while it was made", "before it took its place", "while the former one went"])
def test_a_kill_leaves_nothing_in_the_way(layout: Layout, killed: str) -> None:
    import_split(layout, "train")
    folder, aside, former = (layout.root / "train" / name for name in ("corpus", "corpus.new", "corpus.former"))
    if killed == "while it was made":
        (aside / "vectors").mkdir(parents=True)
    elif killed == "before it took its place":
        shutil.copytree(folder, aside)
        folder.rename(former)
    else:
        (former / "vectors").mkdir(parents=True)
    import_split(layout, "train", embedder=Named(), again=True)
    assert Corpus.open(folder).embedder_id == "the one"
    assert [path.name for path in folder.parent.glob("corpus*")] == ["corpus"]


def test_nothing_but_a_corpus_is_replaced(layout: Layout) -> None:
    layout.corpus("train").mkdir()
    (layout.corpus("train") / "notes.txt").write_text("mine")
    with pytest.raises(CorpusError, match="is not a corpus"):
        import_split(layout, "train", again=True)
    assert (layout.corpus("train") / "notes.txt").read_text() == "mine"


def test_lost_videos_are_listed(layout: Layout) -> None:
    rows = [annotation(number, f"V{number}") for number in (1, 2, 3, 5, 6)]
    write_lines(layout.annotations("train"), rows)
    write_lines(
        layout.failed("train"), [{"doc_id": "V5", "error": "moov atom not found"}, {"doc_id": "V1", "error": "x"}]
    )
    (layout.frame_arrays("train") / "V2.npy").unlink()
    (layout.frame_arrays("train") / "V3.npy").write_bytes(b"broken")
    assert found(layout) == {
        "failed": ["V5"],  # V1 failed once, but has a vector
        "no vector": ["V6"],
        "no frames": ["V2", "V3"],
        "bad array": ["V3"],
        "not annotated": ["V4"],
    }
    imported = import_split(layout, "train")
    assert imported.lost == 4
    assert Corpus.open(layout.corpus("train")).places().keys() == {"V1", "V4"}
    text = imported.text()
    assert "4 videos are lost" in text and "V5: moov atom not found" in text and "1 LOST, no vector: annotated" in text
    assert "and 1 more" in imported.text(shown=1)


def test_files_are_shown_where_they_are_wanted_or_needed(layout: Layout, tmp_path: Path) -> None:
    for folder in (tmp_path / "films", layout.root / "videos"):
        folder.mkdir()
        for video in ("V1", "V2"):
            (folder / f"{video}.mp4").touch()
    (layout.frame_arrays("train") / "V2.npy").unlink()
    arrays = import_split(layout, "train").corpus.places()
    assert [Path(arrays[video]).name for video in VIDEOS] == ["V1.npy", "V2.mp4", "V3.npy", "V4.npy"]
    (layout.root / "videos").rename(layout.root / "anywhere")
    elsewhere = import_split(layout, "train", again=True).corpus.places()
    assert elsewhere["V2"] == str(layout.root / "anywhere" / "V2.mp4")
    asked = import_split(layout, "train", videos=tmp_path / "films", again=True)
    places = asked.corpus.places()
    assert [Path(places[video]).name for video in VIDEOS] == ["V1.mp4", "V2.mp4", "V3.npy", "V4.npy"]
    assert Path(places["V1"]).parent == tmp_path / "films"
    assert asked.corpus.duration("V1") == 19.5  # still that of its array
    assert asked.corpus.duration("V2") == 20.0  # as annotated: it has no array
    assert (asked.arrays, asked.files) == (2, 2)


def test_without_annotations_and_arrays(layout: Layout) -> None:
    layout.annotations("train").unlink()
    (layout.frame_arrays("train") / "meta.jsonl").unlink()
    names = found(layout)
    assert names == {"no frames": list(VIDEOS), "bad array": list(VIDEOS), "no duration": list(VIDEOS)}


def test_vectors_are_brought_to_unit_length(layout: Layout) -> None:
    vectors = unit(1, 2, 3, 4)
    np.save(layout.segment_embeddings("train"), vectors * np.array([[1], [2.5], [1], [1]], np.float32))
    assert found(layout) == {"not unit": ["V2"]}
    np.testing.assert_allclose(Corpus.open(layout.corpus("train")).numpy(), vectors, atol=1e-6)


def test_half_precision_counts_as_unit(layout: Layout) -> None:
    np.save(layout.segment_embeddings("train"), unit(1, 2, 3, 4).astype(np.float16))
    assert found(layout) == {}


def test_from_the_index_alone(layout: Layout) -> None:
    faiss = pytest.importorskip("faiss")
    layout.segment_embeddings("train").unlink()
    index = faiss.IndexFlatIP(8)
    index.add(unit(4, 3, 2, 1))
    layout.faiss_index("train").parent.mkdir()
    faiss.write_index(index, str(layout.faiss_index("train")))
    write_json(layout.id_map("train"), ["V4", "V3", "V2", "V1"])
    imported = import_split(layout, "train")
    assert "FAISS index" in imported.source
    row = imported.corpus.row("V2")
    np.testing.assert_array_equal(imported.corpus.numpy()[row], unit(2)[0])
    write_json(layout.id_map("train"), {"V4": 0})
    with pytest.raises(CorpusError, match="must be a list of video ids"):
        import_split(layout, "train")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_vector_without_a_direction_is_named(layout: Layout, value: float) -> None:
    vectors = unit(1, 2, 3, 4)
    vectors[2] = value
    np.save(layout.segment_embeddings("train"), vectors)
    with pytest.raises(CorpusError, match=r"0 or not finite, of 'V3' \(1 of 4\)"):
        import_split(layout, "train")
    assert not layout.corpus("train").exists()


def test_what_cannot_be_imported_is_said(layout: Layout) -> None:
    with pytest.raises(CorpusError, match="holds 8-d vectors, the embedder makes 16-d ones"):
        import_split(layout, "train", embedder=Named(dimension=16))
    with pytest.raises(ConfigError, match="split 'test' has no prepared vectors: neither"):
        import_split(layout, "test")
    write_json(layout.docid2row("train"), {f"V1|0.00|{row}.00|7": row for row in range(4)})
    with pytest.raises(CorpusError, match=r"vectors of moments \('V1\|0\.00\|0\.00\|7', 4 such\)"):
        import_split(layout, "train")
    layout.docid2row("train").write_text('{"V1": 0, "V1": 1}')
    with pytest.raises(CorpusError, match="names 'V1' twice"):
        import_split(layout, "train")
    write_json(layout.docid2row("train"), {video: row for row, video in enumerate(VIDEOS)})
    layout.failed("train").write_text('{"doc": 1}\n')
    with pytest.raises(AnnotationError, match=r"failed_docs\.jsonl', line 1: key doc_id is missing"):
        import_split(layout, "train")


def test_queries_by_id_and_what_they_find(layout: Layout) -> None:
    queries = read_queries(layout, "train")
    assert (queries.query_ids, queries.video_ids) == ([f"{n}_fig" for n in (1, 2, 3, 4)], list(VIDEOS))
    np.testing.assert_allclose(queries.by_id()["3_fig"], unit(3)[0], atol=1e-6)  # stored at length 3
    corpus = import_split(layout, "train").corpus
    shares = recalls(queries, corpus)
    assert shares[1] == 0.75 and shares[5] == shares[100] == 1.0
    corpus.delete(["V4"])
    assert recalls(queries, corpus)[100] == 0.75


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda meta, npy: np.save(npy, unit(1, 2, 3)), "holds 3 vectors, 'query_meta.train.jsonl' 4 queries"),
        (
            lambda meta, npy: np.save(npy, unit(1, 2, 3, 4) * np.array([[1], [1], [np.nan], [1]])),
            "the vector of '3_fig' is",
        ),
        (
            lambda meta, npy: np.save(npy, unit(1, 2, 3, 4) * np.array([[1], [0], [1], [1]])),
            "the vector of '2_fig' is 0",
        ),
        (lambda meta, npy: np.save(npy, np.arange(4)), "must hold float vectors"),
        (lambda meta, npy: npy.write_bytes(b""), "cannot be read as .npy"),
        (lambda meta, npy: meta.write_text(meta.read_text().replace("2_fig", "1_fig")), "id '1_fig' occurs twice"),
        (lambda meta, npy: meta.write_text(json.dumps({"qid": "1_fig"})), "line 1: key 'query' is missing"),
        (lambda meta, npy: meta.write_text("\n"), "there are none"),
    ],
)
def test_damaged_queries_are_named(layout: Layout, damage: object, message: str) -> None:
    damage(layout.query_meta("train"), layout.query_embeddings("train"))
    with pytest.raises(AnnotationError) as caught:
        read_queries(layout, "train")
    assert message in str(caught.value)

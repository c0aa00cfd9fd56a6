"""`vsr1 data import`: corpora, what the queries find in them, how near our own vectors are, and the rows checked."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.data.prepared_layout import SYSTEM, VIDEOS, sft, unit, write_json, write_split, write_training_rows
from tests.video.arrays import write_array
from vsr1.corpus import Corpus
from vsr1.data.layout import Layout
from vsr1.data.prepared import closeness, import_split
from vsr1.data.rows import protocol_text
from vsr1.datasets import main
from vsr1.models.embedder import Embedder
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "datasets.md"


@pytest.fixture
def embedder() -> Embedder:
    tokenizer = train_tokenizer(["Represent the user's input.", *(f"<{second}.5 seconds>" for second in range(20))] * 2)
    model = Embedder.tiny(tokenizer, TinyConfig(hidden=64, layers=2, feed_forward=96, vision_hidden=32)).eval()
    model.videos.isolation = "thread"
    return model


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = write_split(tmp_path / "charades")
    write_training_rows(layout)
    return layout


def run(layout: Layout, *flags: str) -> int:
    return main(["import", "charades", "--root", str(layout.root), *flags])


def test_everything_that_is_there_is_imported_and_checked(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(layout) == 0
    said = capsys.readouterr().out
    assert "4 videos, 8-d, embedder unnamed" in said
    assert "4 query vectors find their videos without refinement: R@1 75.0, R@5 100.0" in said
    assert "hard_negatives.json: 4 rows; 0 refused" in said
    assert "train_oneturn.json: 2 rows, 1 matched, 1 not matched; 0 refused" in said
    assert "train.minimal_top1.jsonl: 3 rows, 2 matched, 1 not matched; 0 refused" in said
    assert Corpus.open(layout.corpus("train")).video_ids == list(VIDEOS)
    assert protocol_text(layout.sft) == SYSTEM
    assert run(layout) == 0
    assert "stands already" in capsys.readouterr().out


def test_what_is_lost_sets_the_exit_code(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(layout.sft, [sft(1, "V1", "V1", "It matches.")])
    assert run(layout) == 1
    assert "1 rows, 1 matched, 0 not matched; 3 refused" in capsys.readouterr().out
    write_training_rows(layout)
    (layout.frame_arrays("train") / "V1.npy").unlink()
    assert run(layout, "--again") == 1
    assert "1 LOST, no frames" in capsys.readouterr().out


def test_the_embedder_is_remembered_and_compared(
    layout: Layout, embedder: Embedder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Vectors that the embedder made of the very arrays agree with it; those of two videos changed over do not."""
    rng = np.random.default_rng(0)
    for video in VIDEOS[:2]:
        picture = rng.integers(0, 256, (64, 64, 3), np.uint8)
        write_array(layout.frame_arrays("train"), video, [0.0, 1.0], 2.0, lambda index, picture=picture: picture)
    paths = [layout.frame_arrays("train") / f"{video}.npy" for video in VIDEOS[:2]]
    vectors = embedder.embed_videos(embedder.videos.encode_all(paths)).detach().numpy()
    alike = float(vectors[0] @ vectors[1])
    assert alike < 0.9999
    write_json(layout.docid2row("train"), {"V1": 0, "V2": 1})
    np.save(layout.segment_embeddings("train"), vectors)
    layout.query_embeddings("train").unlink()
    monkeypatch.setattr("vsr1.importing._embedder", lambda arguments: embedder)
    assert run(layout, "--embedder", "it", "--compare", "2") == 1  # V3 and V4 have no vector here
    assert "cosines of imported vectors and this embedder's own: V1 1.0000, V2 1.0000" in capsys.readouterr().out
    assert Corpus.open(layout.corpus("train")).embedder_id == embedder.identity
    np.save(layout.segment_embeddings("train"), vectors[::-1])
    corpus = import_split(layout, "train", embedder=embedder, again=True).corpus
    assert closeness(corpus, embedder, 1) == {"V1": pytest.approx(alike, abs=1e-5)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["import", "charades", "--root", "{root}/absent"], "is no folder"),
        (["import", "tvr", "--root", "{root}"], "no data set 'tvr'"),
        (["import", "charades", "--root", "{root}", "--split", "val"], "has no split 'val': it has train, test"),
        (["import", "charades", "--root", "{root}", "--split", "test"], "split 'test' has no prepared vectors"),
        (["import", "charades", "--root", "{root}/raw_annotation"], "holds no prepared vectors of train, test"),
        (["import", "charades", "--root", "{root}", "--compare", "-1"], "--compare must be at least 0"),
        (["import", "charades"], "--root"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    layout: Layout, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([flag.format(root=layout.root) for flag in flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_another_embedder_is_refused(
    layout: Layout, embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder.save_pretrained(tmp_path / "embedder")
    np.save(layout.segment_embeddings("train"), unit(1, 2, 3, 4))
    assert run(layout, "--embedder", str(tmp_path / "embedder"), "--device", "cpu") == 2
    assert "holds 8-d vectors, the embedder makes 64-d ones" in capsys.readouterr().err


def test_the_example_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    write_training_rows(write_split(tmp_path / "data" / "charades-sta", "test"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "datasets.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("test: corpus") and said[-2:] == ["{1: 0.75, 5: 1.0, 10: 1.0, 100: 1.0}", SYSTEM]

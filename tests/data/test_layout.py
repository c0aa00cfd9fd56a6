"""The folder layout: canonical places, what is found elsewhere, and ActivityNet's two names for a split."""

from __future__ import annotations

from pathlib import Path

import pytest

from vsr1.data.layout import DATASETS, Layout, dataset
from vsr1.errors import ConfigError


def test_benchmarks_by_name_and_alias() -> None:
    assert dataset("charades") is dataset("Charades-STA") is dataset("charades_sta") is DATASETS["charades"]
    assert dataset("charades").splits == ("train", "test")
    assert dataset("didemo").splits == ("train", "val", "test")
    assert (dataset("activitynet").validation, dataset("activitynet").test) == ("val_1", "val_2")
    with pytest.raises(ConfigError, match="no data set 'tvr': known are charades, didemo, activitynet"):
        dataset("tvr")


def test_canonical_places(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    places = [
        layout.annotations("test"),
        layout.corpus("test"),
        layout.query_embeddings("test"),
        layout.query_meta("test"),
        layout.segment_embeddings("test"),
        layout.docid2row("test"),
        layout.failed("test"),
        layout.frame_arrays("test"),
        layout.faiss_index("test"),
        layout.id_map("test"),
        layout.hard_negatives,
        layout.sft,
        layout.pool,
        layout.grpo,
        layout.grpo_stats,
    ]
    assert [path.relative_to(tmp_path).as_posix() for path in places] == [
        "raw_annotation/test.jsonl",
        "test/corpus",
        "test/query_embedding/query_embeddings.test.npy",
        "test/query_embedding/query_meta.test.jsonl",
        "test/video_embedding_1fps/segment_embeds.npy",
        "test/video_embedding_1fps/docid2row.json",
        "test/video_embedding_1fps/failed_docs.jsonl",
        "test/video_npy_with_meta",
        "test/index/index.faiss",
        "test/index/id_map.json",
        "train/hard_negatives.json",
        "sft_data/train_oneturn.json",
        "sft_data/top1_reasoning_grounding.train.jsonl",
        "grpo_data/train.minimal_top1.jsonl",
        "grpo_data/stats.minimal_top1.json",
    ]


def test_annotations_are_found_where_they_lie(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for name in ("charades_fig_test.jsonl", "test.jsonl", "raw_annotation/test.jsonl"):  # each goes before the last
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        assert layout.annotations("test") == path


def test_folders_of_activitynet_have_their_public_names(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert layout.corpus("val_2") == tmp_path / "val_2" / "corpus"
    (tmp_path / "test").mkdir()
    (tmp_path / "test.jsonl").touch()
    assert layout.query_meta("val_2") == tmp_path / "test" / "query_embedding" / "query_meta.test.jsonl"
    assert layout.annotations("val_2") == tmp_path / "test.jsonl"
    (tmp_path / "val_2").mkdir()
    assert layout.query_meta("val_2") == tmp_path / "val_2" / "query_embedding" / "query_meta.val_2.jsonl"
    (tmp_path / "activitynet_fig_val_1.jsonl").touch()
    assert layout.annotations("val_1") == tmp_path / "activitynet_fig_val_1.jsonl"

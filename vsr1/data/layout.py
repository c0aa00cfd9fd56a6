"""Where the parts of a data set lie: the public folder layout, and our corpus in it.

    ROOT/raw_annotation/<split>.jsonl                     annotations (also found as ROOT/<split>.jsonl)
    ROOT/<split>/corpus/                                  the split's videos as a vsr1 corpus
    ROOT/<split>/query_embedding/                         query_embeddings.<split>.npy, query_meta.<split>.jsonl
    ROOT/<split>/video_embedding_1fps/                    segment_embeds.npy, docid2row.json, failed_docs.jsonl
    ROOT/<split>/video_npy_with_meta/                     <video>.npy, meta.jsonl
    ROOT/<split>/index/                                   index.faiss, id_map.json
    ROOT/train/hard_negatives.json
    ROOT/sft_data/, ROOT/grpo_data/

`Dataset` says which splits a benchmark has, `Layout` where their files are. Neither opens anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vsr1.errors import ConfigError


@dataclass(frozen=True)
class Dataset:
    """A benchmark: what it is called, and the names of its splits. `validation` is None where it has none."""

    name: str
    aliases: tuple[str, ...]
    train: str
    validation: str | None
    test: str

    @property
    def splits(self) -> tuple[str, ...]:
        """All of its splits, the training split first."""
        return tuple(split for split in (self.train, self.validation, self.test) if split is not None)


DATASETS: Final = {
    known.name: known
    for known in (
        Dataset("charades", ("charades-sta", "charades_sta"), "train", None, "test"),
        Dataset("didemo", (), "train", "val", "test"),
        Dataset("activitynet", (), "train", "val_1", "val_2"),
    )
}

# ActivityNet's annotations say val_1 and val_2; the folders that are made of them are called val and test.
_ALSO_CALLED: Final = {"val_1": "val", "val_2": "test"}


def dataset(name: str) -> Dataset:
    """The benchmark of that name or alias, however it is capitalised.

    Raises:
        ConfigError: no such benchmark; the message lists those that there are.
    """
    wanted = name.lower()
    for known in DATASETS.values():
        if wanted in (known.name, *known.aliases):
            return known
    raise ConfigError(f"no data set '{name}': known are {', '.join(DATASETS)}")


@dataclass(frozen=True)
class Layout:
    """The places of a data set's files below `root`, whether or not they are there."""

    root: Path

    def annotations(self, split: str) -> Path:
        """The annotation file: the first that is there of raw_annotation/<split>.jsonl, <split>.jsonl and the published
        name <dataset>_fig_<split>.jsonl in either folder; the first where there is none."""
        places = [self.root / "raw_annotation", self.root]
        names = self._names(split)
        plain = [place / f"{name}.jsonl" for name in names for place in places]
        published = [found for name in names for place in places for found in sorted(place.glob(f"*_fig_{name}.jsonl"))]
        return next((path for path in (*plain, *published) if path.is_file()), plain[0])

    def corpus(self, split: str) -> Path:
        return self._folder(split) / "corpus"

    def query_embeddings(self, split: str) -> Path:
        return self._of_queries(split, "query_embeddings", ".npy")

    def query_meta(self, split: str) -> Path:
        return self._of_queries(split, "query_meta", ".jsonl")

    def segment_embeddings(self, split: str) -> Path:
        return self._folder(split) / "video_embedding_1fps" / "segment_embeds.npy"

    def docid2row(self, split: str) -> Path:
        return self._folder(split) / "video_embedding_1fps" / "docid2row.json"

    def failed(self, split: str) -> Path:
        """The list of videos that could not be embedded, one a failed attempt."""
        return self._folder(split) / "video_embedding_1fps" / "failed_docs.jsonl"

    def frame_arrays(self, split: str) -> Path:
        """The folder of frame arrays and their meta.jsonl."""
        return self._folder(split) / "video_npy_with_meta"

    def faiss_index(self, split: str) -> Path:
        return self._folder(split) / "index" / "index.faiss"

    def id_map(self, split: str) -> Path:
        return self._folder(split) / "index" / "id_map.json"

    @property
    def hard_negatives(self) -> Path:
        return self.root / "train" / "hard_negatives.json"

    @property
    def sft(self) -> Path:
        return self.root / "sft_data" / "train_oneturn.json"

    @property
    def pool(self) -> Path:
        return self.root / "sft_data" / "top1_reasoning_grounding.train.jsonl"

    @property
    def grpo(self) -> Path:
        return self.root / "grpo_data" / "train.minimal_top1.jsonl"

    @property
    def grpo_stats(self) -> Path:
        return self.root / "grpo_data" / "stats.minimal_top1.json"

    def _names(self, split: str) -> tuple[str, ...]:
        return (split, _ALSO_CALLED[split]) if split in _ALSO_CALLED else (split,)

    def _folder(self, split: str) -> Path:
        """The split's folder under the name that it has here, the split's own where there is neither."""
        folders = [self.root / name for name in self._names(split)]
        return next((folder for folder in folders if folder.is_dir()), folders[0])

    def _of_queries(self, split: str, kind: str, ending: str) -> Path:
        folder = self._folder(split)
        return folder / "query_embedding" / f"{kind}.{folder.name}{ending}"

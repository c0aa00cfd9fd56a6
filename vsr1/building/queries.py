"""Query texts as vectors, in the public files: row i of `query_embeddings.<split>.npy` is line i of `query_meta.<split>.jsonl`.

Embedding many texts with a large model takes a while, so parts are kept beside the place of the file and a run that was
stopped goes on behind the last one. Vectors are found again by query id: texts occur twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from vsr1.building.standing import digest
from vsr1.command import Progress
from vsr1.data.annotation_files import AnnotationError, read
from vsr1.data.annotation_values import text_of
from vsr1.data.prepared_queries import unit_vectors
from vsr1.errors import ConfigError
from vsr1.files import write_whole
from vsr1.records import Moment

if TYPE_CHECKING:
    from vsr1.models.embedder import Embedder

PART: Final = 1024  # texts in one file of what is done so far
BATCH: Final = 64  # texts embedded together
_AHEAD: Final = ".parts"


def embed(
    embeddings: Path,
    meta: Path,
    moments: Sequence[Moment],
    scores: Mapping[str, float],
    embedder: Embedder,
    progress: Progress,
) -> None:
    """Write vectors (Q, D) float32 and their meta rows; `scores` are the annotations' `fig_desc_score`, by query id."""
    texts = [moment.text for moment in moments]
    version = digest(embedder.identity.encode(), *(text.encode() for text in texts))
    folder = embeddings.parent / _AHEAD
    folder.mkdir(exist_ok=True)
    parts = []
    for begin in range(0, len(texts), PART):
        parts.append(folder / f"{version}-{begin}.npy")
        if not parts[-1].exists():
            vectors = []
            for first in range(begin, min(begin + PART, len(texts)), BATCH):
                with torch.no_grad():
                    vectors.append(embedder.embed_texts(texts[first : min(first + BATCH, begin + PART)]).cpu())
                progress("embed queries", min(first + BATCH, len(texts)), len(texts))
            _save(parts[-1], torch.cat(vectors).numpy())
    rows = (
        {
            "qid": moment.query_id,
            "query": moment.text,
            "pos_doc_id": moment.video_id,
            "weight": 1.0,
            "fig_score": scores.get(moment.query_id),
        }
        for moment in moments
    )
    write_whole(meta, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _save(embeddings, np.concatenate([np.load(part) for part in parts]))
    for part in folder.iterdir():
        part.unlink()
    folder.rmdir()


def _save(path: Path, vectors: np.ndarray) -> None:
    """An .npy file, whole or not at all."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("wb") as file:
        np.save(file, vectors)
    os.replace(aside, path)


def load(embeddings: Path, meta: Path, moments: Sequence[Moment]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """The unit vectors (Q, D) float32 of these moments, in their order, and for each what the meta row says: `query_index` (its
    row) and `fig_score`.

    Raises:
        ConfigError: a query is not among them, or asks something else there.
        AnnotationError: the files do not fit together, or a vector is 0 or not finite.
    """
    places: dict[str, tuple[int, Mapping[str, Any]]] = {}
    try:
        for row, entry in enumerate(read(meta, layout="lines").entries):
            if entry.problem is not None:
                raise AnnotationError(f"query meta '{meta}', {entry.place}: {entry.problem}")
            places[text_of(entry.value, "qid")] = row, entry.value
    except ValueError as error:
        raise ConfigError(f"query embeddings '{embeddings}' with '{meta}' cannot be read: {error}") from error
    vectors = unit_vectors(embeddings, meta, list(places))
    missing = [one for one in moments if one.query_id not in places or places[one.query_id][1].get("query") != one.text]
    if missing:
        raise ConfigError(
            f"'{meta}' lacks {len(missing)} of {len(moments)} queries, or has other words for them, the first is "
            f"'{missing[0].query_id}': give --force to embed the annotations' queries"
        )
    found = [places[moment.query_id] for moment in moments]
    said = [{"query_index": row, "fig_score": value.get("fig_score")} for row, value in found]
    return torch.from_numpy(vectors[[row for row, _ in found]]), said

"""A small annotated data set in the public layout, made of the rendered world's videos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from vsr1.corpus import Corpus
from vsr1.data.annotations import write_fig
from vsr1.data.layout import Layout
from vsr1.data.rows import GrpoRow, SftRow, write_grpo, write_hard_negatives, write_sft
from vsr1.data.world import World
from vsr1.models.embedder import Embedder
from vsr1.records import Moment

SYSTEM = "Is it there?"


def moments(world: World, split: str) -> list[Moment]:
    return [query.moment for query in world.queries(split)]


def reply(moment: Moment, matched: bool) -> str:
    answer = "matched" if matched else "not_matched"
    span = f"<start>{moment.start:g}</start><end>{moment.end:g}</end>" if matched else ""
    return f"<think>Seen.</think><answer>{answer}</answer>{span}<REFINE>"


def write(root: Path, world: World, embedder: Embedder) -> Layout:
    """Annotations, corpora, negatives and rows below `root`; every other SFT row shows the next video instead of the right
    one, and every third GRPO row is repeated as an augmented one."""
    layout = Layout(root)
    for split in ("train", "test"):
        asked = moments(world, split)
        layout.annotations(split).parent.mkdir(parents=True, exist_ok=True)
        write_fig(layout.annotations(split), asked)
        ids = list(dict.fromkeys(str(one.video_id) for one in asked))
        layout.corpus(split).parent.mkdir(parents=True)
        corpus = Corpus.create(layout.corpus(split), embedder.dimension, embedder.identity)
        paths = [world.video_path(video_id).absolute() for video_id in ids]
        features = embedder.videos.encode_all(paths)
        with torch.no_grad():
            vectors = embedder.embed_videos(features)
        corpus.add(ids, vectors, paths=paths, durations=[one.duration for one in features])
    asked = moments(world, "train")
    ids = list(dict.fromkeys(str(one.video_id) for one in asked))
    following = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    taught, learned = [], []
    for number, one in enumerate(asked):
        right, matched = str(one.video_id), number % 2 == 0
        shown = right if matched else following[right]
        taught.append(SftRow(one.query_id, one.text, shown, matched, right, reply(one, matched), SYSTEM))
        row = GrpoRow(one.query_id, one.text, shown, matched, right, one.start, one.end, one.duration)
        learned.append(row)
        if number % 3 == 0:
            learned.append(replace(row, shown=right, matched=True, augmented=True))
    for path in (layout.sft, layout.grpo):
        path.parent.mkdir(exist_ok=True)
    write_sft(layout.sft, taught)
    write_grpo(layout.grpo, learned)
    others = {one.query_id: [name for name in ids[:3] if name != one.video_id] for one in asked}
    write_hard_negatives(layout.hard_negatives, others)
    return layout

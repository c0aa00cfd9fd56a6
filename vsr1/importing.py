"""`vsr1 data import`: prepared public artefacts become a corpus, and the training rows that came with them are checked.

Ends with 0 if all that is there can be used, with 1 if videos or rows are lost, which are listed, and with 2, like every
command, if a corpus cannot be made. A split whose corpus stands already is checked again and left alone.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsr1.command import no_bars, say
from vsr1.errors import ConfigError

if TYPE_CHECKING:
    from vsr1.data.layout import Layout
    from vsr1.data.row_checks import Checked
    from vsr1.models.embedder import Embedder


def declare(commands: Any) -> None:
    """Add `import` to the sub-commands of `vsr1 data`."""
    parser = commands.add_parser(
        "import", help="make corpora of prepared public artefacts, and check what came with them"
    )
    parser.set_defaults(command=_import)
    parser.add_argument("preset", metavar="PRESET", help="charades, didemo or activitynet")
    parser.add_argument(
        "--root", type=Path, required=True, metavar="FOLDER", help="of the data set, in the public layout"
    )
    parser.add_argument(
        "--split", action="append", metavar="S", help="only this one (default: all with prepared vectors)"
    )
    parser.add_argument(
        "--embedder", type=Path, metavar="FOLDER", help="the model that made the vectors: training needs it"
    )
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="show these files instead of the frame arrays")
    parser.add_argument("--compare", type=int, default=4, metavar="N", help="embed N videos again for comparison (4)")
    parser.add_argument("--again", action="store_true", help="replace a corpus that stands there and is another one")
    parser.add_argument("--all", action="store_true", help="print every video and row found, not the first few")
    parser.add_argument("--device", default="auto", help="of the embedder: auto, cpu, cuda or cuda:N")


def _import(arguments: Namespace) -> int:
    from vsr1.data.layout import Layout, dataset
    from vsr1.data.prepared import import_split

    known, layout = dataset(arguments.preset), Layout(arguments.root)
    if not arguments.root.is_dir():
        raise ConfigError(f"'{arguments.root}' is no folder: give the root of the data set")
    if arguments.compare < 0:
        raise ConfigError(f"--compare must be at least 0, got {arguments.compare}")
    for split in arguments.split or ():
        if split not in known.splits:
            raise ConfigError(f"{known.name} has no split '{split}': it has {', '.join(known.splits)}")
    there = [split for split in known.splits if _prepared(layout, split)]
    if not there and not arguments.split:
        raise ConfigError(
            f"'{arguments.root}' holds no prepared vectors of {', '.join(known.splits)}: expected such as "
            f"'{layout.segment_embeddings(known.train)}'; make a corpus of the videos themselves with vsr1 data build"
        )
    embedder = None if arguments.embedder is None else _embedder(arguments)
    lost = 0
    for split in arguments.split or there:
        imported = import_split(layout, split, embedder=embedder, videos=arguments.videos, again=arguments.again)
        say([imported.text(None if arguments.all else 20)])
        say(_compared(layout, split, imported.corpus, embedder, arguments.compare))
        lost += imported.lost
        if split == known.train:
            for checked in _rows(layout, split, imported.corpus):
                say([checked.text(None if arguments.all else 5)])
                lost += checked.refused
    return 1 if lost else 0


def _prepared(layout: Layout, split: str) -> bool:
    return layout.segment_embeddings(split).is_file() or layout.faiss_index(split).is_file()


def _embedder(arguments: Namespace) -> Embedder:
    from vsr1 import job
    from vsr1.engine import open_embedder

    device = job.device_of(arguments.device)
    no_bars()
    return open_embedder(arguments.embedder).to(device)


def _compared(layout: Layout, split: str, corpus: Any, embedder: Embedder | None, count: int) -> list[str]:
    """What the query vectors find, and how near the videos' vectors are to ours."""
    from vsr1.data.prepared import closeness
    from vsr1.data.prepared_queries import read_queries, recalls

    lines = []
    if layout.query_embeddings(split).is_file():
        queries = read_queries(layout, split)
        found = ", ".join(f"R@{depth} {100 * share:.1f}" for depth, share in recalls(queries, corpus).items())
        lines.append(f"  {len(queries)} query vectors find their videos without refinement: {found}")
    if embedder is not None and count:
        cosines = closeness(corpus, embedder, count)
        said = ", ".join(f"{video} {cosine:.4f}" for video, cosine in cosines.items()) or "no video has frames here"
        lines.append(f"  cosines of imported vectors and this embedder's own: {said}")
    return lines


def _rows(layout: Layout, split: str, corpus: Any) -> list[Checked]:
    """The files of training rows that are there, held against annotations and corpus."""
    from vsr1.agent.protocol import parse
    from vsr1.data.row_checks import Known, check_grpo, check_hard_negatives, check_sft
    from vsr1.data.rows import read_grpo, read_hard_negatives, read_sft
    from vsr1.data.validation import validate_file

    annotations = layout.annotations(split)
    moments = validate_file(annotations).moments if annotations.is_file() else []
    known = Known(
        {moment.query_id: moment for moment in moments}, {video: corpus.duration(video) for video in corpus.video_ids}
    )
    checked = []
    if layout.hard_negatives.is_file():
        negatives = read_hard_negatives(layout.hard_negatives)
        checked.append(check_hard_negatives(layout.hard_negatives.name, negatives, known))
    if layout.sft.is_file():
        checked.append(check_sft(layout.sft.name, read_sft(layout.sft), known, parse))
    if layout.grpo.is_file():
        checked.append(check_grpo(layout.grpo.name, read_grpo(layout.grpo), known))
    return checked

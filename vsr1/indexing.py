"""`vsr1 index`: add videos to a corpus of one's own, see what it holds, take some out.

`add` ends with 0 if every file went in, with 1 if more failed than `--allow-failures`, and with 2, like every command, if
the run itself could not go on.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vsr1.command import Parser, bars, chosen, no_bars, say
from vsr1.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """`vsr1 index add|list|info|remove`."""
    return chosen(_parser(), argv, kept="all batches that were done are in the corpus")


def _parser() -> Parser:
    parser = Parser(prog="vsr1 index", description="A corpus of your own videos.")
    commands = parser.add_subparsers(required=True, metavar="add|list|info|remove")
    add = commands.add_parser("add", help="add videos, take in changes, go on after a stop")
    add.set_defaults(command=_add)
    add.add_argument("corpus", type=Path, help="the corpus folder; made if there is none")
    add.add_argument("paths", nargs="+", metavar="DIR_OR_FILE", help="folders of videos, or video files")
    models = add.add_mutually_exclusive_group(required=True)
    models.add_argument("--embedder", type=Path, metavar="FOLDER", help="a model folder: ours, or a Qwen3-VL embedder")
    models.add_argument("--run", type=Path, metavar="RUN", help="a run of vsr1 train, whose embedder is taken")
    add.add_argument("--workers", type=int, default=0, metavar="N", help="files decoded at a time (default: the cores)")
    add.add_argument("--batch", type=int, default=16, metavar="N", help="videos embedded and committed together (16)")
    add.add_argument("--allow-failures", type=int, default=0, metavar="N", help="exit code 0 with up to N failures (0)")
    add.add_argument("--extension", action="append", metavar=".EXT", help="look for these instead of the usual ones")
    add.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    for name, command, described in (
        ("list", _list, "one video a line: id, seconds, path"),
        ("info", _info, "what the corpus holds, and what is wrong with it"),
        ("remove", _remove, "take videos out; their files stay"),
    ):
        other = commands.add_parser(name, help=described)
        other.set_defaults(command=command)
        other.add_argument("corpus", type=Path)
        if name == "remove":
            other.add_argument("video_ids", nargs="*", metavar="ID")
            other.add_argument("--missing", action="store_true", help="also all videos whose file is gone")
    return parser


def _add(arguments: Namespace) -> int:
    for name, least in (("workers", 0), ("batch", 1), ("allow_failures", 0)):
        if getattr(arguments, name) < least:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least {least}, got {getattr(arguments, name)}")
    from vsr1 import ingest, job
    from vsr1.engine import open_embedder
    from vsr1.train.monitor import clock

    device = job.device_of(arguments.device)
    no_bars()
    embedder = open_embedder(arguments.run or arguments.embedder, run=arguments.run is not None).to(device)
    with bars() as progress:
        report = ingest.add(
            arguments.corpus,
            arguments.paths,
            embedder,
            workers=arguments.workers,
            batch=arguments.batch,
            extensions=arguments.extension or ingest.EXTENSIONS,
            progress=progress,
        )
    print(f"corpus '{arguments.corpus}', {clock(report.seconds)}: {report}")
    return 1 if len(report.failures) > arguments.allow_failures else 0


def _list(arguments: Namespace) -> None:
    from vsr1.corpus import Corpus
    from vsr1.ingest.report import shown

    corpus = Corpus.open(arguments.corpus)
    places = corpus.places()
    lines = []
    for video_id in corpus.video_ids:
        duration = corpus.duration(video_id)
        seconds = "-" if duration is None else f"{duration:.2f}"
        lines.append(f"{shown(video_id)}\t{seconds}\t{shown(places.get(video_id, '-'))}")
    say(lines)


def _info(arguments: Namespace) -> None:
    from vsr1.corpus import Corpus
    from vsr1.ingest import FAILURES

    corpus = Corpus.open(arguments.corpus)
    failures = corpus.folder / FAILURES
    known = [one for video_id in corpus.video_ids if (one := corpus.duration(video_id)) is not None]
    size = sum(path.stat().st_size for path in corpus.folder.rglob("*") if path.is_file())
    failed = len(failures.read_text().splitlines()) if failures.is_file() else 0
    say(
        [
            f"corpus '{corpus.folder}'",
            f"videos    {len(corpus)}, {sum(known) / 3600:.2f} hours",
            f"vectors   {corpus.dimension}-d {str(corpus.dtype).removeprefix('torch.')}, embedder {corpus.embedder_id}",
            f"on disk   {size / 1e6:.1f} MB",
            f"no file   {len(_missing(corpus.places()))}",
            f"failed    {failed} at the last add",
        ]
    )


def _remove(arguments: Namespace) -> None:
    from vsr1.corpus import Corpus

    corpus = Corpus.open(arguments.corpus)
    gone = {*arguments.video_ids, *(_missing(corpus.places()) if arguments.missing else ())}
    if not gone and not arguments.missing:
        raise ConfigError("name the videos to remove (vsr1 index list shows them), or give --missing")
    corpus.delete(gone)
    print(f"{len(gone)} videos removed, {len(corpus)} left")


def _missing(places: dict[str, str]) -> list[str]:
    return [video_id for video_id, path in places.items() if not Path(path).exists()]

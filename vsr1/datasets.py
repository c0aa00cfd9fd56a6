"""`vsr1 data`: what there is to do with data sets before anything is trained on them.

`build` makes all that training reads from annotations and videos (`vsr1.building`).

`check` says what is wrong with an annotation file. It ends with 0 if every row can be used, if need be repaired, with 1 if
rows were refused, and with 2, like every command, if the file cannot be read at all. `import` makes corpora of artefacts
that others have prepared (`vsr1.importing`).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from vsr1 import importing
from vsr1.building import flags as build
from vsr1.command import Parser, chosen, say
from vsr1.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """`vsr1 data build|import|check`."""
    return chosen(_parser(), argv, kept="what was finished is kept")


def _parser() -> Parser:
    parser = Parser(prog="vsr1 data", description="Data sets, before anything is trained on them.")
    commands = parser.add_subparsers(required=True, metavar="build|import|check")
    build.add_flags(
        commands.add_parser("build", help="corpus, negatives and training files from annotations and videos")
    )
    check = commands.add_parser("check", help="what is wrong with an annotation file")
    check.set_defaults(command=_check)
    check.add_argument(
        "file", type=Path, help="annotations: FIG, Charades-STA, DiDeMo, ActivityNet, TVR, QVHighlights or own"
    )
    check.add_argument("--format", default="auto", help="name the format instead of having it told by the contents")
    check.add_argument("--videos", type=Path, metavar="FOLDER", help="where the videos lie: what is missing is refused")
    lengths = check.add_mutually_exclusive_group()
    lengths.add_argument(
        "--durations", type=Path, metavar="FILE", help="seconds of the videos: CSV (id, length) or JSON"
    )
    lengths.add_argument("--probe", action="store_true", help="take durations that no row gives from the videos")
    check.add_argument("--spans", default="one", choices=("one", "all"), help="of several for one query (one)")
    check.add_argument("--no-repair", action="store_true", help="refuse what could be repaired")
    check.add_argument("--all", action="store_true", help="print every row found, not the first 20 of a kind")
    importing.declare(commands)
    return parser


def _check(arguments: Namespace) -> int:
    from vsr1.data.annotated_videos import Videos, probed
    from vsr1.data.annotation_formats import FORMATS
    from vsr1.data.validation import validate_file

    if arguments.format not in ("auto", *FORMATS):
        raise ConfigError(f"--format must be one of auto, {', '.join(FORMATS)}, got '{arguments.format}'")
    if arguments.probe and arguments.videos is None:
        raise ConfigError("--probe needs the videos: give --videos FOLDER")
    report = validate_file(
        arguments.file,
        format=arguments.format,
        durations=probed(Videos(arguments.videos)) if arguments.probe else arguments.durations,
        spans=arguments.spans,
        videos=arguments.videos,
        repair=not arguments.no_repair,
    )
    say([report.text(None if arguments.all else 20)])
    return 1 if report.of("refused") else 0

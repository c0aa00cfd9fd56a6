"""The flags of `vsr1 data build`, and the table that it ends with."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vsr1.command import bars, no_bars
from vsr1.errors import ConfigError

if TYPE_CHECKING:
    from vsr1.building.standing import Outcome
    from vsr1.data.teacher import Teacher
    from vsr1.models.embedder import Embedder

KEY = "VSR1_TEACHER_KEY"  # a secret, which has no place among flags


def add_flags(parser: ArgumentParser) -> None:
    """Everything that can be asked for."""
    parser.set_defaults(command=build)
    parser.add_argument(
        "name", nargs="?", metavar="PRESET", help="charades, didemo or activitynet: which splits there are"
    )
    parser.add_argument("--preset", metavar="PRESET", help="the same")
    parser.add_argument("--root", type=Path, required=True, metavar="FOLDER", help="holds annotations and videos")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where everything goes (default: --root)")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="the videos (default: ROOT/videos, else ROOT)")
    parser.add_argument(
        "--annotations",
        action="append",
        default=[],
        metavar="SPLIT=FILE",
        help="of a split, in any format (repeatable)",
    )
    parser.add_argument("--embedder", type=Path, metavar="FOLDER", help="a model folder: ours, or a Qwen3-VL embedder")
    parser.add_argument(
        "--pairs", type=int, default=1000, metavar="N", help="of the pool, that match and that do not (1000)"
    )
    parser.add_argument("--negatives", type=int, default=50, metavar="N", help="hard negatives of a query (50)")
    parser.add_argument("--practice-negatives", type=int, default=24, metavar="N", help="those of a GRPO row (24)")
    parser.add_argument(
        "--match-ratio", type=float, default=1.0, metavar="R", help="GRPO rows that match to others (1)"
    )
    parser.add_argument(
        "--ambiguity-filter",
        type=float,
        metavar="MARGIN",
        help="drop negatives that score at least the right video's score - MARGIN, as the public code does (0.0005)",
    )
    parser.add_argument("--only", metavar="STEP", help="do one step alone")
    parser.add_argument("--force", action="store_true", help="do again what stands, or is stale")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the draws (42)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="files decoded at a time (default: the cores)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    teacher = parser.add_argument_group("a teacher for the rationales", f"its key, if it has one, is read from ${KEY}")
    teacher.add_argument("--teacher", metavar="URL", help="an OpenAI-compatible server: http://localhost:8000/v1")
    teacher.add_argument("--teacher-model", metavar="M", help="what the server calls the model")
    teacher.add_argument("--teacher-requests", type=int, default=8, metavar="N", help="questions at a time (8)")
    teacher.add_argument("--teacher-frames", type=int, default=32, metavar="N", help="of a video, at most (32)")
    teacher.add_argument("--teacher-edge", type=int, default=448, metavar="PIXELS", help="their longer side (448)")
    teacher.add_argument(
        "--teacher-send", default="frames", choices=("frames", "video"), help="frames with times, or the file"
    )
    teacher.add_argument(
        "--teacher-tokens", type=int, default=4096, metavar="N", help="of a reply, thoughts and all (4096)"
    )
    teacher.add_argument("--teacher-timeout", type=float, default=600.0, metavar="S", help="seconds of silence (600)")
    teacher.add_argument(
        "--teacher-failures", type=float, default=10.0, metavar="PERCENT", help="stop above this share (10)"
    )
    teacher.add_argument(
        "--teacher-prices", type=float, nargs=2, default=(0.0, 0.0), metavar=("IN", "OUT"), help="$ a million tokens"
    )
    teacher.add_argument(
        "--teacher-extra", default="{}", metavar="JSON", help="fields laid over each request; null: without"
    )


def build(arguments: Namespace) -> int:
    """`vsr1 data build`; 0 if everything is there, 1 if videos are not in a corpus or rationales failed."""
    names = {name for name in (arguments.name, arguments.preset) if name is not None}
    if len(names) != 1:
        raise ConfigError("name one data set: vsr1 data build charades --root FOLDER (or --preset charades)")
    for name, least in (("pairs", 1), ("negatives", 1), ("practice_negatives", 1), ("match_ratio", 0), ("workers", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if arguments.ambiguity_filter is not None and not arguments.ambiguity_filter >= 0:
        raise ConfigError(f"--ambiguity-filter must be at least 0, got {arguments.ambiguity_filter}")
    teacher = _teacher(arguments)

    from vsr1 import job
    from vsr1.building.steps import STEPS, Building, Settings
    from vsr1.data.layout import dataset

    if arguments.only not in (None, *STEPS):
        raise ConfigError(f"--only must be one of {', '.join(STEPS)}, got '{arguments.only}'")
    device = job.device_of(arguments.device)

    def embedder() -> Embedder:
        from vsr1.engine import open_embedder

        if arguments.embedder is None:
            raise ConfigError("videos and queries need an embedder: give --embedder FOLDER")
        no_bars()
        return open_embedder(arguments.embedder).to(device).eval().requires_grad_(False)

    settings = Settings(
        dataset=dataset(*names),
        root=arguments.root,
        out=arguments.out,
        videos=arguments.videos,
        annotations=_annotations(arguments.annotations),
        pairs=arguments.pairs,
        negatives=arguments.negatives,
        practice=arguments.practice_negatives,
        ratio=arguments.match_ratio,
        margin=arguments.ambiguity_filter,
        teacher=teacher,
        only=arguments.only,
        force=arguments.force,
        workers=arguments.workers,
        device=device,
        seed=arguments.seed,
    )
    with bars() as progress:
        outcomes = Building(settings, embedder, progress, lambda text: print(text, flush=True)).run()
    _table(outcomes)
    return 1 if any(outcome.counts.get("failed") for outcome in outcomes) else 0


def _annotations(given: Sequence[str]) -> dict[str, Path]:
    found = {}
    for one in given:
        split, equals, file = one.partition("=")
        if not (split and equals and file):
            raise ConfigError(f"--annotations must be SPLIT=FILE, got '{one}'")
        found[split] = Path(file)
    return found


def _teacher(arguments: Namespace) -> Teacher | None:
    if (arguments.teacher is None) != (arguments.teacher_model is None):
        raise ConfigError("--teacher URL and --teacher-model M go together")
    if arguments.teacher is None:
        return None
    from vsr1.data.endpoint import Endpoint
    from vsr1.data.teacher import Teacher

    try:
        extra = json.loads(arguments.teacher_extra)
    except ValueError as error:
        raise ConfigError(f"--teacher-extra is no JSON: {error}") from error
    if not isinstance(extra, dict):
        raise ConfigError(f"--teacher-extra must be a JSON object, got {arguments.teacher_extra}")
    if not arguments.teacher_timeout > 0:
        raise ConfigError(f"--teacher-timeout must be above 0, got {arguments.teacher_timeout}")
    return Teacher(
        Endpoint(arguments.teacher, os.environ.get(KEY), timeout=arguments.teacher_timeout),
        arguments.teacher_model,
        requests=arguments.teacher_requests,
        frames=arguments.teacher_frames,
        edge=arguments.teacher_edge,
        send=arguments.teacher_send,
        max_tokens=arguments.teacher_tokens,
        extra=extra,
        failures=arguments.teacher_failures / 100,
        prices=tuple(arguments.teacher_prices),
    )


def _table(outcomes: Sequence[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    for column in ("step", "state", "what", "where"):
        drawn.add_column(column, overflow="fold")
    for one in outcomes:
        what = ", ".join(f"{name} {value}" for name, value in one.counts.items() if name != "again")
        drawn.add_row(one.name, one.state, what, str(one.path))
    Console(width=140, markup=False).print(drawn)

"""The command line: `vsr1 train`, `vsr1 ask`, `vsr1 index` (in `vsr1.indexing`), `vsr1 eval` (in `vsr1.evaluating`),
`vsr1 data` (in `vsr1.datasets`), `vsr1 plan` (in `vsr1.planning`), `vsr1 doctor`.

Every problem a person can mend ends as one line on stderr and exit code 2; Ctrl-C ends with 130 once the work is saved.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vsr1.command import Parser, guarded, no_bars
from vsr1.errors import ConfigError, Vsr1Error

COMMANDS = "train", "ask", "index", "eval", "data", "plan", "doctor"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `vsr1` command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = (
        "usage: vsr1 COMMAND ...\n"
        "  train   render a world, train on it, evaluate, report (every setting is a flag: vsr1 train --help)\n"
        "  ask     ask a trained run for a moment: vsr1 ask runs/tiny 'a small red circle ...'\n"
        "  index   make a corpus of your own videos: vsr1 index add CORPUS FOLDER --run runs/tiny\n"
        "  eval    figures of a run or a file of results, or what differs between two: vsr1 eval runs/a runs/b\n"
        "  data    build, import or check the files of a data set: vsr1 data build charades --root data/charades\n"
        "  plan    memory and time that a recipe takes, before anything is loaded: vsr1 plan --preset charades\n"
        "  doctor  what this machine can run, and why not"
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"vsr1: unknown command '{command}'; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    commands = {
        "train": train,
        "ask": ask,
        "index": index,
        "eval": evaluate,
        "data": data,
        "plan": plan,
        "doctor": doctor,
    }
    return commands[command](rest)


def train(argv: Sequence[str]) -> int:
    """`vsr1 train` and `python -m vsr1.train`."""

    def work() -> None:
        config = parse_train(argv)
        from vsr1 import job

        no_bars()
        job.run(config)

    return guarded(work)


def parse_train(argv: Sequence[str]):  # type: ignore[no-untyped-def]
    """Flags -> `RunConfig` or `DatasetConfig`: `--preset NAME` (for a data set with `--published`, `--memory GB`) or `--quick`
    choose the tree, `--reward NAME=WEIGHT` adds a reward or changes its weight, every other flag changes one field."""
    import tyro

    from vsr1 import config, presets

    first = Parser(prog="vsr1 train", add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=None)
    first.add_argument("--quick", action="store_true")
    first.add_argument("--published", action="store_true")
    first.add_argument("--memory", type=int, default=None)
    first.add_argument("--reward", action="append", default=[])
    chosen, rest = first.parse_known_args(list(argv))
    if chosen.quick and chosen.preset not in (None, "quick"):
        raise ConfigError(f"--quick is a preset of its own; leave out --preset {chosen.preset}")
    name = "quick" if chosen.quick else chosen.preset or "tiny"
    default = presets.preset(name, published=chosen.published, memory=chosen.memory)
    if {"-h", "--help"} & set(rest):
        print(f"presets (--preset NAME, default tiny; --quick is one of them): {', '.join(presets.names())}")
        print(
            "of the data sets' presets: --published (hyper-parameters of the public code), --memory GB (of a GPU; 80)"
        )
        print("rewards of your own (as often as you like): --reward my.module:function=WEIGHT (1 if left out)\n")
        return tyro.cli(type(default), args=rest, default=default, prog="vsr1 train")
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(heard):
            parsed = tyro.cli(type(default), args=rest, default=default, prog="vsr1 train")
    except SystemExit as error:
        # tyro draws its message in a box of several lines; ours is one
        text = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", heard.getvalue()).split())
        raise ConfigError(f"{text or 'the flags cannot be read'} (all flags: vsr1 train --help)") from error
    for given in chosen.reward:
        name, weight = _reward(given)
        parsed.grpo.rewards[name] = weight
    if chosen.reward and "" not in sys.path:
        sys.path.append("")  # a module in the folder the person is in, which `python -m` finds and a script does not
    config.check(parsed)
    return parsed


def _reward(given: str) -> tuple[str, float]:
    """`NAME=WEIGHT` or `NAME`, whose weight is 1; whether there is such a reward is the config's to check."""
    name, equals, weight = given.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError as error:
        raise ConfigError(f"--reward {given}: the weight must be a number, got {weight!r}") from error


def ask(argv: Sequence[str]) -> int:
    """`vsr1 ask RUN TEXT`: one question to a finished run."""

    def work() -> None:
        parser = Parser(prog="vsr1 ask", description="Find the video and the moment a sentence describes.")
        parser.add_argument("run", type=Path, help="a finished run folder, as written by vsr1 train")
        parser.add_argument("text", help="what to look for")
        parser.add_argument("--corpus", type=Path, help="where to look, as made by vsr1 index (default: the run's own)")
        parser.add_argument("--turns", type=int, default=3, help="videos to look at, at most (default 3)")
        arguments = parser.parse_args(list(argv))
        if arguments.turns < 1:
            raise ConfigError(f"--turns must be at least 1, got {arguments.turns}")
        from vsr1.agent.rollout import LoopSettings
        from vsr1.engine import Engine

        no_bars()

        settings = LoopSettings(turns=arguments.turns, fall_back=True)
        found = Engine.open_run(arguments.run, arguments.corpus).ask(arguments.text, settings=settings)
        for number, turn in enumerate(found.turns, 1):
            sure = "" if turn.probability is None else f" ({turn.probability:.0%})"
            print(
                f"turn {number}: {turn.video_id}  score {turn.score:.3f}  {turn.reply.answer}{sure}  {turn.reply.think}"
            )
        if found.failure is not None:
            raise Vsr1Error(found.failure)
        accepted = found.accepted
        if accepted is None and found.fallback is not None:
            best = found.fallback
            print(f"not found; most likely: {best.video_id}  {best.reply.start} to {best.reply.end} s")
        elif accepted is None:
            print("not found")
        else:
            print(f"found: {accepted.video_id}  {accepted.reply.start} to {accepted.reply.end} s")

    return guarded(work)


def index(argv: Sequence[str]) -> int:
    """`vsr1 index`: a corpus of one's own videos."""
    from vsr1 import indexing

    return indexing.main(argv)


def evaluate(argv: Sequence[str]) -> int:
    """`vsr1 eval`: figures of results that are there, or of a policy on a data set."""
    from vsr1 import evaluating, measuring

    given = any(one == "--policy" or one.startswith("--policy=") for one in argv)
    return (measuring if given else evaluating).main(argv)


def doctor(argv: Sequence[str]) -> int:
    """`vsr1 doctor`."""
    from vsr1 import doctor as checks

    return guarded(lambda: checks.main())


def data(argv: Sequence[str]) -> int:
    """`vsr1 data`: the files of data sets."""
    from vsr1 import datasets

    return datasets.main(argv)


def plan(argv: Sequence[str]) -> int:
    """`vsr1 plan`: what a recipe takes."""
    from vsr1 import planning

    return planning.main(argv)


if __name__ == "__main__":
    sys.exit(main())

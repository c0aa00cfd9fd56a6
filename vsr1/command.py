"""What all commands share: flags that complain in one line, errors that end as one line and an exit code, printing."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn, Protocol

from vsr1.errors import ConfigError, Vsr1Error


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (how it is used: {self.prog} --help)")


def no_bars() -> None:
    """Loading a small model is no news; transformers would draw a bar for each."""
    from transformers.utils import logging

    logging.disable_progress_bar()


class Progress(Protocol):
    """Is told how far a phase is: `name` of it, steps `done` of `total`, and what else is worth a word."""

    def __call__(self, name: str, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def bars() -> Iterator[Progress]:
    """Bars with an ETA on stderr (lines where that is no terminal), a new one whenever another phase is told of."""
    from rich.console import Console

    from vsr1.train.monitor import Phase, Terminal

    class Lines(Terminal):
        def say(self, text: str) -> None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)  # one line in a log, however long

    terminal, phases = Lines(Console(stderr=True)), dict[str, Phase]()
    with ExitStack() as open_phase:

        def progress(name: str, done: int, total: int, note: str = "") -> None:
            if name not in phases:
                open_phase.close()  # one bar at a time
                phases[name] = open_phase.enter_context(terminal.phase(name, total, done))
            phases[name].update(done, total, note)

        yield progress


def guarded(work: Callable[[], int | None], kept: str = "finished stages and the last checkpoint are kept") -> int:
    """Run `work`; what a person can mend becomes one line and exit code 2. `kept` is what a Ctrl-C leaves."""
    try:
        return work() or 0
    except Vsr1Error as error:
        from vsr1.train.loop import Interrupted

        print(f"vsr1: {' '.join(str(error).split())}", file=sys.stderr)
        if isinstance(error, Interrupted):
            print("vsr1: run the same command again to go on", file=sys.stderr)
            return 128 + signal.SIGINT
        return 2
    except KeyboardInterrupt:
        print(f"vsr1: stopped; {kept}, the same command goes on", file=sys.stderr)
        return 128 + signal.SIGINT


def chosen(parser: Parser, argv: Sequence[str], kept: str) -> int:
    """Run the sub-command that the flags choose, guarded: each has a default `command`, which takes the flags."""

    def work() -> int | None:
        arguments = parser.parse_args(list(argv))
        command: Callable[[argparse.Namespace], int | None] = arguments.command
        return command(arguments)

    return guarded(work, kept)


def say(lines: Iterable[str]) -> None:
    """Print lines to somebody who may stop reading."""
    try:
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nor is there anybody to tell at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

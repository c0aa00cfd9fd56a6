"""What all commands share: flags that complain in one line, errors that end as one line and an exit code, printing."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from vsr1.errors import ConfigError, Vsr1Error


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything here does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (how it is used: {self.prog} --help)")


def no_bars() -> None:
    """Loading a small model is no news; transformers would draw a bar for each."""
    from transformers.utils import logging

    logging.disable_progress_bar()


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

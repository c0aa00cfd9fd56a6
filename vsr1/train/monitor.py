"""What a long job shows and keeps: phases with progress and ETA on the terminal, JSON lines and TensorBoard on disk.

A job opens one `Monitor` on its run folder; each stage asks it for a `Phase`. On a terminal a live bar is drawn; in a log
file a plain line is printed every few seconds instead.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

_PLAIN_EVERY = 10.0  # seconds between two lines where there is no terminal


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Terminal:
    """Progress of what leaves no log."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """One line for the reader."""
        self.console.print(text, highlight=False)

    @contextmanager
    def phase(self, name: str, total: int, start: int = 0) -> Iterator[Phase]:
        """A phase of `total` steps of which `start` are done already."""
        if self.console.is_terminal:
            bar = Progress(
                TextColumn("[bold]{task.description:<22}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
                refresh_per_second=2,
            )
            with bar:
                phase = Phase(self, name, total, start)
                phase.bar, phase.task = bar, bar.add_task(name, total=total, completed=start, note="")
                yield phase
        else:
            yield Phase(self, name, total, start)


class Monitor(Terminal):
    """Progress and log of one run. `folder` receives `log.jsonl` and `tensorboard/`."""

    def __init__(self, folder: Path, console: Console | None = None) -> None:
        super().__init__(console or Console(stderr=False))
        folder.mkdir(parents=True, exist_ok=True)
        self._log = (folder / "log.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        self._board.close()

    def record(self, stage: str, step: int, **values: float) -> None:
        """Append one JSON line and the TensorBoard scalars of a step."""
        line = {"time": time.time(), "stage": stage, "step": step, **values}
        self._log.write(json.dumps(line) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{stage}/{key}", value, step)


class Silent(Monitor):
    """Says nothing and keeps nothing: for all but the first of several processes that train together."""

    def __init__(self) -> None:
        Terminal.__init__(self, Console(quiet=True))

    def __exit__(self, *_: object) -> None: ...

    def record(self, stage: str, step: int, **values: float) -> None:
        """Nothing."""


class Phase:
    """The progress of one phase."""

    def __init__(self, monitor: Terminal, name: str, total: int, start: int) -> None:
        self.monitor, self.name, self.total, self.start = monitor, name, total, start
        self.bar: Progress | None = None
        self.task: int | None = None
        self._began = self._spoken = time.monotonic()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """`done` steps of `total` are finished."""
        self.total = total or self.total
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, total=self.total, note=note)  # type: ignore[arg-type]
            return
        now = time.monotonic()
        if now - self._spoken >= _PLAIN_EVERY or done == self.total:
            self._spoken = now
            rate = (now - self._began) / max(done - self.start, 1)
            left = clock(rate * (self.total - done))
            self.monitor.say(f"{self.name:<22} {done}/{self.total}  {clock(now - self._began)}  ETA {left}  {note}")
            sys.stdout.flush()

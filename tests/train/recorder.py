"""A monitor for tests of training."""

from __future__ import annotations

from typing import Any


class Recorder:
    """A monitor that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def record(self, stage: str, step: int, **values: float) -> None:
        self.lines.append({"step": step, **values})

    def phase(self, *_: Any, **__: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def update(self, *_: Any, **__: Any) -> None: ...

"""The records that travel through the house: a `Moment` is asked, `Turn`s are taken, a `Trajectory` comes out.

Training turns trajectories into rewards and losses, evaluation into metrics, the report into pictures. They are plain
frozen dataclasses of tensors, numbers and strings, so any of them can be pickled, logged or drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Answer = Literal["matched", "not_matched"]
Stop = Literal["matched", "turns", "limit", "failed"]


@dataclass(frozen=True)
class Moment:
    """One annotated query. `video_id`, `start`, `end` are None where the truth is not known; times in seconds."""

    query_id: str
    text: str
    video_id: str | None = None
    start: float | None = None
    end: float | None = None
    duration: float | None = None


@dataclass(frozen=True)
class Reply:
    """What the policy's text says about one video; times in seconds, None where the text gives none."""

    answer: Answer | None
    start: float | None
    end: float | None
    think: str
    refine: bool


@dataclass(frozen=True)
class Turn:
    """One executed turn: the video shown, what the policy said, and the query vector that found it.

    `rank` is the true video's rank under `query` (None without a truth). `latents` (n, D) are the means the policy
    proposed at `<REFINE>`, `actions` (n, D) what was inserted into the next query; both None when it accepted.
    `number` counts the loop's turns from 1: where several videos are verified in one turn, they share it. `probability` is
    that of the video being right, read off the answer (None where none was given). `rewriting` holds the tokens of a
    refinement in words.
    """

    video_id: str
    score: float
    rank: int | None
    reply: Reply
    text: str
    token_ids: tuple[int, ...]
    token_logps: Tensor
    query: Tensor
    latents: Tensor | None = None
    actions: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    number: int = 1
    probability: float | None = None
    rewriting: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """A query's whole way through the loop. `final_query` (D,) is the last query vector, also when never verified.
    `fallback` is the answer given although nothing matched, if the loop was asked for one; `sample` numbers the
    trajectories of one query."""

    moment: Moment
    turns: tuple[Turn, ...]
    final_query: Tensor | None
    final_rank: int | None
    stop: Stop
    failure: str | None = None
    fallback: Turn | None = None
    sample: int = 0

    @property
    def accepted(self) -> Turn | None:
        """The turn whose video the policy accepted, or None."""
        return self.turns[-1] if self.stop == "matched" else None

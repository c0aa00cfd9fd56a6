"""What is asked of whatever speaks for the policy, and what it answers: the own engine or a server behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature 0 is greedy; top_p keeps the smallest set of likeliest tokens that holds that much probability; max_tokens
    bounds a reply; seed makes sampling repeatable; constrained allows only the two answers after `<answer>`, and only
    times within the video after `<start>` and `<end>`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 96
    seed: int = 0
    constrained: bool = False


@dataclass(frozen=True)
class Question:
    """What the policy is asked about: one query and one shown video; path is its file, for engines that read it."""

    query: str
    video: VideoFeatures
    path: Path


@dataclass(frozen=True)
class Spoken:
    """The text of one reply.

    token_ids end with `<REFINE>` or the turn-closing token unless a limit cut them (`finished` is False then);
    token_logps (n,) float32 on the CPU are their log-probabilities at the sampling temperature, before top_p and
    constraints. matched: log-odds of "matched" against "not_matched" where the answer begins, None where none began.
    """

    token_ids: tuple[int, ...]
    token_logps: Tensor
    matched: float | None
    finished: bool


class Speaker(Protocol):
    """Anything that can speak the policy's text."""

    def speak(
        self,
        policy: Policy,
        questions: Sequence[Question],
        owner: Sequence[int],
        sampling: Sampling,
        *,
        seeds: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[Spoken]:
        """One reply for each entry of `owner`, the number of its question, in that order. seeds: one a reply;
        deadline: a time of `time.monotonic()` at which replies are cut."""
        ...

    def sync(self, policy: Policy) -> None:
        """Speak with the present weights of `policy` from now on."""
        ...

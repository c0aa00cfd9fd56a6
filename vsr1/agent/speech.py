"""What the loop asks of a policy, whoever makes it speak: questions in, spoken replies out.

A `Speaker` is an engine: the package's own (`agent.generate`) or a vLLM server (`agent.vllm`). Both are asked with the
same records and answer with the same, so rollouts, evaluation and serving do not know which one they use. A reply ends
with `<REFINE>` or the turn-closing token, which is kept; soft tokens come later and only from the own engine, because
they need hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vsr1.agent.allowed import ANSWER_TAG, ANSWERS
from vsr1.models.policy import Policy
from vsr1.models.vision import VideoFeatures


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 is greedy. top_p: only the most likely tokens that together hold this share. max_tokens: bounds a
    reply. seed: makes sampling repeatable, within one engine. constrained: behind `<answer>` only the two answers, and
    only times within the video's length.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 96
    seed: int = 0
    constrained: bool = False


@dataclass(frozen=True)
class Question:
    """What the policy is asked about: one query and one shown video. path: the file, for engines that read it themselves."""

    query: str
    video: VideoFeatures
    path: Path


@dataclass(frozen=True)
class Spoken:
    """The text of one reply.

    token_ids: n ids, the closing one included. token_logps: (n,) fp32 on the cpu, log-probabilities under the sampling
    temperature (greedy: under temperature 1): the own engine's before top_p and constraints, which is what training
    compares with; a vLLM server's behind them. matched: log-odds of "matched" against "not_matched" at the answer token,
    under temperature 1; None where no answer was begun. finished: False if a limit cut the reply.
    """

    token_ids: tuple[int, ...]
    token_logps: Tensor
    matched: float | None
    finished: bool


class Speaker(Protocol):
    """An engine that makes a policy speak."""

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
        """One reply per entry of `owner` (the index of its question), in that order.

        seeds: one per reply, instead of those made from `sampling.seed`. deadline, in `time.monotonic()` seconds: what is
        not said by then is cut.
        """
        ...

    def sync(self, policy: Policy) -> None:
        """Make the engine speak with the policy's present weights."""
        ...


@dataclass(frozen=True)
class AnswerToken:
    """Where a reply begins its answer: the token's position, and the ids that would begin each of the two answers."""

    position: int
    matched: int
    not_matched: int


def _first_ids(tokenizer: PreTrainedTokenizerBase, before: str) -> tuple[int, int]:
    first = [tokenizer(before + answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    return first[0], first[1]


def answer_token(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> AnswerToken | None:
    """Find the token of a reply that begins its answer, the first behind the think block; None if there is none.

    A vocabulary may have merged the tag's last characters with the answer's first (`>not`); then that merged token is the
    answer token.
    """

    def said(count: int) -> str:
        return str(tokenizer.decode(list(token_ids[:count]), skip_special_tokens=False))

    text = said(len(token_ids))
    tag = text.find(ANSWER_TAG, max(text.find("</think>"), 0))
    if tag < 0:
        return None
    end = tag + len(ANSWER_TAG)
    low, high = 1, len(token_ids)  # the fewest tokens whose text holds the whole tag
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(said(middle)) >= end else (middle + 1, high)
    if len(said(low)) == end:
        return AnswerToken(low, *_first_ids(tokenizer, "")) if low < len(token_ids) else None
    return AnswerToken(low - 1, *_first_ids(tokenizer, ANSWER_TAG[len(said(low - 1)) - end :]))


def answer_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that `answer_token` may name: what an engine has to report the probability of."""
    pairs = [_first_ids(tokenizer, ANSWER_TAG[begin:]) for begin in range(1, len(ANSWER_TAG) + 1)]
    return sorted({token for first, second in pairs if first != second for token in (first, second)})

"""Random trajectories with everything that can become of a query in them, the same for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vsr1.records import Moment, Reply, Trajectory, Turn

VECTOR = torch.zeros(2)
LATENTS = [torch.zeros(count, 2) for count in range(9)]


def trajectories(count: int, seed: int, *, failures: float = 0.0, together: bool = False) -> list[Trajectory]:
    """Loops of at most three turns over videos `v0` .. `v3`; `together` verifies two videos in some turns."""
    generator = np.random.default_rng(seed)
    return [_one(f"q{index}", generator, failures, together) for index in range(count)]


def _one(query_id: str, generator: np.random.Generator, failures: float, together: bool) -> Trajectory:
    def below(limit: int) -> int:
        return int(generator.integers(limit))

    start = below(40) / 4
    moment = Moment(query_id, f"text of {query_id}", "v0", start, start + 1 + below(40) / 4, 30.0)
    if generator.random() < failures:
        return Trajectory(moment, (), None, None, "failed", "the video cannot be read")
    stop: Any = ("matched", "turns", "limit")[below(3)]
    turns: list[Turn] = []
    length, number = 1 + below(3), 1
    for place in range(length):
        accepts = stop == "matched" and place == length - 1
        answer: Any = "matched" if accepts else ("not_matched", "not_matched", None)[below(3)]
        span: Any = (None, None) if below(4) == 0 else (start + below(8) / 4 - 1, start + 1 + below(40) / 4)
        refined = not accepts and below(4) > 0
        rank = 1 if below(3) == 0 else 1 + below(130)
        tokens = tuple(range(below(40)))
        turns.append(
            Turn(
                f"v{below(4) if below(2) else 0}",
                0.5 - place / 8,
                rank,
                Reply(answer, *span, "", refined or below(3) == 0),
                f"reply {place}",
                tokens,
                VECTOR,
                VECTOR,
                actions=LATENTS[below(9)] if refined else None,
                number=number,
                probability=below(100) / 100,
                rewriting=tuple(range(below(5))) if refined else (),
            )
        )
        number += 0 if together and below(2) else 1
    last = turns[-1].rank
    final = last if turns[-1].actions is None else 1 if below(3) == 0 else 1 + below(130)
    fallback = turns[below(len(turns))] if stop != "matched" and below(2) else None
    return Trajectory(moment, tuple(turns), VECTOR, final, stop, fallback=fallback)

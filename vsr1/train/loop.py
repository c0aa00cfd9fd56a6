"""The one training loop of all stages: steps, schedule, clipping, log, checkpoints, Ctrl-C.

A stage brings its modules and a function that computes the loss of step i. The data of step i depends only on (seed,
stage, i), so a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vsr1.errors import Vsr1Error
from vsr1.train import checkpoint, parallel
from vsr1.train.losses import as_numbers
from vsr1.train.monitor import Monitor
from vsr1.train.optimizer import optimizers
from vsr1.train.precision import masters

StepResult = tuple[Tensor | Iterable[Tensor] | None, dict[str, float]]


class Interrupted(Vsr1Error):
    """The person pressed Ctrl-C; the work is saved."""


@dataclass
class Optimisation:
    """Linear warm-up, then decay to `final_fraction` of the peak: along a cosine, linearly, or none. learning_rate is AdamW's
    peak, muon times it is Muon's (0: AdamW alone)."""

    steps: int
    learning_rate: float
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float = 1.0
    final_fraction: float = 0.05
    muon: float = 2.0
    decay: Literal["cosine", "linear", "none"] = "cosine"

    def rate(self, step: int) -> float:
        """The factor on the peak learning rate at `step`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "none":
            return 1.0
        part = min((step - self.warmup) / max(self.steps - self.warmup, 1), 1.0)
        left = 1 - part if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * part))
        return self.final_fraction + (1 - self.final_fraction) * left


@dataclass(frozen=True)
class Keeper:
    """Where a stage's checkpoints go, how often (seconds), and who is told."""

    folder: Path
    monitor: Monitor
    every: float = 30.0


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C or SIGTERM only raises a flag, so that a step can end and be saved; a second one kills. Not
    where several processes train together: there torchrun passes them on, and itself kills what is left after 30 seconds."""
    pressed = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed and parallel.size() == 1:
            raise KeyboardInterrupt
        pressed = True

    try:
        before = {one: signal.signal(one, remember) for one in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield lambda: False
        return
    try:
        yield lambda: pressed
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def train(
    stage: str,
    modules: nn.Module,
    parameters: list[dict[str, Any]],
    step: Callable[[int], StepResult],
    settings: Optimisation,
    keeper: Keeper,
    *,
    log_every: int = 5,
    save_at: int = 1,
) -> None:
    """Run `stage` from its newest checkpoint to `settings.steps`.

    parameters: optimizer groups (`params`, optional `lr`). step(i) returns (loss, numbers to log), where the loss may come in
    parts that add up: each is differentiated before the next is computed, and numbers may be added meanwhile. It returns
    (None, numbers) where a batch has nothing to learn from: that is logged and no update is made. save_at: checkpoints
    stand behind a multiple of that many steps only. Raises Interrupted after Ctrl-C or SIGTERM, once saved.

    Where several processes train together (`vsr1.train.parallel`), a step's loss is of this one's share; the means of losses
    and gradients over them make the step, the first of them writes, and all stop behind the same one. A checkpoint may be
    continued by another number of them.
    """
    rate, decay = settings.learning_rate, settings.weight_decay
    parallel.begin_alike(modules)
    used = optimizers(modules, parameters, lr=rate, muon=settings.muon, weight_decay=decay)
    with ExitStack() as open_while:
        open_while.enter_context(masters(used))
        done = checkpoint.resume(keeper.folder, stage, modules, used)
        pressed = open_while.enter_context(ctrl_c())
        phase = open_while.enter_context(keeper.monitor.phase(stage, settings.steps, done))
        saved = time.monotonic()
        for index in range(done, settings.steps):
            rate = settings.rate(index)
            for optimizer in used:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
            loss, numbers = step(index)
            numbers = _update(f"stage '{stage}', step {index}", used, loss, numbers, settings.clip)
            if parallel.first() and (index % log_every == 0 or index + 1 == settings.steps):
                keeper.monitor.record(stage, index, learning_rate=settings.learning_rate * rate, **numbers)
            phase.update(index + 1, note=f"loss {numbers['loss']:.3f}" if "loss" in numbers else "nothing to learn")
            stop, last = parallel.anyone(pressed()) and (index + 1) % save_at == 0, index + 1 == settings.steps
            due = time.monotonic() - saved >= keeper.every and (index + 1) % save_at == 0
            if parallel.first() and (stop or due or last):
                checkpoint.save(keeper.folder, stage, index + 1, modules, used)
                saved = time.monotonic()
            if stop or last:
                parallel.wait()
            if stop:
                raise Interrupted(f"stopped in stage '{stage}' after step {index + 1} of {settings.steps}; it is saved")


def _update(
    where: str,
    used: Sequence[torch.optim.Optimizer],
    loss: Tensor | Iterable[Tensor] | None,
    numbers: dict[str, float],
    clip: float,
) -> dict[str, float]:
    """Differentiate the parts of a loss and, if there were any, update all weights. Returns the numbers to log, with the loss
    and the length of its gradient; with several processes, means of theirs."""
    parts = []
    for part in [loss] if isinstance(loss, Tensor) else loss or ():
        part.backward()
        parts.append(part.detach())
    weights = [weight for optimizer in used for group in optimizer.param_groups for weight in group["params"]]
    if not parallel.average_gradients(weights):
        return parallel.mean(numbers)
    length = nn.utils.clip_grad_norm_(weights, clip)
    # Read only now, so that a GPU is waited for once; nothing has been updated yet.
    numbers |= as_numbers(loss=torch.stack(parts).sum() if parts else length.new_zeros(()), gradient_norm=length)
    numbers = parallel.mean(numbers)
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(numbers[name]):
            raise Vsr1Error(f"{where}: the {name} is {numbers[name]}; lower the learning rate")
    for optimizer in used:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # now: what comes before the next loss needs the room
    return numbers

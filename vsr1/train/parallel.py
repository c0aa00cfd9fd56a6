"""Data parallel training: the processes that torchrun started share each step's rows and average what they learned.

`torchrun --nproc-per-node N -m vsr1.train ..` starts N processes; every one holds the whole model and runs the same job. In
`group` they find each other. A stage draws the data of a step as if it were alone, so all draw the same, and takes its
`share`. A loss that is a mean divides by `per_process(count)`, the count of all shares over the number of processes, so that
the mean of the processes' losses, gradients and figures is what one process would find with the whole. Only the `first` one
writes. Alone, all of this is nothing: a share is everything, and means are what they were.

Whatever is exchanged through the hosts comes before what goes from GPU to GPU, so that a process that died is noticed by its
closed connection and not by a collective that never ends. Where it only hangs, the others wait for `PATIENCE`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vsr1.errors import ConfigError, Vsr1Error

PATIENCE = timedelta(minutes=30)  # between steps: a checkpoint or a validation of the first process, a slow rollout
_LONG = timedelta(days=7)  # between stages: whatever the first process does alone
BUCKET_BYTES = 256 << 20  # of gradients that are sent at once; they are copied for it
_long: list[Any] = []  # the group of `wait`

Item = TypeVar("Item")


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did, as long as the context is open; yields the device of this one:
    its own GPU where `device` is one. ConfigError if there are too few."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield device
        return
    if device.type == "cuda":
        own, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= count:
            raise ConfigError(
                f"torchrun started more processes than there are GPUs here ({count}): lower --nproc-per-node"
            )
        device = torch.device("cuda", own)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    _long.append(dist.new_group(backend="gloo", timeout=_LONG))
    yield device
    # not after an error: the others may be gone, and would be waited for
    _long.clear()
    dist.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def cores() -> int:
    """The processors that this process may count on: its part of the machine's."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def share(items: Sequence[Item]) -> list[Item]:
    """What this process takes of the items of a step, which are the same in all: every `size`-th one. Without any, it still
    takes part in the step."""
    return list(items[rank() :: size()])


def per_process(count: float) -> float:
    """What a sum over this process' share is divided by, so that the mean over processes is the mean over all shares: the
    sum of `count` over all, by their number. All processes call it together, also those that count 0."""
    if size() == 1:
        return count
    total = torch.tensor(float(count), dtype=torch.float64)
    _reduce(total, dist.ReduceOp.SUM)
    return total.item() / size()


def mean(numbers: Mapping[str, float], *, absent: float | None = None) -> dict[str, float]:
    """Each figure's mean over the processes that have it; `absent` is what the others count as, if anything."""
    if size() == 1:
        return dict(numbers)
    told: list[Any] = [None] * size()
    with _together():
        dist.all_gather_object(told, dict(numbers))
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for one in told for name in one):
        values = [one[name] for one in told if name in one]
        if absent is not None:
            values += [absent] * (len(told) - len(values))
        found[name] = sum(values) / len(values)
    return found


def anyone(flag: bool) -> bool:
    """Whether any process says so."""
    if size() == 1:
        return flag
    said = torch.tensor(int(flag))
    _reduce(said, dist.ReduceOp.MAX)
    return bool(said)


def wait() -> None:
    """Until all processes are here, however long one works alone before."""
    if size() > 1:
        with _together():
            dist.all_reduce(torch.zeros(1), group=_long[0])


@contextmanager
def first_alone() -> Iterator[None]:
    """What is inside, the first process does before all others: they find it done."""
    if not first():
        wait()
    yield
    if first():
        wait()


def begin_alike(modules: nn.Module) -> None:
    """Give all processes the first one's trainable weights: what was drawn at random may differ."""
    if size() > 1:
        with _together():
            for weight in modules.parameters():
                if weight.requires_grad:
                    dist.broadcast(weight.detach(), 0)


def average_gradients(weights: Sequence[Tensor]) -> bool:
    """Replace each gradient by its mean over the processes, where a process without one counts as zero; a weight that has
    none anywhere keeps none. Returns whether there was any. In a few large messages."""
    there = torch.tensor([weight.grad is not None for weight in weights], dtype=torch.uint8)
    if size() > 1:
        _reduce(there, dist.ReduceOp.MAX)
        learned = [weight for weight, one in zip(weights, there.tolist(), strict=True) if one]
        for bucket in _buckets(learned):
            gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
            flat = torch.cat([one.flatten() for one in gradients])
            _reduce(flat, dist.ReduceOp.SUM)
            flat /= size()
            parts = flat.split([one.numel() for one in gradients])
            for weight, gradient, part in zip(bucket, gradients, parts, strict=True):
                weight.grad = gradient.copy_(part.view_as(gradient))
    return bool(there.any())


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of weights of one kind, of at most `BUCKET_BYTES` unless one weight has more."""
    bucket: list[Tensor] = []
    held = 0
    for weight in weights:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (weight.dtype, weight.device)
        if bucket and (not alike or held + weight.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, held = [], 0
        bucket.append(weight)
        held += weight.nbytes
    if bucket:
        yield bucket


def _reduce(values: Tensor, how: Any) -> None:
    with _together():
        dist.all_reduce(values, how)


@contextmanager
def _together() -> Iterator[None]:
    """What torch says when another process is gone, as a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise Vsr1Error(
            f"process {rank()} of {size()} waited for the others in vain: one has ended, and its own message says why, or has "
            f"hung for {PATIENCE}"
        ) from error

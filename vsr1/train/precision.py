"""Training of weights in half precision: each has a float32 master that learns in its place.

A bfloat16 weight has 8 significant bits: an update smaller than a 512th of the weight rounds to nothing, and at the learning
rates of a large model nearly all of them are. So the optimizer holds masters. A gradient goes to the master as soon as it is
complete, where the parts of a step add up in float32, and leaves the weight at once; behind every update the weight is
the master, rounded. A weight so costs 2 bytes and 16 for its master (4), its gradient (4) and AdamW's two moments (8), which
is as much as training in float32; what is halved are activations, the cache and the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vsr1.errors import Vsr1Error

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def masters(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """While the context is open, `optimizers` (which have taken no step yet) update float32 masters of their half-precision
    parameters, which stand in their `param_groups`, and their `state_dict` holds the masters. Other parameters stay as they
    are."""
    hooks: list[Any] = []
    try:
        for optimizer in optimizers:
            hooks += _masters(optimizer)
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _masters(optimizer: torch.optim.Optimizer) -> list[Any]:
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    hooks: list[Any] = []
    for group in optimizer.param_groups:
        for place, weight in enumerate(group["params"]):
            if weight.dtype in HALF:
                master = nn.Parameter(weight.detach().float())
                group["params"][place] = master
                pairs.append((weight, master))
                hooks.append(weight.register_post_accumulate_grad_hook(_hand_over(master)))

    @torch.no_grad()
    def give_back(*_: Any) -> None:
        for weight, master in pairs:
            weight.copy_(master)

    def keep(_: Any, state: dict[str, Any]) -> None:
        if pairs:
            state["masters"] = [master.detach() for _, master in pairs]

    @torch.no_grad()
    def restore(_: Any, state: dict[str, Any]) -> None:
        kept = state.get("masters", ())
        if [one.shape for one in kept] != [master.shape for _, master in pairs]:
            raise Vsr1Error(
                f"the checkpoint has float32 masters of {len(kept)} weights, and {len(pairs)} of other shapes or number are "
                "trained in half precision: go on in the precision it began with"
            )
        for (_, master), one in zip(pairs, kept, strict=True):
            master.copy_(one)

    hooks.append(optimizer.register_step_post_hook(give_back))
    hooks.append(optimizer.register_state_dict_post_hook(keep))
    hooks.append(optimizer.register_load_state_dict_pre_hook(restore))
    return hooks


def _hand_over(master: nn.Parameter) -> Any:
    def hand_over(weight: Tensor) -> None:
        assert weight.grad is not None
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    return hand_over

"""The refine head as the soft-token step sees it: its modules, and their weights where those are all there is to them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


class RefineModules(Protocol):
    """The part of a refine head this op reads (see `vsr1.models.refine`); H: the policy's width, D: the query's."""

    @property
    def refine_projector(self) -> nn.Module:
        """Linear(H, D) - LayerNorm - GELU - Linear(D, D)."""
        ...

    @property
    def refine_gate(self) -> nn.Module | None:
        """Linear(H, 1), whose sigmoid scales the mean; None for no gate."""
        ...

    @property
    def refine_latent_input_projector(self) -> nn.Module:
        """LayerNorm - Linear(D, H)."""
        ...


class HeadWeights(NamedTuple):
    """The head as arrays: `tensors` are weight and bias of first, norm, second, input norm and input layer, and of the gate."""

    tensors: list[Tensor]
    epsilons: list[float]
    """Of the two norms."""


def plain_weights(head: RefineModules) -> HeadWeights | str:
    """The head's weights; or why reading them is not the same as calling its modules, as half a sentence."""
    projector, reader = _parts(head.refine_projector), _parts(head.refine_latent_input_projector)
    kinds = [type(part) for part in (*projector, *reader)]
    if kinds != [nn.Linear, nn.LayerNorm, nn.GELU, nn.Linear, nn.LayerNorm, nn.Linear]:
        found = ", ".join(kind.__name__ for kind in kinds)
        return f"reads the weights of Linear, LayerNorm, GELU, Linear and LayerNorm, Linear; this head has {found}"
    first, norm, activation, second, input_norm, last = *projector, *reader
    gate = [] if head.refine_gate is None else [head.refine_gate]
    if gate and type(gate[0]) is not nn.Linear:
        return f"reads the weights of a gate that is a Linear; this one is {type(gate[0]).__name__}"
    layers = [first, norm, second, input_norm, last, *gate]
    for module in (head.refine_projector, head.refine_latent_input_projector, activation, *layers):
        if _is_changed(module):
            return f"reads weights and calls no module, but {type(module).__name__} has hooks or a forward of its own"
    if activation.approximate != "none":
        return f"computes GELU exactly; this head's is approximated by {activation.approximate}"
    tensors = [layer._parameters.get(name) for layer in layers for name in ("weight", "bias")]
    if any(type(tensor) is not nn.Parameter and type(tensor) is not Tensor for tensor in tensors):
        return "reads layers with a weight and a bias that are ordinary tensors"
    weight = tensors[0]
    (D, H), dtype, device = weight.shape, weight.dtype, weight.device
    shapes = [(D, H), (D,), (D,), (D,), (D, D), (D,), (D,), (D,), (H, D), (H,), (1, H), (1,)]
    for tensor, shape in zip(tensors, shapes, strict=False):  # the last two are the gate's
        if tensor.dtype != dtype or tensor.device != device or tensor.shape != shape:
            return (
                f"reads weights of one type, one device and matching shapes; beside {dtype} {(D, H)} on {device} this head has "
                f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    return HeadWeights(tensors, [norm.eps, input_norm.eps])


def _parts(module: nn.Module) -> list[Any]:
    return list(module) if type(module) is nn.Sequential else [module]


def _is_changed(module: Any) -> bool:
    own = module.__dict__
    return "forward" in own or any(
        own[hooks] for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )

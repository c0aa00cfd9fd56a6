"""How a soft-token step is computed: the formula, the custom op `vsr1::soft_token_step`, its gradient and its backends.

The op takes the weights of a head whose modules hold nothing else (`vsr1.ops._soft_head.plain_weights`). Between its passes
it keeps the inputs, mean and action; the backward pass is torch for all backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vsr1.ops import _cuda_code, _soft_cuda
from vsr1.ops._dispatch import Backend, cpu_only, cuda_only, extension_missing, register, resolve, triton_missing
from vsr1.ops._noise import NoiseStream, philox_normal

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
Map = Callable[[Tensor], Tensor]
MOST_FLOAT_ROWS = 32  # on the CPU
MOST_GPU_ROWS = 64  # behind that the products are no longer bound by reading the weights, and cuBLAS serves better


def compute(
    state: Tensor, projector: Map, gate: Map | None, reader: Map, sigma: float, noise: NoiseStream | None
) -> Outputs:
    """Mean, action, logp and policy input of `state` (B, H), which has the type of the maps: the op in plain torch."""
    mean = projector(state)
    if gate is not None:
        mean = mean * torch.sigmoid(gate(state))
    # A half-precision action would round the noise away and its log-probability with it.
    mean = mean.to(torch.promote_types(mean.dtype, torch.float32))
    if sigma > 0 and noise is not None:
        action = mean + sigma * philox_normal(mean.shape, noise, device=mean.device).to(mean.dtype)
        logp = gaussian_logp(action.detach(), mean, sigma)
    else:
        action, logp = mean, mean.new_zeros(mean.shape[0])
    return mean, action, logp, reader(action.to(state.dtype))


def gaussian_logp(action: Tensor, mean: Tensor, sigma: float) -> Tensor:
    """Log-density of `action` (..., D) under N(mean, sigma^2 I), **averaged over the D coordinates**; shape (...).

    (1/D) sum_d [ -(a_d - m_d)^2 / (2 sigma^2) - log sigma - log(2 pi) / 2 ].

    The average and not the sum, because what it feeds is a clipped probability ratio: for D = 2048 the joint density
    ratio leaves any clip range after a step no single coordinate would notice, while the geometric mean over
    coordinates keeps the scale of one token's ratio. At ratio 1 the gradient is the true score divided by D: same
    direction, a scale that belongs to the loss weight. GSPO makes the same choice for the tokens of a sequence (arXiv
    2507.18071).

    Raises ValueError for sigma <= 0 or shapes that differ.
    """
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"a density needs a finite sigma above 0; got {sigma}")
    if action.shape != mean.shape:
        raise ValueError(f"action {tuple(action.shape)} and mean {tuple(mean.shape)} must have one shape")
    return log_density(sigma) - ((action - mean) / sigma).square().mean(-1) / 2


def log_density(sigma: float) -> float:
    """Of a coordinate at its mean; 0 for sigma 0, where there is no density."""
    return -math.log(sigma) - math.log(2 * math.pi) / 2 if sigma else 0.0


# Not torch.library.custom_op, whose first call imports torch._dynamo: two seconds of everybody's first step.
torch.library.define(
    "vsr1::soft_token_step",
    "(Tensor state, Tensor[] weights, float[] epsilons, float sigma, int seed, int offset, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
soft_step = torch.ops.vsr1.soft_token_step.default


@torch.library.impl("vsr1::soft_token_step", "default")
def _step(
    state: Tensor,
    weights: list[Tensor],
    epsilons: list[float],
    sigma: float,
    seed: int,
    offset: int,
    backend: str,
) -> Outputs:
    """`compute` for a `plain_weights` head; seed is the stream's as a signed number, sigma 0 asks for no noise."""
    state, weights = state.contiguous(), [weight.contiguous() for weight in weights]
    facts = {"named": backend != "auto", "state": state, "weights": weights, "sigma": sigma}
    name = resolve("soft_query", backend, device=state.device, dtype=state.dtype, **facts)
    return _IMPLEMENTATIONS[name](state, weights, epsilons, sigma, seed % 2**64, offset)


@torch.library.register_fake("vsr1::soft_token_step")
def _(state: Tensor, weights: list[Tensor], *_: Any) -> Outputs:
    return new_outputs(state, weights)


def new_outputs(state: Tensor, weights: list[Tensor]) -> Outputs:
    """Outputs to write: float32, or what the state has if that is wider; the policy input has the state's type."""
    rows, D = state.shape[0], weights[0].shape[0]
    wide = torch.promote_types(state.dtype, torch.float32)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=wide, device=state.device)

    return new(rows, D), new(rows, D), new(rows), torch.empty_like(state)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    state, weights, ctx.epsilons, ctx.sigma = inputs[:4]
    mean, action, _, _ = output
    ctx.save_for_backward(state, mean, action, *weights)


def _gradient(ctx: Any, d_mean: Tensor, d_action: Tensor, d_logp: Tensor, d_input: Tensor) -> tuple[Any, ...]:
    """Gradients in state and weights: the chain rule in plain torch, from the last layer to the first.

    d_x is the gradient in x. What a layer read is computed again from the nearest thing kept, at the cost of one product.
    """
    state, mean, action, *weights = ctx.saved_tensors
    first, first_bias, norm, norm_bias, second, _, read_norm, read_norm_bias, read, _, *gate = weights
    wanted = ctx.needs_input_grad[1]
    found: list[Tensor | None] = [None] * len(weights)

    def linear(place: int, d_out: Tensor, entered: Tensor) -> None:
        """Gradients in the layer whose weight is number `place`."""
        found[place] = d_out.T @ entered if wanted[place] else None
        found[place + 1] = d_out.sum(0) if wanted[place + 1] else None

    read_normed, read_moments = _normalise(action.to(state.dtype), read_norm, read_norm_bias, ctx.epsilons[1])
    linear(8, d_input, read_normed)
    d_narrow, found[6], found[7] = _normalise_gradient(d_input @ read, *read_moments, wanted[6:8])
    d_mean = d_mean + d_action + d_narrow.to(mean.dtype)
    if ctx.sigma > 0:
        d_mean = d_mean + d_logp[:, None] * (action - mean) / (ctx.sigma**2 * mean.shape[1])
    d_state: Tensor | float = 0.0
    if gate:
        opened = torch.sigmoid(F.linear(state, *gate))
        d_opened = ((d_mean * mean).sum(1, keepdim=True) * (1 - opened)).to(state.dtype)
        linear(10, d_opened, state)
        d_state = d_opened @ gate[0]
        d_mean = d_mean * opened
    d_soft = d_mean.to(state.dtype)
    normed, moments = _normalise(F.linear(state, first, first_bias), norm, norm_bias, ctx.epsilons[0])
    linear(4, d_soft, F.gelu(normed))
    d_normed = torch.ops.aten.gelu_backward(d_soft @ second, normed)
    d_first, found[2], found[3] = _normalise_gradient(d_normed, *moments, wanted[2:4])
    linear(0, d_first, state)
    return d_first @ first + d_state, found, None, None, None, None, None


def _normalise(row: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, tuple[Any, ...]]:
    """LayerNorm of `row`, and what its gradient takes."""
    shape = list(weight.shape)
    normed, centre, scale = torch.native_layer_norm(row, shape, weight, bias, epsilon)
    return normed, (row, shape, centre, scale, weight, bias)


def _normalise_gradient(d_normed: Tensor, *taken: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In the row, the weight and the bias; the last of `taken` says whether the latter two are wanted."""
    *forward, wanted = taken
    return torch.ops.aten.native_layer_norm_backward(d_normed, *forward, [True, *wanted])


torch.library.register_autograd("vsr1::soft_token_step", _gradient, setup_context=_remember)


def _reference(
    state: Tensor, weights: list[Tensor], epsilons: list[float], sigma: float, seed: int, offset: int
) -> Outputs:
    first, first_bias, norm, norm_bias, second, second_bias, read_norm, read_norm_bias, read, read_bias, *gate = weights

    def projector(state: Tensor) -> Tensor:
        normed = F.layer_norm(F.linear(state, first, first_bias), norm.shape, norm, norm_bias, epsilons[0])
        return F.linear(F.gelu(normed), second, second_bias)

    def reader(action: Tensor) -> Tensor:
        normed = F.layer_norm(action, read_norm.shape, read_norm, read_norm_bias, epsilons[1])
        return F.linear(normed, read, read_bias)

    opens = (lambda state: F.linear(state, *gate)) if gate else None
    mean, action, logp, policy_input = compute(state, projector, opens, reader, sigma, NoiseStream(seed, offset))
    return mean, action.clone() if action is mean else action, logp, policy_input


def _cpu(state: Tensor, weights: list[Tensor], epsilons: list[float], sigma: float, seed: int, offset: int) -> Outputs:
    """In C++ (csrc/cpu/soft_query.cpp), on as many threads as torch uses."""
    from vsr1._C import soft_token_step

    outputs = new_outputs(state, weights)
    soft_token_step(
        hidden=state.data_ptr(),
        weights=[weight.data_ptr() for weight in weights] + [0] * (12 - len(weights)),
        bfloat16=state.dtype == torch.bfloat16,
        rows=state.shape[0],
        width=state.shape[1],
        query_width=weights[0].shape[0],
        epsilons=epsilons,
        sigma=sigma,
        seed=seed,
        offset=offset,
        threads=torch.get_num_threads(),
        outputs=[output.data_ptr() for output in outputs],
    )
    return outputs


def _triton(
    state: Tensor, weights: list[Tensor], epsilons: list[float], sigma: float, seed: int, offset: int
) -> Outputs:
    """In five launches (kernels/soft_query.py)."""
    from vsr1.kernels.soft_query import step

    outputs = new_outputs(state, weights)
    step(state, weights, epsilons, sigma, seed, offset, log_density(sigma), outputs)
    return outputs


def _cuda(state: Tensor, weights: list[Tensor], epsilons: list[float], sigma: float, seed: int, offset: int) -> Outputs:
    """In one launch (csrc/cuda/soft_query.cuh)."""
    outputs = new_outputs(state, weights)
    _soft_cuda.step(state, weights, epsilons, sigma, seed, offset, log_density(sigma), outputs)
    return outputs


def _cpu_refuses(
    *,
    device: torch.device,
    dtype: torch.dtype,
    unfit: str | None = None,
    named: bool = True,
    state: Tensor | None = None,
    sigma: float = 0.0,
    **_: Any,
) -> str | None:
    if unfit is not None or state is None:
        return unfit
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes float32 and bfloat16 heads; this one is {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float32 and len(state) > MOST_FLOAT_ROWS and not sigma and not named:
        return f"serves more than {MOST_FLOAT_ROWS} rows of float32 without noise where it is named; torch is as fast there"
    return cpu_only(device=device)


def _triton_refuses(
    *, device: torch.device, dtype: torch.dtype, unfit: str | None = None, state: Tensor | None = None, **_: Any
) -> str | None:
    if unfit is not None or state is None:
        return unfit
    if dtype == torch.float64:
        return "takes float32, bfloat16 and float16 heads; this one is float64"
    if dtype == torch.bfloat16 and device.type == "cpu":
        return "runs on CPU tensors in Triton's interpreter only, which computes bfloat16 wrongly"
    if not 0 < len(state) <= MOST_GPU_ROWS:
        return f"takes 1 to {MOST_GPU_ROWS} rows; these are {len(state)}"
    return cuda_only(device=device)


def _cuda_refuses(*, device: torch.device, unfit: str | None = None, **facts: Any) -> str | None:
    if unfit is not None or facts.get("state") is None:
        return unfit
    return _triton_refuses(device=device, **facts) or _soft_cuda.refuses(**facts)


_IMPLEMENTATIONS = {"cpu": _cpu, "cuda": _cuda, "triton": _triton, "reference": _reference}
register(
    "soft_query",
    cpu=Backend(extension_missing, _cpu_refuses),
    cuda=Backend(lambda: triton_missing() or _cuda_code.missing(), _cuda_refuses),
    triton=Backend(triton_missing, _triton_refuses),
    reference=Backend(),
)

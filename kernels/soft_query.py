"""The soft-token step on a GPU, in five launches: product, row work, product, row work, product.

The three products are bound by reading their weights once (few rows of hidden states), so each is split over output columns: a
program streams 16 lines of a weight matrix past all rows of the left factor, enough programs for every multiprocessor at
D = 2048. What stands between the products needs whole rows: LayerNorm and GELU; then the gate, the noise, the action, its
log-probability and the next LayerNorm. One program does that for one row, in launches of their own: done by the products'
programs instead, each of the 128 would repeat the work of all rows, which from 16 rows on takes longer than a launch.

Everything is float32 between the products; their left factors are rounded to the weights' type for the tensor cores, float32
weights are multiplied in full. The noise takes the steps of vsr1/ops/_noise.py, which explains why they give the same bits
here. No sum depends on the order of programs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product_kernel(
    left, weight, bias, out, B, N, K,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (B, N) = left (B, K) @ weight (N, K)^T + bias (N,); out float32 or of the weights' type."""
    o_b = tl.arange(0, BLOCK_B)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_b = o_b < B
    m_n = o_n < N
    p_weight = weight + o_n[None, :].to(tl.int64) * K
    p_left = left + o_b[:, None].to(tl.int64) * K
    b_out = tl.zeros((BLOCK_B, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        b_left = tl.load(p_left + o_k[None, :], mask=m_b[:, None] & m_k[None, :], other=0.0)
        b_weight = tl.load(p_weight + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        b_out = tl.dot(b_left, b_weight, b_out, input_precision="ieee")
    b_out += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_out = o_b[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_b[:, None] & m_n[None, :])


@triton.jit
def normalised(b_row, m_d, D, weight, bias, o_d, epsilon):
    """LayerNorm of one row, zeros where m_d is not set."""
    mean = tl.sum(tl.where(m_d, b_row, 0.0), axis=0) / D
    b_centred = tl.where(m_d, b_row - mean, 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, axis=0) / D + epsilon)
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_centred * scale * b_weight + tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def activate_kernel(first, norm, norm_bias, out, D, epsilon, BLOCK_D: tl.constexpr):
    """out (B, D) = GELU(LayerNorm(first)); one program a row."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    row = tl.program_id(0).to(tl.int64) * D
    b_row = tl.load(first + row + o_d, mask=m_d, other=0.0)
    b_row = normalised(b_row, m_d, D, norm, norm_bias, o_d, epsilon)
    b_row = 0.5 * b_row * (1.0 + tl.erf(b_row * 0.7071067811865476))
    tl.store(out + row + o_d, b_row.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def horner(value, wide, coefficient):
    """One step of Horner's rule, as `_polynomial` in vsr1/ops/_noise.py has it."""
    return (value.to(tl.float64) * wide + coefficient).to(tl.float32)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals, float32, from two uint32 words, step by step as vsr1/ops/_noise.py has it."""
    bits = (radius_word.to(tl.int64) + 1).to(tl.float64).to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E00000000) >> 52
    above_one = ((bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0).to(tl.float32)
    wide = above_one.to(tl.float64)
    value = tl.full(above_one.shape, -0.07638683915138245, tl.float32)
    value = horner(value, wide, 0.12914301455020905)
    value = horner(value, wide, -0.13240870833396912)
    value = horner(value, wide, 0.14180061221122742)
    value = horner(value, wide, -0.1660912185907364)
    value = horner(value, wide, 0.20002073049545288)
    value = horner(value, wide, -0.25001585483551025)
    value = horner(value, wide, 0.33333325386047363)
    value = horner(value, wide, -0.49999988079071045)
    value = horner(value, wide, 1.0)
    turns = (exponent - 32).to(tl.float64)
    log = turns * 0.6931471824645996 + (turns * -1.9046542121259336e-09 + wide * value.to(tl.float64))
    radius = tl.sqrt((log * -2.0).to(tl.float32).to(tl.float64)).to(tl.float32)

    angle = angle_word.to(tl.int64)
    quarter = (angle + (1 << 29)) >> 30
    x = (angle - (quarter << 30)).to(tl.float32) * 1.862645149230957e-09
    square = x * x
    wide = square.to(tl.float64)
    value = tl.full(square.shape, -3.5954399209003896e-05, tl.float32)
    value = horner(value, wide, 0.0024900068528950214)
    value = horner(value, wide, -0.08074543625116348)
    sine = x * horner(value, wide, 0.7853981852531433)
    value = tl.full(square.shape, 3.529804189383867e-06, tl.float32)
    value = horner(value, wide, -0.0003259385994169861)
    value = horner(value, wide, 0.015854325145483017)
    value = horner(value, wide, -0.3084251284599304)
    cosine = horner(value, wide, 1.0)
    odd = (quarter & 1) == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = radius * tl.where(((quarter + 1) & 2) == 2, -first, first)
    second = radius * tl.where((quarter & 2) == 2, -second, second)
    return first, second


@triton.jit
def noise(o_number, seed_low, seed_high, offset_low, offset_high):
    """The stream's numbers at o_number (int64); the four words are signed 32-bit numbers, so that none is a new type."""
    seed = (seed_high.to(tl.int64) << 32) | (seed_low.to(tl.int64) & 0xFFFFFFFF)
    block = ((offset_high.to(tl.int64) << 32) | (offset_low.to(tl.int64) & 0xFFFFFFFF)) + (o_number >> 2)
    zero = tl.zeros(o_number.shape, tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), zero, zero)
    later = (o_number & 2) == 2
    first, second = box_muller(tl.where(later, w2, w0), tl.where(later, w3, w1))
    return tl.where((o_number & 1) == 1, second, first)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high", "sigma", "log_density"])
def action_kernel(
    soft, state, gate, gate_bias, norm, norm_bias, mean, action, logp, out, H, D, epsilon, sigma, log_density,
    seed_low, seed_high, offset_low, offset_high, NOISE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean = sigmoid(gate(state)) * soft, action, logp and out = LayerNorm(action), (B, D) each but logp; one program a row.

    log_density is that of the mean itself. gate (H,) may be None; without NOISE the action is the mean and logp 0.
    """
    b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    o_out = b * D + o_d
    b_mean = tl.load(soft + o_out, mask=m_d, other=0.0)
    if gate is not None:
        o_h = tl.arange(0, BLOCK_H)
        b_state = tl.load(state + b * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)
        b_gate = tl.load(gate + o_h, mask=o_h < H, other=0.0).to(tl.float32)
        opened = tl.sum(b_state * b_gate, axis=0) + tl.load(gate_bias).to(tl.float32)
        b_mean = b_mean / (1.0 + tl.exp(-opened))
    tl.store(mean + o_out, b_mean, mask=m_d)
    b_action = b_mean
    density = 0.0
    if NOISE:
        b_action = b_mean + sigma * noise(o_out, seed_low, seed_high, offset_low, offset_high)
        b_deviation = tl.where(m_d, (b_action - b_mean) / sigma, 0.0)
        density = log_density - 0.5 * tl.sum(b_deviation * b_deviation, axis=0) / D
    tl.store(logp + b, density)
    tl.store(action + o_out, b_action, mask=m_d)
    b_out = normalised(b_action, m_d, D, norm, norm_bias, o_d, epsilon)
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_d)


def product_blocks(rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """Tile sizes and launch options of a product; four to six tiles of weights are under way on every multiprocessor."""
    size = max(16, triton.next_power_of_2(rows))
    if dtype == torch.float32:
        return {"BLOCK_B": size, "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    stages = {16: 6, 32: 5, 64: 4}[size]
    return {"BLOCK_B": size, "BLOCK_N": 16, "BLOCK_K": 256, "num_warps": 4, "num_stages": stages}


def row_blocks(width: int) -> dict[str, Any]:
    """The same of a program that holds a row of that many columns."""
    size = triton.next_power_of_2(width)
    return {"BLOCK_D": size, "num_warps": max(1, min(8, size // 256))}


def words(number: int) -> tuple[int, int]:
    """The low and the high 32 bits of a number below 2^64, each as a signed number."""
    low, high = number & 0xFFFFFFFF, number >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def step(
    state: Tensor,
    weights: Sequence[Tensor],
    epsilons: Sequence[float],
    sigma: float,
    seed: int,
    offset: int,
    log_density: float,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Writes mean, action (B, D), logp (B,) and policy input (B, H) to `outputs`.

    state (B, H) for 1 to 64 rows; weights of first, norm, second, input norm and input layer with their biases, then perhaps
    of the gate; sigma 0 takes the mean; log_density is that of an action at its mean.
    """
    first, first_bias, norm, norm_bias, second, second_bias, read_norm, read_norm_bias, read, read_bias, *gate = weights
    gate, gate_bias = gate if gate else (None, None)
    mean, action, logp, policy_input = outputs
    (B, H), D = state.shape, first.shape[0]
    tiles = product_blocks(B, state.dtype)
    row = row_blocks(D)
    wide = torch.empty((B, D), dtype=torch.float32, device=state.device)
    narrow = torch.empty((B, D), dtype=state.dtype, device=state.device)

    def product(left: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        N, K = weight.shape
        product_kernel[(triton.cdiv(N, tiles["BLOCK_N"]),)](left, weight, bias, out, B, N, K, **tiles)

    product(state, first, first_bias, wide)
    activate_kernel[(B,)](wide, norm, norm_bias, narrow, D, epsilons[0], **row)
    product(narrow, second, second_bias, wide)
    action_kernel[(B,)](
        wide, state, gate, gate_bias, read_norm, read_norm_bias, mean, action, logp, narrow, H, D, epsilons[1],
        sigma, log_density, *words(seed), *words(offset), NOISE=sigma > 0, BLOCK_H=triton.next_power_of_2(H), **row,
    )  # fmt: skip
    product(narrow, read, read_bias, policy_input)

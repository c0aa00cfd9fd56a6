"""shared_prefix_attention on a GPU, bfloat16, 16 query heads on 8 key heads of 128.

Decoding: one token of eight rows a prompt, beside reading all keys and values once, and beside torch's attention, which needs the
prompt's keys copied to every row. Training: forward and backward of the suffixes with the prompt's own causal attention, beside
eight plain rows that all begin with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gpu import milliseconds, replayed, workspace
from bench.gpu_corpus_scan import reading
from bench.harness import Measurement, within
from vsr1.ops import last_backend
from vsr1.ops.prefix import shared_prefix_attention

TESTS = [str(Path(__file__).resolve().parent.parent / "tests" / "ops" / "test_prefix_triton.py")]
SANITIZED = [
    f"{TESTS[0]}::{name}"
    for name in ("test_triton_reads_views_of_larger_buffers", "test_triton_of_no_rows_and_of_no_keys")
]
HEADS, KEY_HEADS, WIDTH, GROUP, SUFFIX = 16, 8, 128, 8, 256
CASES = [(prompts, prefix) for prefix in (2048, 16384) for prompts in (1, 8)]
COUNT = len(CASES) + 1
TIMES = 2.0
"""The error that ours may have, as a multiple of that of torch's attention."""
NOTES: dict[str, str] = {}
"""Case: one line on why it misses its goal."""


def measurements() -> Iterator[Measurement]:
    """Every decoding case, then training."""
    for prompts, prefix in CASES:
        yield decoding(prompts, prefix)
    yield training(2048)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").bfloat16()


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def check(name: str, found: float, allowed: float) -> None:
    if not found <= allowed:
        raise AssertionError(f"{name} differs from float64 by {found:.1e} of its length; {allowed:.1e} is allowed")


def decoding(prompts: int, prefix: int) -> Measurement:
    """The rows know their prompts by number, as a decoder's do, and their own keys are the beginning of larger buffers."""
    rows = prompts * GROUP
    query = normal(0, rows, HEADS, 1, WIDTH)
    shared = [normal(seed, prompts, KEY_HEADS, prefix, WIDTH) for seed in (1, 2)]
    own = [normal(seed, rows, KEY_HEADS, 2 * SUFFIX, WIDTH)[:, :, :SUFFIX] for seed in (3, 4)]
    owner = torch.arange(rows, device="cuda") // GROUP
    copied = [torch.cat([one[owner], two], dim=2) for one, two in zip(shared, own, strict=True)]
    attend = partial(shared_prefix_attention, query, *shared, *own, group=owner)
    reference = partial(attend, backend="reference")
    plain = partial(F.scaled_dot_product_attention, query, *copied, enable_gqa=True)
    truth = torch.cat(
        [
            F.scaled_dot_product_attention(*(part[None].double() for part in row), enable_gqa=True)
            for row in zip(query, *copied, strict=True)
        ]
    )
    rounding = distance(plain(), truth)
    check("vsr1", distance(attend(), truth), TIMES * rounding)
    backend = last_backend()
    check("reference", distance(reference(), truth), TIMES * rounding)
    lines: dict[str, Callable[[], Tensor]] = {"own reference": reference, "torch, copied": plain}
    absent = {}
    if (flexible := flex(query, copied)) is None:
        absent["FlexAttention, copied"] = "torch.compile has no compiler on this machine"
    else:
        check("FlexAttention", distance(flexible(), truth), TIMES * rounding)
        lines["FlexAttention, copied"] = flexible
    read = torch.cat([part.flatten() for part in (*shared, *own)])
    line = Measurement(
        f"decode, {prompts} x {GROUP} rows, prefix {prefix:,}, suffix {SUFFIX}", replayed(attend), read.nbytes,
        floor=reading(read), backend=backend, eager=milliseconds(attend), mib=workspace(attend),
        peers={name: replayed(call) for name, call in lines.items()}, absent=absent,
    )  # fmt: skip
    line.note = NOTES.get(line.case, "")
    return line.held_to(within(1.5), within(1.0, "torch, copied"))


def flex(query: Tensor, copied: list[Tensor]) -> Callable[[], Tensor] | None:
    """FlexAttention over the copied keys, or None where torch.compile cannot build it."""
    from torch.nn.attention.flex_attention import flex_attention

    call = partial(torch.compile(flex_attention), query, *copied, enable_gqa=True)
    try:
        call()
    except RuntimeError:  # of which all of torch._dynamo's and torch._inductor's errors are
        return None
    return call


def training(prefix: int) -> Measurement:
    """A group's forward and backward with that of its prompt, and of eight rows that repeat the prompt."""
    shapes = [(1, HEADS, prefix), (1, KEY_HEADS, prefix), (1, KEY_HEADS, prefix)]
    prompt = [normal(seed, *shape, WIDTH).requires_grad_() for seed, shape in enumerate(shapes)]
    shapes = [(GROUP, HEADS, SUFFIX), (GROUP, KEY_HEADS, SUFFIX), (GROUP, KEY_HEADS, SUFFIX)]
    own = [normal(3 + seed, *shape, WIDTH).requires_grad_() for seed, shape in enumerate(shapes)]
    triangle = torch.ones(SUFFIX, SUFFIX, dtype=torch.bool, device="cuda").tril().expand(GROUP, -1, -1)
    up = normal(6, GROUP, HEADS, prefix + SUFFIX, WIDTH)
    up[1:, :, :prefix] = 0  # the prompt's outputs are one tensor in a group; plain rows have them eight times

    def grouped() -> list[Tensor]:
        first = F.scaled_dot_product_attention(*prompt, is_causal=True, enable_gqa=True)
        (query, *suffix), (_, *shared) = own, prompt
        rest = shared_prefix_attention(query, *shared, *suffix, group=GROUP, suffix_mask=triangle)
        upstream = [up[:1, :, :prefix], up[:, :, prefix:]]
        return [first.detach(), rest.detach(), *torch.autograd.grad([first, rest], [*prompt, *own], upstream)]

    rows = [
        torch.cat([one.detach().expand(GROUP, -1, -1, -1), two.detach()], 2)
        for one, two in zip(prompt, own, strict=True)
    ]

    def plain(kept: list[Tensor]) -> list[Tensor]:
        out = F.scaled_dot_product_attention(*kept, is_causal=True, enable_gqa=True)
        return [out.detach(), *torch.autograd.grad(out, kept, up.to(out.dtype))]

    def parted(answer: list[Tensor]) -> list[Tensor]:
        """What `grouped` gives, from what plain rows give."""
        out, *gradients = (part.double() for part in answer)
        return [
            out[:1, :, :prefix], out[:, :, prefix:], *(part[:, :, :prefix].sum(0, keepdim=True) for part in gradients),
            *(part[:, :, prefix:] for part in gradients),
        ]  # fmt: skip

    eight = partial(plain, [part.requires_grad_() for part in rows])
    truth = exact_rows(rows, up)
    for found, other, exact in zip(grouped(), parted(eight()), parted(truth), strict=True):
        check("vsr1", distance(found, exact), TIMES * distance(other, exact))
    backend = last_backend()
    line = Measurement(
        f"group forward+backward, prefix {prefix:,}, G = {GROUP} x {SUFFIX} tokens", replayed(grouped),
        backend=backend, eager=milliseconds(grouped), mib=workspace(grouped),
        peers={"eight plain rows": replayed(eight), "eight plain rows from Python": milliseconds(eight)},
        peers_mib={"eight plain rows": workspace(eight)},
    )  # fmt: skip
    line.note = NOTES.get(line.case, "")
    return line.held_to(within(0.4, "eight plain rows"))


def exact_rows(rows: list[Tensor], up: Tensor) -> list[Tensor]:
    """Output and gradients of the plain rows in float64, row by row."""
    found = []
    for *row, upstream in zip(*rows, up, strict=True):
        kept = [part[None].detach().double().requires_grad_() for part in row]
        out = F.scaled_dot_product_attention(*kept, is_causal=True, enable_gqa=True)
        found.append([out.detach(), *torch.autograd.grad(out, kept, upstream[None].double())])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]

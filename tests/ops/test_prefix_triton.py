"""Shared-prefix attention on Triton: on a GPU, in the interpreter, and compiled ahead of time for what it uses of a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels import DEVICE, INTERPRETED, SHARED_MEMORY, compile_ahead, compiles, runs, triton
from tests.ops.prefix import NAMES, plain, tensors
from vsr1.errors import BackendUnavailable
from vsr1.ops import last_backend
from vsr1.ops.prefix import shared_prefix_attention

kernels = pytest.importorskip("vsr1.kernels.prefix", reason="vsr1 is not installed: pip install -e .")
training = pytest.importorskip("vsr1.kernels.prefix_training")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RUN = [name for name in DTYPES if DEVICE == "cuda" or name != "bf16"]
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

# 18 rows of one prefix with 4 heads are more than a tile; prefix 2 has none, nor has the last
MANY = [1, 0, 1, 1, 3] * 6
OWNER = [2, 0, 2, 4, 0, 1]
DECODING = {
    "even": {},
    "one-row": {"groups": 1, "group": 1},
    "split": {"prefix": 300, "suffix": 140, "groups": 1, "group": 2, "key_heads": 1},
    "many-rows": {"owner": MANY, "key_heads": 1, "prefix": 20, "suffix": 3},
    "no-gqa": {"owner": OWNER, "key_heads": 4},
    "L3": {"owner": OWNER, "queries": 3},
    "D23": {"owner": OWNER, "width": 23},
    "D1": {"width": 1},
    "no-prefix": {"prefix": 0},
    "no-suffix": {"suffix": 0},
}
TRAINING = {
    "even": {"queries": 17, "suffix": 17},
    "ragged": {"owner": OWNER, "queries": 37, "suffix": 37},
    "few-queries": {"queries": 2, "owner": OWNER},
    "no-prefix": {"queries": 20, "suffix": 20, "prefix": 0},
    "no-suffix": {"queries": 20, "suffix": 0, "owner": OWNER},
}
if DEVICE == "cuda":
    DECODING |= {
        "long": {"prefix": 5000, "suffix": 300, "owner": MANY, "heads": 16, "key_heads": 8, "width": 128},
        "D256": {"prefix": 700, "width": 256},
        "D96-L16": {"prefix": 700, "width": 96, "queries": 16},
    }
    TRAINING |= {
        "long": {"prefix": 1000, "suffix": 256, "queries": 256, "heads": 16, "key_heads": 8, "width": 128, "group": 8},
        "D256": {"prefix": 300, "suffix": 65, "queries": 65, "width": 256, "owner": OWNER},
        "D64": {"prefix": 300, "suffix": 70, "queries": 65, "width": 64, "owner": OWNER},
    }


def made(case: dict[str, Any], dtype: torch.dtype = torch.float32, **sizes: int) -> tuple[list[torch.Tensor], Any]:
    """Inputs on the device, without gradients, and their group."""
    inputs = [t.detach().to(DEVICE) for t in tensors(**{**sizes, "dtype": dtype, **case})]
    return inputs, torch.tensor(case["owner"], device=DEVICE) if "owner" in case else case.get("group", 3)


def masks_of(inputs: list[torch.Tensor], group: Any) -> dict[str, torch.Tensor]:
    """A third of everything hidden, all of it from the last row; the queries of a row see different things."""
    generator = torch.Generator().manual_seed(1)
    (rows, _, queries, _), (prefixes, _, prefix, _), suffix = inputs[0].shape, inputs[1].shape, inputs[3].shape[2]
    prefix_mask = torch.rand(prefixes, prefix, generator=generator) < 0.7
    suffix_mask = torch.rand((rows, suffix) if queries == 1 else (rows, queries, suffix), generator=generator) < 0.7
    prefix_mask[group[-1] if isinstance(group, torch.Tensor) else -1] = False
    suffix_mask[-1] = False
    return {"prefix_mask": prefix_mask.to(DEVICE), "suffix_mask": suffix_mask.to(DEVICE)}


def expect(names: Any, found: Any, naive: Any, truth: Any, slack: float) -> None:
    """At most twice the error of plain attention in the same type, beside the rounding of a few float32 numbers."""
    for name, one, other, exact in zip(names, found, naive, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape, name
        size = exact.norm().clamp(min=1e-30)
        error, allowed = (float((x.double() - exact).norm() / size) for x in (one, other))
        assert error <= 2 * allowed + slack * 2**-24, f"{name}: {error:.2e}, plain {allowed:.2e}"


@runs
@pytest.mark.parametrize("dtype", RUN)
@pytest.mark.parametrize("case", DECODING.values(), ids=DECODING)
def test_triton_decoding_error(case: dict[str, Any], dtype: str) -> None:
    inputs, group = made(case, DTYPES[dtype], prefix=70, suffix=19, width=32)
    masks = masks_of(inputs, group)
    for options in ({}, masks):
        out = shared_prefix_attention(*inputs, group=group, backend="triton", **options)
        assert last_backend() == "triton"
        naive = plain(*inputs, group, **options)
        expect(["out"], [out], [naive], [plain(*(t.double() for t in inputs), group, **options)], 3)
    assert out[-1].abs().max() == 0


@runs
@pytest.mark.parametrize("dtype", RUN)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("case", TRAINING.values(), ids=TRAINING)
def test_triton_training_error(case: dict[str, Any], masked: bool, dtype: str) -> None:
    inputs, group = made(case, DTYPES[dtype], prefix=37, width=16)
    masks = masks_of(inputs, group) if masked else {}
    up = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def run(attend: Any, kept: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        kept = [t.requires_grad_() for t in kept]
        out = attend(*kept, group=group, **masks, **options)
        return [out.detach(), *torch.autograd.grad(out, kept, up.to(out.dtype))]

    found = run(shared_prefix_attention, inputs, backend="triton")
    assert last_backend() == "triton"
    naive, truth = run(plain, inputs), run(plain, [t.detach().double() for t in inputs])
    expect(NAMES, found, naive, truth, 5)
    if masked:
        assert found[0][-1].abs().max() == 0 and found[1][-1].abs().max() == 0


@runs
@pytest.mark.parametrize("queries", [1, 17])
def test_triton_reads_views_of_larger_buffers(queries: int) -> None:
    """Suffixes are the beginning of buffers whose rest is NaN; the keys of the prefix lie head by head, or key by key."""
    inputs, group = made({"owner": OWNER, "queries": queries})
    q, k_prefix, v_prefix, k_suffix, v_suffix = inputs
    rows, heads, suffix, width = k_suffix.shape
    buffers = torch.full((2, rows + 2, heads, suffix + 9, width + 3), torch.nan, device=DEVICE)
    views = [
        buffer[:rows, :, :suffix, :width].copy_(t) for buffer, t in zip(buffers, (k_suffix, v_suffix), strict=True)
    ]
    turned = k_prefix.transpose(1, 2).contiguous().transpose(1, 2)
    asked = q.transpose(0, 3).contiguous().transpose(0, 3)  # even its last dimension is strided
    spread = torch.zeros(2 * rows, dtype=torch.int64, device=DEVICE)[::2].copy_(group)
    masks = masks_of(inputs, group)
    strided = {name: mask.mT.contiguous().mT for name, mask in masks.items()}
    found, expected = (
        (out, *torch.autograd.grad(out.square().sum(), list(parts)))
        for parts, owner, seen in (
            ([t.detach().requires_grad_() for t in (asked, turned, v_prefix, *views)], spread, strided),
            ([t.detach().requires_grad_() for t in inputs], group, masks),
        )
        for out in [shared_prefix_attention(*parts, group=owner, backend="triton", **seen)]
    )
    torch.testing.assert_close(found, expected)


@runs
@pytest.mark.parametrize("queries", [1, 17])
def test_triton_keeps_nan_in_its_row_and_repeats_itself(queries: int) -> None:
    inputs, group = made({"owner": OWNER, "queries": queries})
    clean, again = (shared_prefix_attention(*inputs, group=group, backend="triton") for _ in range(2))
    assert torch.equal(clean, again)
    inputs[0][4, 1, 0] = torch.nan
    out = shared_prefix_attention(*inputs, group=group, backend="triton")
    assert out[4, 1, 0].isnan().all()
    out[4, 1, 0] = clean[4, 1, 0]
    assert torch.equal(out, clean)


@runs
def test_triton_gradients_repeat_themselves() -> None:
    inputs, group = made({"owner": MANY if DEVICE == "cuda" else OWNER, "queries": 17}, torch.float16)
    kept = [t.requires_grad_() for t in inputs]
    first, second = (
        torch.autograd.grad(shared_prefix_attention(*kept, group=group, backend="triton").sum(), kept) for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@runs
def test_triton_of_no_rows_and_of_no_keys() -> None:
    q, k_prefix, v_prefix, k_suffix, v_suffix = made({})[0]
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    kept = [t.detach().requires_grad_() for t in (q[:0], k_prefix, v_prefix, k_suffix[:0], v_suffix[:0])]
    out = shared_prefix_attention(*kept, group=none, backend="triton")
    assert out.shape == (0, *q.shape[1:])
    assert all(grad.abs().sum() == 0 for grad in torch.autograd.grad(out.sum(), kept))
    for queries in (1, 17):
        inputs, group = made({"queries": queries, "prefix": 0, "suffix": 0})
        assert shared_prefix_attention(*inputs, group=group, backend="triton").abs().max() == 0


@runs
@pytest.mark.parametrize("queries", [1, 17])
def test_triton_is_a_well_formed_custom_op(queries: int) -> None:
    inputs = [
        t.detach().to(DEVICE).requires_grad_() for t in tensors(owner=[1, 0], queries=queries, dtype=torch.float16)
    ]
    owner = torch.tensor([1, 0], device=DEVICE)
    masks = None, torch.ones(2, 1, 5, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(torch.ops.vsr1.shared_prefix_attention, (*inputs, owner, *masks, 0.5, "triton"))


@runs
def test_triton_says_what_it_cannot_do() -> None:
    for case, dtype, says in (({}, torch.float64, "float64"), ({"width": 257}, torch.float32, "at most 256")):
        inputs, group = made(case, dtype)
        with pytest.raises(BackendUnavailable, match=says):
            shared_prefix_attention(*inputs, group=group, backend="triton")
    if INTERPRETED:
        with pytest.raises(BackendUnavailable, match="interpreter only, which computes bfloat16 wrongly"):
            shared_prefix_attention(*made({}, torch.bfloat16)[0], group=3, backend="triton")


@on_gpu
@pytest.mark.parametrize("queries", [1, 17])
def test_triton_gives_a_row_of_no_prefix_nan(queries: int) -> None:
    """On a CPU it is an error; a GPU does not wait to see it."""
    inputs, group = made({"owner": OWNER, "queries": queries})
    clean = shared_prefix_attention(*inputs, group=group, backend="triton")
    group[2], group[4] = -1, len(inputs[1])
    out = shared_prefix_attention(*inputs, group=group, backend="triton")
    assert out[[2, 4]].isnan().all()
    assert torch.equal(out[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@on_gpu
@pytest.mark.parametrize("queries", [1, 64])
def test_triton_forward_and_backward_can_be_captured_in_a_graph(queries: int) -> None:
    inputs, group = made({"owner": OWNER, "queries": queries}, torch.bfloat16, prefix=300, suffix=70, width=64)
    kept, masks = [t.requires_grad_() for t in inputs], masks_of(inputs, group)

    def both() -> list[torch.Tensor]:
        out = shared_prefix_attention(*kept, group=group, **masks)
        assert last_backend() == "triton"
        return [out, *torch.autograd.grad(out, kept, torch.ones_like(out))]

    wanted = [part.detach().clone() for part in both()]  # a graph left alive would tie the capture to this stream
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    for part in found:
        part.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@on_gpu
def test_triton_compiles_nothing_for_a_suffix_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, group = made({"owner": OWNER, "suffix": 70}, torch.bfloat16, width=48)  # no other test's
    compiled: list[Any] = []
    counts = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **facts: compiled.append(facts))
    for length in range(1, 70):
        q, k_prefix, v_prefix, *own = inputs
        mask = torch.ones(len(q), length, dtype=torch.bool, device=DEVICE)
        shared_prefix_attention(
            q, k_prefix[:, :, length // 50 :], v_prefix[:, :, length // 50 :], *(t[:, :, :length] for t in own),
            group=group, suffix_mask=mask, backend="triton",
        )  # fmt: skip
        counts.append(len(compiled))
    assert set(counts) == {2}  # its two kernels


POINTERS = ("q", "k_prefix", "v_prefix", "k_suffix", "v_suffix", "k", "v", "out", "upstream")
POINTERS += ("gradient", "k_gradient", "v_gradient")  # of the op's type
FLOATS = ("parts", "levels", "lse", "delta")
STRIDES = {f"{side}_{of}" for side in ("kp", "vp", "ks", "vs", "k", "v") for of in ("set", "head", "key")}
COMPILED = [
    ("part", "bf16", 128, 90), ("part", "bf16", 256, 80), ("part", "fp32", 128, 90), ("merge", "bf16", 128, 90),
    ("forward", "bf16", 128, 90), ("query_gradient", "bf16", 128, 90), ("key_gradient", "bf16", 128, 90),
    ("forward", "bf16", 128, 80), ("query_gradient", "fp16", 128, 80), ("key_gradient", "bf16", 128, 80),
    ("forward", "bf16", 256, 80), ("query_gradient", "bf16", 256, 80), ("key_gradient", "bf16", 256, 90),
]  # fmt: skip
SPILLED = {("key_gradient", 128, 90): 128}  # bytes; faster with them than without: training.blocks


@compiles
@pytest.mark.parametrize(
    ("kernel", "dtype", "width", "cap"), COMPILED, ids=[f"{k}-{d}-D{w}-sm_{c}" for k, d, w, c in COMPILED]
)
def test_compiles_for_gpus_without_spills(
    kernel: str, dtype: str, width: int, cap: int, record_property: pytest.RecordProperty
) -> None:
    """With owners and with a mask for every query, and tiles as large as they get."""
    function = getattr(kernels if kernel in ("part", "merge") else training, f"{kernel}_kernel")
    constants: dict[str, Any] = {"HEADS": 8, "SHARE": 2, "D": width, "PER_QUERY": True}
    aligned = set(STRIDES)
    if kernel == "part":
        rows = kernels.tile_rows(1000, width, DTYPES[dtype])
        constants |= {"PREFIX_M": rows, "SUFFIX_M": 16, **kernels.part_blocks(width, DTYPES[dtype])}
    elif kernel == "merge":
        constants |= {"BLOCK_S": 32, "BLOCK_D": width, "num_warps": 4, "num_stages": 3}
    else:
        constants |= training.blocks(kernel, width, DTYPES[dtype], cap == 90)
        aligned |= {"sm_set", "sm_query", "mask_set", "mask_query"}  # training.aligned sees to it
    types = (
        dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(FLOATS, "*fp32") | dict.fromkeys(POINTERS, f"*{dtype}")
    )
    types |= dict.fromkeys(("mask", "prefix_mask", "suffix_mask"), "*i1") | {"owner": "*i64", "scale": "fp32"}
    used = compile_ahead(function, constants, types, aligned, cap)
    for what, count in used.items():
        record_property(what, count)
    assert used["spills"] <= SPILLED.get((kernel, width, cap), 0)
    assert used["shared"] <= SHARED_MEMORY[cap]

"""The noise of soft tokens is the same bits wherever it is computed, and normal."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels import INTERPRETED, runs, triton
from tests.ops.soft_query import STREAM
from vsr1.ops._dispatch import extension_missing
from vsr1.ops._noise import box_muller
from vsr1.ops.soft_query import NoiseStream, philox4x32, philox_normal

tl = pytest.importorskip("triton.language")
kernels = pytest.importorskip("vsr1.kernels.soft_query")
CUDA = Path(__file__).parent.parent.parent / "csrc" / "cuda"
COMPILER = shutil.which("g++")
EDGES = [0, 1, 2, 2**29 - 1, 2**29, 2**29 + 1, 2**30, 3 * 2**29 - 1, 3 * 2**29, 2**31 - 1, 2**31, 5 * 2**29, 3 * 2**30]
EDGES += [7 * 2**29 - 1, 7 * 2**29, 2**32 - 3, 2**32 - 2, 2**32 - 1]


def words(count: int) -> tuple[Tensor, Tensor]:
    """Every pair of edges, and random pairs of every size of number."""
    edges = torch.tensor(EDGES)
    drawn = torch.randint(0, 2**32, (2, count), generator=torch.Generator().manual_seed(3))
    drawn = drawn >> torch.randint(0, 32, (2, count), generator=torch.Generator().manual_seed(4))
    drawn[:, ::2] = 2**32 - 1 - drawn[:, ::2]
    pairs = torch.cat([torch.cartesian_prod(edges, edges).T, drawn], dim=1)
    return pairs[0].contiguous(), pairs[1].contiguous()


def same_bits(found: Tensor, wanted: Tensor) -> None:
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def of_pairs(call: object, radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Both normals of all words from C++: call(words, words, count, out, out) with addresses."""
    first, second = torch.full((2, len(radius)), math.nan)
    narrow = [values.to(torch.uint32) for values in (radius, angle)]
    call(*(values.data_ptr() for values in narrow), len(radius), first.data_ptr(), second.data_ptr())  # type: ignore[operator]
    return first, second


def test_words_become_normals_to_the_last_digits() -> None:
    radius, angle = words(200_000)
    first, second = box_muller(radius, angle)
    length = torch.sqrt(-2 * torch.log((radius.double() + 1) / 2**32))
    turn = 2 * math.pi * angle.double() / 2**32
    for found, wanted in ((first, length * torch.cos(turn)), (second, length * torch.sin(turn))):
        assert (found - wanted).abs().max() <= 2.0**-20  # numbers up to 6.7
        assert ((found - wanted).abs() <= 2.0**-21 * length).all()  # also where they are tiny
    assert float(first[0]) == pytest.approx(math.sqrt(64 * math.log(2)))  # both words 0: the largest radius, no turn
    assert float(box_muller(torch.tensor([2**32 - 1]), torch.tensor([2**31]))[0]) == 0.0


@pytest.mark.skipif(bool(extension_missing()), reason="needs vsr1._C")
def test_the_extension_has_the_same_bits() -> None:
    from vsr1 import _C

    radius, angle = words(200_000)
    for found, wanted in zip(of_pairs(_C.noise_pairs, radius, angle), box_muller(radius, angle), strict=True):
        same_bits(found, wanted)
    for stream in (NoiseStream(0), STREAM):
        found = torch.full((1003,), math.nan)
        _C.noise_normals(stream.seed, stream.offset, 1003, found.data_ptr())
        same_bits(found, philox_normal((1003,), stream))


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
@pytest.mark.parametrize("fused", [False, True], ids=["rounded", "fused"])
def test_a_compiler_that_fuses_changes_no_bit(fused: bool, tmp_path: Path) -> None:
    """csrc/cuda/noise.cuh as CUDA has it, also where every sum may take the product before it along unrounded."""
    if fused and "fma" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no fused products")
    entry = """#include "noise.cuh"
    extern "C" void pairs(const unsigned* r, const unsigned* a, long count, float* first, float* second) {
        for (long i = 0; i < count; ++i) vsr1::box_muller(r[i], a[i], first[i], second[i]);
    }
    extern "C" double product_and_sum(double a, double b, double c) { return a * b + c; }"""
    (tmp_path / "noise.cpp").write_text(entry)
    flags = ["-O3", "-mfma", "-ffp-contract=fast"] if fused else ["-O1", "-ffp-contract=off"]
    command = [str(COMPILER), "-std=c++17", *flags, "-shared", "-fPIC", f"-I{CUDA}"]
    subprocess.run([*command, "-o", str(tmp_path / "noise.so"), str(tmp_path / "noise.cpp")], check=True)
    library = ctypes.CDLL(str(tmp_path / "noise.so"))
    library.product_and_sum.restype = ctypes.c_double
    library.product_and_sum.argtypes = [ctypes.c_double] * 3
    assert (library.product_and_sum(1 + 2.0**-30, 1 - 2.0**-30, -1.0) != 0.0) == fused
    library.pairs.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    radius, angle = words(200_000)
    for found, wanted in zip(of_pairs(library.pairs, radius, angle), box_muller(radius, angle), strict=True):
        same_bits(found, wanted)


@triton.jit
def pairs_kernel(radius, angle, first, second, count, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < count
    b_radius = tl.load(radius + o, mask=m, other=0).to(tl.uint32)
    b_first, b_second = kernels.box_muller(b_radius, tl.load(angle + o, mask=m, other=0).to(tl.uint32))
    tl.store(first + o, b_first, mask=m)
    tl.store(second + o, b_second, mask=m)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "offset_low", "offset_high"])
def stream_kernel(out, seed_low, seed_high, offset_low, offset_high, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out + o, kernels.noise(o.to(tl.int64), seed_low, seed_high, offset_low, offset_high))


@runs
def test_triton_has_the_same_bits() -> None:
    device = "cpu" if INTERPRETED else "cuda"
    radius, angle = words(20_000)
    found = torch.full((2, len(radius)), math.nan, device=device)
    grid = (triton.cdiv(len(radius), 1024),)
    pairs_kernel[grid](radius.to(device), angle.to(device), found[0], found[1], len(radius), BLOCK=1024)
    same_bits(found.cpu(), torch.stack(box_muller(radius, angle)))
    for stream in (NoiseStream(0), NoiseStream(2**31, 2**31 - 3), STREAM):
        out = torch.full((256,), math.nan, device=device)
        stream_kernel[(1,)](out, *kernels.words(stream.seed), *kernels.words(stream.offset), BLOCK=256)
        same_bits(out.cpu(), philox_normal((256,), stream))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], expected: list[int]) -> None:
    found = philox4x32(torch.tensor(counter, dtype=torch.int64)[:, None], key[0] | key[1] << 32)
    assert found.flatten().tolist() == expected


def test_the_numbers_are_normal_and_independent() -> None:
    numbers = philox_normal((1 << 20,), NoiseStream(5)).double()
    count = len(numbers)
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float(numbers.pow(power).mean()) - moment) < 4 * math.sqrt(spread / count)
    for distance in (1, 2, 3, 4):
        assert abs(float((numbers[distance:] * numbers[:-distance]).mean())) < 4 / math.sqrt(count)
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is passed by one sample in a thousand.
    below = torch.special.ndtr(numbers.sort().values)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    assert max((below - steps[:-1]).abs().max(), (steps[1:] - below).abs().max()) < 1.95 / math.sqrt(count)
    assert 4.2 < numbers.abs().max() < 6.66


def test_the_numbers_are_addressable() -> None:
    numbers = philox_normal((40,), NoiseStream(5))
    same_bits(philox_normal((3, 4), NoiseStream(5, 2)).flatten(), numbers[8:20])
    assert philox_normal((0, 4), NoiseStream(5)).shape == (0, 4)
    far = NoiseStream(2**64 - 1, 2**40)
    assert torch.isfinite(philox_normal((5,), far)).all()
    assert far.after(5).offset == 2**40 + 2

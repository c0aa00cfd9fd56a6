"""The CUDA C++ kernel of soft_token_step without a GPU: g++ compiles it with cuda_emulation.h, a fiber for every thread.

Blocks run one after the other there, so the phases of a step are launched one by one; that blocks meet in between is for a GPU to
show (test_soft_query_triton.py), what nvcc makes of the sources for test_corpus_scan_cuda_build.py.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.emulated import compile_host, needs_compiler
from tests.ops.soft_query import NAMES, PARTS, STREAM, expect_step, make_head, make_hidden
from vsr1.ops import _cuda_code, _soft_cuda
from vsr1.ops._soft_backends import log_density, new_outputs
from vsr1.ops._soft_head import HeadWeights, plain_weights
from vsr1.ops.soft_query import SoftStep

pytestmark = needs_compiler
SHAPES = [(1, 32, 32), (5, 64, 96), (17, 288, 64), (33, 32, 64)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compile_host(tmp_path_factory.mktemp("soft_host"), ("noise.cuh", "soft_query.cuh"), "soft_host.cpp")
    library.shared_end.restype = ctypes.c_int64
    return library


@pytest.fixture
def emulated(host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kernel runs in the emulation, phase by phase; gives the seeds that order blocks and threads, one a phase."""
    seeds: list[int] = []

    def launch(
        name: str, arguments: ctypes.Structure, *, blocks: int, threads: int, shared: int, device: torch.device
    ) -> None:
        assert shared >= host.shared_end(arguments.width, arguments.query_width)
        assert (arguments.begin, arguments.end) == (0, 5)
        for phase in range(5):
            seeds.append(len(seeds))
            code = host.run_phase(ctypes.byref(arguments), "Bfloat16" in name, blocks, threads, phase, seeds[-1])
            assert code == 0, f"{name}, phase {phase}: {code}"

    monkeypatch.setattr(_cuda_code, "launch", launch)
    monkeypatch.setattr(_soft_cuda, "_counter", lambda device, blocks: 0)
    return seeds


def emulated_step(head: torch.nn.Module, hidden: Tensor, sigma: float) -> SoftStep:
    weights = plain_weights(head)
    assert isinstance(weights, HeadWeights)
    state, tensors = hidden.detach(), [tensor.detach() for tensor in weights.tensors]
    outputs = new_outputs(state, tensors)
    numbers = (sigma, STREAM.seed, STREAM.offset, log_density(sigma))
    _soft_cuda.step(state, tensors, weights.epsilons, *numbers, outputs)
    return SoftStep(*outputs, STREAM.after(outputs[0].numel()) if sigma else STREAM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize(("B", "H", "D"), SHAPES, ids=[f"B{b}-H{h}-D{d}" for b, h, d in SHAPES])
def test_the_kernel_matches_float64(B: int, H: int, D: int, dtype: torch.dtype, emulated: list[int]) -> None:
    head, hidden = make_head(H, D, dtype=dtype), make_hidden(B, H, dtype)
    expect_step(emulated_step(head, hidden, 0.3), head, hidden, 0.3, STREAM)


def test_sigma_and_gate(emulated: list[int]) -> None:
    for sigma, gate in ((0.0, True), (0.05, False)):
        head, hidden = make_head(64, 96, gate, torch.bfloat16), make_hidden(2, 64, torch.bfloat16)
        step = emulated_step(head, hidden, sigma)
        expect_step(step, head, hidden, sigma, STREAM)
        assert sigma or (torch.equal(step.action, step.mean) and not step.logp.any())


def test_the_order_of_threads_and_blocks_changes_nothing(emulated: list[int]) -> None:
    head, hidden = make_head(64, 96, dtype=torch.bfloat16), make_hidden(5, 64, torch.bfloat16)
    once, again = (emulated_step(head, hidden, 0.3) for _ in range(2))
    assert len(emulated) == 10
    assert all(torch.equal(getattr(once, name), getattr(again, name)) for name in PARTS)


def test_structs_and_shared_memory_are_as_python_has_them(host: ctypes.CDLL) -> None:
    sizes = np.zeros(6, dtype=np.int64)
    host.layout(ctypes.c_void_p(sizes.ctypes.data))
    ours = _soft_cuda.Arguments
    fields = ("gate", "meetings", "offset", "log_density", "end")
    assert sizes.tolist() == [ctypes.sizeof(ours), *(getattr(ours, name).offset for name in fields)]
    for width, query_width in ((32, 64), (2048, 2048), (1536, 1024)):
        assert host.shared_end(width, query_width) == _soft_cuda.shared_bytes(width, query_width)


def test_a_counter_for_every_stream_size_and_captured_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(stream=7, capturing=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=now.stream))
    monkeypatch.setattr(_soft_cuda, "COUNTERS", 6)
    monkeypatch.setattr(_soft_cuda, "_counters", {})
    device = torch.device("cpu")

    def counter(stream: int, blocks: int, capturing: bool = False) -> int:
        now.stream, now.capturing = stream, capturing
        return _soft_cuda._counter(device, blocks)

    with pytest.raises(RuntimeError, match="before a CUDA graph"):
        counter(7, 4, capturing=True)
    first = counter(7, 4)
    others = [counter(7, 6), counter(8, 4), counter(7, 4, capturing=True), counter(7, 4, capturing=True)]
    assert len({first, *others}) == 5
    assert counter(7, 4) == first and counter(8, 4) == others[1]
    counter(9, 4)
    with pytest.raises(RuntimeError, match="hold a step each"):
        counter(10, 4)


def test_what_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(H: int, D: int, dtype: torch.dtype = torch.bfloat16, named: bool = True, room: int = 227) -> str | None:
        properties = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=room * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        weights = plain_weights(make_head(H, D, dtype=dtype))
        assert isinstance(weights, HeadWeights)
        state = make_hidden(2, H, dtype).detach()
        return _soft_cuda.refuses(state=state, weights=weights.tensors, named=named)

    assert reason(64, 96) is None and reason(2048, 2048) is None
    assert "where it is named" in (reason(64, 96, named=False) or "")
    assert "float32" in (reason(64, 96, torch.float32) or "")
    assert "multiples of 32" in (reason(64, 100) or "")
    assert "99 KiB" in (reason(1024, 2048, room=99) or "")
    assert "160 multiprocessors" in (reason(2560, 32) or "")

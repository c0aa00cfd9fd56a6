"""What nvcc and NVRTC make of csrc/cuda, where they are found; neither needs a GPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vsr1.ops import _corpus_cuda, _cuda_code

SOURCE = Path(__file__).parent.parent.parent / "csrc" / "cuda" / "corpus_scan.cu"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_no_kernel_spills_on_ampere_or_hopper(tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a")]
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        *targets,
        "-Xptxas",
        "-v",
        "-fatbin",
        "-o",
        str(tmp_path / "out"),
        str(SOURCE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", done.stderr)
    # Six sweeps (three dimensions, two or three stages), a projection and a soft-token step for each of two types.
    assert len([target for _, target in built if target == "sm_80"]) == 16
    assert len([target for _, target in built if target == "sm_90a"]) == 16
    assert len([name for name, _ in built if "soft_step_kernel" in name]) == 4
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    print("registers", dict(zip(built, registers, strict=True)))  # on record with `pytest -rP`
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 32
    assert set(spills) == {("0", "0", "0")}


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_newer_gpus_have_ptx(tmp_path: Path) -> None:
    command = [
        str(NVCC),
        "-std=c++17",
        "-O3",
        "-gencode=arch=compute_90,code=compute_90",
        "-ptx",
        "-o",
        "-",
        str(SOURCE),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ".target sm_90\n" in done.stdout  # not sm_90a, whose PTX no other GPU takes
    assert "cp.async.bulk" in done.stdout


@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("corpus_scan.cuh", "vsr1::sweep_kernel<vsr1::Bfloat16, 128, 3>"),
        ("projection.cuh", "vsr1::projection_kernel<vsr1::Half>"),
        ("soft_query.cuh", "vsr1::soft_step_kernel<vsr1::Bfloat16>"),
    ],
    ids=["sweep", "projection", "soft step"],
)
def test_nvrtc_compiles_the_same_source(header: str, name: str, capability: str) -> None:
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"CuPy finds no NVRTC: {error}")
    program = nvrtc.createProgram(_cuda_code.source(header), header, (), ())
    nvrtc.addNameExpression(program, name)
    try:
        nvrtc.compileProgram(program, ["-std=c++17", f"--gpu-architecture=sm_{capability}"])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert len(nvrtc.getCUBIN(program)) > 1000
    assert nvrtc.getLoweredName(program, name)


def test_the_source_for_nvrtc_is_one_string() -> None:
    for header in _cuda_code.HEADERS.values():
        text = _cuda_code.source(header)
        assert '#include "' not in text and "#pragma once" not in text
        assert text.count("struct Best {") == 1


@pytest.mark.parametrize("cooperative", [False, True], ids=["launch", "cooperative"])
def test_a_kernel_of_nvrtc_gets_its_struct(cooperative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def launch(*arguments: int) -> None:
        assert len(arguments) == (10 if cooperative else 11)
        held = ctypes.c_void_p.from_address(arguments[9]).value
        calls.append((*arguments[:9], _corpus_cuda.Projection.from_address(held or 0).width))

    kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=77), max_dynamic_shared_size_bytes=0)
    module = SimpleNamespace(get_function=lambda name: kernel)
    cuda = SimpleNamespace(driver=SimpleNamespace(**{f"launch{'Cooperative' if cooperative else ''}Kernel": launch}))
    fake = SimpleNamespace(RawModule=lambda code, options, name_expressions: module, cuda=cuda)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    _cuda_code._compiled.cache_clear()
    name = f"vsr1::{'soft_step' if cooperative else 'projection'}_kernel<vsr1::Half>"
    _cuda_code._launch_compiled(name, _corpus_cuda.Projection(width=640), 5, 256, 1024, 99)
    _cuda_code._compiled.cache_clear()
    assert kernel.max_dynamic_shared_size_bytes == 1024
    assert calls == [(77, 5, 1, 1, 256, 1, 1, 1024, 99, 640)]

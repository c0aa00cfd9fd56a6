"""What nvcc and NVRTC make of csrc/cuda, where they are found; neither needs a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from vsr1.ops import _cuda_code

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
    # Six sweeps (three dimensions, two or three stages) and a projection for each of two types.
    assert len([target for _, target in built if target == "sm_80"]) == 14
    assert len([target for _, target in built if target == "sm_90a"]) == 14
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) >= 28
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
    ],
    ids=["sweep", "projection"],
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

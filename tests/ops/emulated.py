"""What the tests of the CUDA C++ kernels share where there is no GPU: g++ compiles the sources with cuda_emulation.h."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CUDA = HERE.parent.parent / "csrc" / "cuda"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def compile_host(folder: Path, sources: tuple[str, ...], host: str) -> ctypes.CDLL:
    """A library of `host`, a file beside this one, behind arithmetic.cuh, the emulation and these files of csrc/cuda."""
    parts = [CUDA / "arithmetic.cuh", HERE / "cuda_emulation.h", *(CUDA / name for name in sources), HERE / host]
    text = "\n".join(part.read_text() for part in parts)
    # In one text nothing is left to include from csrc/cuda; the emulation stands for instructions.cuh.
    text = re.sub(r'^#include "(?:instructions|noise)\.cuh"\n|^#pragma once\n', "", text, flags=re.MULTILINE)
    (folder / "host.cpp").write_text(text)
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    command = [str(COMPILER), *flags, "-o", str(folder / "host.so"), str(folder / "host.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(folder / "host.so"))

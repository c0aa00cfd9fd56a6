"""The CUDA C++ kernels as machine code, and the call that starts one.

Two makers stand behind `launch`, under the same kernel names: the library `vsr1._cuda`, which setup.py builds where it finds
nvcc, and otherwise NVRTC, which compiles the same sources (csrc/cuda, installed as `vsr1._cuda_source`) at run time through
CuPy, one kernel at a time, and keeps the result on disk. Every kernel takes one struct by value, a ctypes.Structure here.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch

FIRST_CAPABILITY = (8, 0)  # asynchronous copies and bfloat16 products
HEADERS = {"projection": "projection.cuh", "soft_step": "soft_query.cuh", "sweep": "corpus_scan.cuh"}
COOPERATIVE = ("soft_step",)  # kernels whose blocks wait for each other, so that all must run at the same time


@functools.cache
def missing() -> str | None:
    """Why no CUDA C++ kernel can serve here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        return f"needs compute capability 8.0 or newer; this GPU has {capability[0]}.{capability[1]}"
    return None if maker() is not None else no_maker()


def no_maker() -> str:
    """What to do where `maker` is None."""
    return "needs the compiled kernels vsr1._cuda (install vsr1 where nvcc is found) or CuPy (pip install 'vsr1[gpu]')"


@functools.cache
def maker() -> str | None:
    """Who makes the machine code: "nvcc" ahead of time, "nvrtc" at run time, or None."""
    if _library() is not None:
        return "nvcc"
    if importlib.util.find_spec("cupy") is not None and importlib.util.find_spec("vsr1._cuda_source") is not None:
        return "nvrtc"
    return None


def launch(
    name: str, arguments: ctypes.Structure, *, blocks: int, threads: int, shared: int, device: torch.device
) -> None:
    """Start a kernel on torch's current stream of `device`; `shared` is its dynamic shared memory in bytes.

    name as NVRTC spells it, "vsr1::sweep_kernel<vsr1::Half, 64, 3>". Allocates nothing on the device. The first call of a kernel
    loads (and, by NVRTC, compiles) it, so it comes before a graph is captured. Raises RuntimeError if CUDA does not start it.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        library = _library()
        if library is None:
            _launch_compiled(name, arguments, blocks, threads, shared, stream)
            return
        error = library.vsr1_launch(
            name.encode(), ctypes.byref(arguments), blocks, threads, shared, ctypes.c_void_p(stream)
        )
    if error:
        raise RuntimeError(f"{name} on {device}: {error.decode()}")


def source(header: str) -> str:
    """The text of a header of csrc/cuda with everything it includes from there: NVRTC's cache on disk sees one string."""
    spec = importlib.util.find_spec("vsr1._cuda_source")
    if spec is None or spec.origin is None:
        raise ImportError("vsr1._cuda_source is missing: install vsr1 again (pip install -e . in a checkout)")
    folder, included = Path(spec.origin).parent, set()

    def text(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        body = (folder / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'#include "(\w+\.cuh)"\n', lambda found: text(found[1]), body)

    return text(header)


@functools.cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("vsr1._cuda")
    if spec is None or spec.origin is None:
        return None
    library = ctypes.CDLL(spec.origin)
    library.vsr1_launch.restype = ctypes.c_char_p
    return library


@functools.cache
def _compiled(name: str) -> Any:
    """The kernel by NVRTC; CuPy loads it once on every device that runs it."""
    import cupy

    return cupy.RawModule(
        code=source(HEADERS[_family(name)]), options=("-std=c++17",), name_expressions=(name,)
    ).get_function(name)


def _launch_compiled(
    name: str, arguments: ctypes.Structure, blocks: int, threads: int, shared: int, stream: int
) -> None:
    from cupy.cuda import driver

    kernel = _compiled(name)
    kernel.max_dynamic_shared_size_bytes = shared
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    place = (kernel.kernel.ptr, blocks, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(parameters))
    if _family(name) in COOPERATIVE:
        driver.launchCooperativeKernel(*place)
    else:
        driver.launchKernel(*place, 0)


def _family(name: str) -> str:
    """What a kernel is called before its template arguments, less "vsr1::" and "_kernel"."""
    return name.removeprefix("vsr1::").partition("_kernel<")[0]

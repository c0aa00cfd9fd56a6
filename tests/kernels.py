"""What the tests of Triton kernels share: where they run, and what ptxas says of a kernel.

Without a GPU they run in Triton's interpreter, in the process that tests/ops/test_interpreter.py starts.
"""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that one program may have
runs = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or TRITON_INTERPRET=1")
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def compile_ahead(
    function: Any, constants: dict[str, Any], types: dict[str, str], aligned: set[str], cap: int
) -> dict[str, int]:
    """A kernel for sm_<cap> by the ptxas that Triton itself would take: registers, bytes of spills and of shared memory.

    constants holds the constexpr arguments, None for arguments left out, and the launch options; types the types of the others;
    aligned the numbers among them that are multiples of 16, as all addresses are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    launch = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or (name in aligned and signature[name] != "constexpr")
    }
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={name: value for name, value in constants.items() if name in function.arg_names},
        attrs=attributes,
    )
    built = triton.compile(source, target=GPUTarget("cuda", cap, 32), options=launch)
    arch = f"sm_{cap}a" if cap >= 90 else f"sm_{cap}"
    done = subprocess.run(
        [get_ptxas(cap).path, "-v", f"--gpu-name={arch}", "-", "-o", os.devnull],
        input=built.asm["ptx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)]
    assert spills
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    return {"registers": max(registers), "spills": sum(spills), "shared": built.metadata.shared}

"""Shared by the tests of the ops: every backend of the sweeps that runs on CPU tensors, instruction set by instruction set.

And where the tests run in Triton's interpreter, that it wastes no time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vsr1.ops._dispatch import extension_missing, triton_missing

if "TRITON_INTERPRET" in os.environ and triton_missing() is None:
    from tests.ops import interpreter

    interpreter.hasten()

PATHS = [
    "reference",
    "cpu-portable",
    "cpu-emulated",
    "cpu-avx2",
    "cpu-avx512",
    "cpu-avx512_vnni",
    "cpu-avx512_bf16",
    "cpu-amx",
]


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend to ask for; for the compiled one, each instruction set in turn."""
    name, _, isa = request.param.partition("-")
    if not isa:
        yield name
        return
    if extension_missing():
        pytest.skip(f"cpu {extension_missing()}")
    from vsr1 import _C

    if isa != "emulated" and isa not in _C.isas():
        pytest.skip(f"this processor has no {isa}")
    before = _C.isa()
    _C.use_isa(isa)
    yield name
    _C.use_isa(before)

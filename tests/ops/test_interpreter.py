"""The tests of Triton kernels in Triton's interpreter, where there is no GPU for them: one process for all files.

TRITON_INTERPRET is read when a kernel is decorated, so it takes another process. A single one: where several processes run the
tests, the others have enough to do meanwhile.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import DEVICE, INTERPRETED

HERE = Path(__file__).parent
FILES = (
    "test_corpus_scan_triton.py",
    "test_corpus_int8_triton.py",
    "test_corpus_scan_front.py",
    "test_soft_query_triton.py",
    "test_soft_query_noise.py",
    "test_corpus_scan_cuda_host.py",
    "test_linear_logp_triton.py",
    "test_patches_triton.py",
    "test_prefix_triton.py",
)
HANGS = 1200  # seconds; two minutes of a core are usual, and a machine that is busy or slow takes several times that
SELECTED = "triton or whole_op"  # some files by their names; of the others what runs on Triton kernels


@pytest.mark.timeout(HANGS + 60)
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the tests run in this process itself")
def test_kernels_pass_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED]
    done = subprocess.run(
        [*command, *(str(HERE / file) for file in FILES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(done.stdout.rpartition(" passed")[0].split()[-1])
    assert passed > 30, done.stdout[-4000:]

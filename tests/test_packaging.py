"""What is distributed: the wheel and the source archive hold what they should, and the wheel works outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(900)  # a compiler on a busy machine

TRY_IT = """
import sys
# An editable install would serve from the checkout whatever the wheel lacks.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import vsr1, vsr1.ops
assert not {"torch", "triton"} & set(sys.modules), "import vsr1 is not light"
from pathlib import Path
assert Path(vsr1.__file__).is_relative_to(sys.argv[1]), vsr1.__file__
import vsr1.kernels
assert Path(vsr1.kernels.__file__).is_relative_to(sys.argv[1]), vsr1.kernels.__file__
import torch
from vsr1.ops.corpus_scan import scan
found = scan(torch.eye(4)[:2], torch.eye(4), k=1, backend=sys.argv[2])
assert found.ids.tolist() == [[0], [1]]
print(vsr1.ops.last_backend())
"""


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # Only what is given decides what is imported and how it is built.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC")}
    done = subprocess.run(
        command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=850, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def build(into: Path, kind: str, **environment: str) -> tuple[Path, str]:
    """Builds a copy of the checkout, so that nothing is left behind in it and no earlier build lends a hand."""
    copy = into / "source"
    wanted = ("csrc", "kernels", "vsr1", "tests", "bench")
    for name in wanted:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for file in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        *(["README.md"] if (ROOT / "README.md").exists() else []),
    ):
        shutil.copy(ROOT / file, copy / file)
    # An nvcc that fails: what it makes is tested beside the kernels, and takes long.
    nvcc = into / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    nvcc.chmod(0o755)
    environment["PATH"] = f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"
    done = run(
        sys.executable,
        "-m",
        "build",
        f"--{kind}",
        "--no-isolation",
        "--outdir",
        str(into),
        str(copy),
        cwd=into,
        **environment,
    )
    (archive,) = [path for path in into.iterdir() if path.suffix in (".whl", ".gz")]
    return archive, done.stdout + done.stderr


def hurried(into: Path) -> Path:
    """A compiler that does not optimise: most of its time would go there, and how fast a wheel is, no test here asks."""
    compiler = into / "hurried"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++") or shutil.which("g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    return compiler


def install(wheel: Path, into: Path) -> Path:
    pip = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(into),
        str(wheel),
    )
    run(*pip, cwd=wheel.parent)
    return into


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    into = tmp_path_factory.mktemp("wheel")
    return build(into, "wheel", CXX=str(hurried(into)))[0]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    present = {name for name in names if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vsr1").rglob("*.py")}
    modules |= {f"vsr1/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    modules |= {f"vsr1/_cuda_source/{path.name}" for path in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert modules <= present, modules - present
    assert "vsr1/py.typed" in present
    assert [name for name in present if name.startswith("vsr1/_C.") and name.endswith(".so")]
    assert {name.split("/")[0] for name in present} == {"vsr1"}
    (metadata,) = [name for name in names if name.endswith("METADATA")]
    assert "Name: vsr1\nVersion: 0.1.0\n" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = install(wheel, tmp_path / "site")
    done = run(sys.executable, "-P", "-c", TRY_IT, str(site), "cpu", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.strip() == "cpu"
    told = run(sys.executable, "-P", "-m", "vsr1.doctor", cwd=tmp_path, PYTHONPATH=str(site), COLUMNS="200").stdout
    assert "compiled extension" in told
    assert re.search(r"corpus_scan +│ triton", told)


def test_source_archive_holds_all_sources(tmp_path: Path) -> None:
    archive, _ = build(tmp_path, "sdist")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    wanted = {
        str(path.relative_to(ROOT)) for room in ("csrc", "kernels", "vsr1") for path in (ROOT / room).rglob("*.*")
    }
    wanted = {name for name in wanted if not name.endswith((".pyc", ".so"))}
    assert wanted | {"pyproject.toml", "setup.py", "MANIFEST.in"} <= names, wanted - names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_without_a_compiler_it_installs_and_says_what_is_lost(tmp_path: Path) -> None:
    archive, output = build(tmp_path, "wheel", CXX="no-such-compiler", CC="no-such-compiler")
    assert "vsr1: the compiled extension was NOT built" in output
    assert "install a C++20 compiler" in output
    site = install(archive, tmp_path / "site")
    done = run(sys.executable, "-P", "-c", TRY_IT, str(site), "auto", cwd=tmp_path, PYTHONPATH=str(site))
    assert done.stdout.strip() == "reference"

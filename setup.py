"""The build: packages, `kernels` as `vsr1.kernels`, csrc/cuda as `vsr1._cuda_source`, and the compiled extension `vsr1._C`.

The extension is C++ without torch headers, so building needs a compiler and pybind11 only. Without a compiler the package still
installs; the ops then run on their torch reference. Where nvcc is found, the CUDA kernels become the library `vsr1._cuda`.
"""

from __future__ import annotations

import shutil
import sys
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup
from setuptools.errors import BaseError, CCompilerError

# Ampere and Hopper as machine code; newer GPUs compile the PTX when they first load it.
CUDA_TARGETS = [("80", "sm_80"), ("90a", "sm_90a"), ("90", "compute_90")]
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--threads=0"]
CUDA_FLAGS += [f"-gencode=arch=compute_{arch},code={code}" for arch, code in CUDA_TARGETS]
WARNINGS = {
    "vsr1._C": """
vsr1: the compiled extension was NOT built ({error}).
vsr1: everything works, but the 'cpu' backend of the ops is missing, so searches on the CPU are several times slower.
vsr1: to get it, install a C++20 compiler (g++ >= 12 or clang >= 14; 'apt install g++') and install vsr1 again.
""",
    "vsr1._cuda": """
vsr1: the CUDA C++ kernels were NOT built ({error}).
vsr1: everything works; on a GPU CuPy compiles them when they are first used, or the Triton kernels serve. To have them compiled
vsr1: ahead, put CUDA's nvcc, 12.8 or newer, on the PATH and install vsr1 again.
""",
}


class OptionalBuildExt(build_ext):
    """Builds the extension, or says what is lost and lets the installation go on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name == "vsr1._cuda":
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except (OSError, BaseError, CCompilerError) as error:
            print(WARNINGS[ext.name].format(error=error), file=sys.stderr, flush=True)

    def build_cuda(self, ext: Extension) -> None:
        """One shared library for all targets, with the CUDA run time inside, so that it also loads where there is no driver."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            return  # most machines have none; NVRTC or the Triton kernels serve there
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([nvcc, *CUDA_FLAGS, "-o", str(target), *ext.sources])


ParallelCompile().install()  # the instruction sets' files take seconds each
setup(
    packages=[*find_packages(include=["vsr1", "vsr1.*"]), "vsr1.kernels", "vsr1._cuda_source"],
    package_dir={"vsr1.kernels": "kernels", "vsr1._cuda_source": "csrc/cuda"},
    package_data={"vsr1": ["py.typed"], "vsr1._cuda_source": ["*.cuh"]},
    ext_modules=[
        Pybind11Extension(
            "vsr1._C",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/**/*.cpp", recursive=True))],
            include_dirs=["csrc/include"],
            depends=[*glob("csrc/include/vsr1/*"), *glob("csrc/cpu/**", recursive=True), "csrc/cuda/noise.cuh"],
            cxx_std=20,
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,  # an editable install copies the built file back only if it is there
        ),
        Extension("vsr1._cuda", ["csrc/cuda/corpus_scan.cu"], depends=glob("csrc/cuda/*.cuh"), optional=True),
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)

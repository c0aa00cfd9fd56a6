"""What this machine offers the engine: facts about it, and every op's backends with the reason where one is missing.

`report` gathers, `main` prints; nothing here changes anything. The command `vsr1 doctor` is `main`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata

from vsr1.ops._dispatch import Row, extension_missing, table

LIBRARIES = ("torch", "transformers", "accelerate", "triton", "xformers", "cupy-cuda13x", "faiss-cpu")
DECODERS = {"PyAV": ("av", "av"), "DALI": ("nvidia.dali", "nvidia-dali-cuda130")}


@dataclass(frozen=True)
class Fact:
    """One line about the machine; `found` is False for what is absent."""

    name: str
    value: str
    found: bool = True


def facts() -> list[Fact]:
    """Python, processor, compiled extension, CUDA, libraries and video decoders, in the order they are printed."""
    import torch

    found = [
        Fact("python", f"{platform.python_version()} ({sys.platform}, {platform.machine()})"),
        Fact("cores", f"{os.cpu_count()} seen, torch uses {torch.get_num_threads()} threads"),
        _extension(),
        _cuda(),
        _cuda_kernels(),
    ]
    found += [_version(name, name) for name in LIBRARIES]
    found += [_decoder(label, module, package) for label, (module, package) in DECODERS.items()]
    return found


def report() -> tuple[list[Fact], list[Row]]:
    """The facts, and the table of ops x backends."""
    return facts(), list(table())


def main() -> int:
    """Print the report. Returns 0: a missing backend is no error, the reference of every op always serves."""
    from rich.console import Console
    from rich.table import Table

    found, rows = report()
    console = Console()
    machine = Table("what", "found", title="This machine", title_justify="left")
    for fact in found:
        machine.add_row(fact.name, fact.value if fact.found else f"[dim]{fact.value}[/dim]")
    console.print(machine)
    ops = Table(
        "op", "backend", "serves here", title="Ops and backends, in the order 'auto' tries them", title_justify="left"
    )
    for row in rows:
        ops.add_row(row.op, row.backend, "yes" if row.reason is None else f"no: {row.reason}")
    console.print(ops)
    return 0


def _extension() -> Fact:
    reason = extension_missing()
    if reason is not None:
        return Fact("compiled extension", reason, found=False)
    from vsr1._C import isa, isas

    return Fact("compiled extension", f"uses {isa()} (this processor has {', '.join(isas())})")


def _cuda() -> Fact:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no device"
        return Fact("CUDA", why, found=False)
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Fact("CUDA", f"{torch.version.cuda}: {names}")


def _cuda_kernels() -> Fact:
    from vsr1.ops import _cuda_code

    reason = _cuda_code.missing()
    if reason is not None:
        return Fact("CUDA C++ kernels", reason, found=False)
    how = {"nvcc": "compiled ahead by nvcc (vsr1._cuda)", "nvrtc": "compiled by NVRTC when first used (through CuPy)"}
    return Fact("CUDA C++ kernels", how[_cuda_code.maker() or ""])


def _version(label: str, package: str) -> Fact:
    try:
        return Fact(label, metadata.version(package))
    except metadata.PackageNotFoundError:
        return Fact(label, "not installed", found=False)


def _decoder(label: str, module: str, package: str) -> Fact:
    parent = module.partition(".")[0]
    if importlib.util.find_spec(parent) is None or importlib.util.find_spec(module) is None:
        return Fact(f"decoder {label}", f"not installed ({package})", found=False)
    return _version(f"decoder {label}", package)


if __name__ == "__main__":
    sys.exit(main())

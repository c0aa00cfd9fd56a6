"""Which backend serves an op: one table for all of them.

An op registers its backends in the order "auto" should try them, each with two questions: what this machine is `missing`, and
why the backend `refuses` one call. `resolve` asks them for a call and names the backend that serves it, `table` asks the first
question for every op (that is what `vsr1 doctor` prints). Call `resolve` inside the implementation of the torch.library custom
op, not around it: the choice is then made when the op runs, also under torch.compile, and tracing never sees it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import pkgutil
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vsr1.errors import BackendUnavailable

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("vsr1.ops")
_last: ContextVar[str | None] = ContextVar("vsr1_last_backend", default=None)
_ops: dict[str, dict[str, Backend]] = {}


def _nothing(**_: Any) -> None:
    """Nothing is missing, or nothing is refused."""


@dataclass(frozen=True)
class Backend:
    """One way to compute an op. Both questions answer None for "nothing", or the reason as half a sentence.

    `missing()` is about the machine (no compiler extension, no GPU). `refuses(device=, dtype=, **facts)` is about one call;
    `facts` are whatever the op passes to `resolve`. The defaults fit a plain-torch reference, which serves everything.
    """

    missing: Callable[[], str | None] = _nothing
    refuses: Callable[..., str | None] = _nothing


@dataclass(frozen=True)
class Row:
    """One line of the table: `reason` is None where this machine has the backend."""

    op: str
    backend: str
    reason: str | None


def register(op: str, **backends: Backend) -> None:
    """Enter an op and its backends, in the order "auto" tries them (fastest first, the reference last)."""
    _ops[op] = backends


def resolve(op: str, backend: str, *, device: torch.device, dtype: torch.dtype, **facts: Any) -> str:
    """Name the backend that serves this call of `op` and remember it for `last_backend`.

    `backend` is "auto" or a registered name. Raises ValueError for an unknown name and BackendUnavailable, with the reason,
    for a named backend that cannot serve; for "auto" with no backend left it gives every reason.
    """
    backends = _ops[op]
    if backend != "auto" and backend not in backends:
        raise ValueError(f"{op}: unknown backend {backend!r}; it has 'auto', " + ", ".join(map(repr, backends)))
    reasons = []
    for name in backends if backend == "auto" else (backend,):
        candidate = backends[name]
        reason = candidate.missing() or candidate.refuses(device=device, dtype=dtype, **facts)
        if reason is None:
            _last.set(name)
            _log.debug("%s: backend %s (asked for %s) on %s, %s", op, name, backend, device, dtype)
            return name
        reasons.append(f"backend '{name}' {reason}")
    raise BackendUnavailable(f"{op}: " + "; ".join(reasons))


def last_backend() -> str | None:
    """The backend that served the last op called in this thread (context), or None before the first."""
    return _last.get()


def table() -> Iterator[Row]:
    """Every op and backend of the package with what this machine lacks; imports all op modules."""
    package = importlib.import_module("vsr1.ops")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"vsr1.ops.{module.name}")
    for op in sorted(_ops):
        for name, backend in _ops[op].items():
            yield Row(op, name, backend.missing())


@functools.cache
def extension_missing() -> str | None:
    """Why the compiled extension cannot serve here, or None."""
    if importlib.util.find_spec("vsr1._C") is None:
        return "needs the compiled extension vsr1._C: install a C++20 compiler (g++ or clang) and reinstall vsr1"
    try:
        importlib.import_module("vsr1._C")
    except ImportError as error:
        return f"needs the compiled extension vsr1._C, which does not load ({error}): reinstall vsr1"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot serve here, or None. Under Triton's own interpreter mode (TRITON_INTERPRET=1) no GPU is needed."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton: pip install 'vsr1[gpu]'"
    if importlib.util.find_spec("vsr1.kernels") is None:
        return "needs vsr1.kernels, which an installed vsr1 has: pip install -e ."
    import torch
    import triton

    if triton.knobs.runtime.interpret or torch.cuda.is_available():
        return None
    return "needs a CUDA device, and torch sees none"


def cpu_only(*, device: torch.device, **_: Any) -> str | None:
    """The `refuses` of a backend that takes CPU tensors."""
    return None if device.type == "cpu" else f"takes CPU tensors; these are on {device}"


def cuda_only(*, device: torch.device, **_: Any) -> str | None:
    """The `refuses` of a Triton backend: CUDA tensors, or CPU tensors under Triton's interpreter."""
    import triton

    wanted = "cpu" if triton.knobs.runtime.interpret else "cuda"
    return None if device.type == wanted else f"takes {wanted} tensors; these are on {device}"

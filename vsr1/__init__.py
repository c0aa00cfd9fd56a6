"""vsr1: iterative video retrieval and reasoning by soft query refinement.

Importing this package is cheap: torch, transformers and the compiled kernels load when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "Moment", "Reply", "Trajectory", "Turn", "__version__"]

if TYPE_CHECKING:
    from vsr1.engine import Engine
    from vsr1.records import Moment, Reply, Trajectory, Turn


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from vsr1.engine import Engine

        return Engine
    if name in ("Moment", "Reply", "Trajectory", "Turn"):
        from vsr1 import records

        return getattr(records, name)
    raise AttributeError(f"module 'vsr1' has no attribute '{name}'")

"""The ops: what the engine computes, one module each, every op with a plain-torch reference and faster backends beside it.

`vsr1.ops.last_backend()` says which backend served the last call in this thread. Importing this package loads neither torch nor
triton; importing an op's module loads torch.
"""

from __future__ import annotations

from vsr1.ops._dispatch import last_backend

__all__ = ["last_backend"]

"""Shared by the tests of the ops: what torch computes in a stretch of code, and how large it gets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Keeps the largest tensor that a torch operation made, and every matrix product's rows, inner length and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in (torch.ops.aten.slice.Tensor, torch.ops.aten.t.default, torch.ops.aten.detach.default):
            self.largest = max([self.largest, *(one.numel() for one in tree_leaves(out) if isinstance(one, Tensor))])
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [one for one in args if isinstance(one, Tensor)][-2:]
            self.products.append((a.shape[0], a.shape[1], b.shape[1]))
        return out

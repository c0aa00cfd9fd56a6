"""Shared by all tests: under tests/ops, torch.empty is full of NaN, so an element that an op forgets to write fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

INTEGER_POISON = -(2**7) + 1  # fits every integer dtype and is no row, count or rank


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        tensor = allocate(*arguments, **options)
        if tensor.dtype.is_floating_point:
            return tensor.fill_(float("nan"))
        return (
            tensor.fill_(INTEGER_POISON)
            if tensor.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
            else tensor
        )

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what torch.empty, empty_like and Tensor.new_empty hand out in the tests of the ops."""
    if request.path.parent.name == "ops":
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        monkeypatch.setattr(Tensor, "new_empty", _poisoned(Tensor.new_empty))

"""Checkpoints that a kill cannot spoil: written aside, synced, renamed, and only then trusted.

A checkpoint is a folder `<stage>-step-<N>` with the weights (safetensors) and what training needs to go on exactly
(optimizer, random state). `done` marks a finished stage.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

_NAME = re.compile(r"^(?P<stage>\w+)-step-(?P<step>\d+)$")


def publish(aside: Path, final: Path) -> None:
    """Make the finished folder `aside` visible as `final`, replacing what stood there."""
    for file in aside.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)


def save(folder: Path, stage: str, step: int, modules: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Path:
    """Write checkpoint `step` of `stage` under `folder` and drop the stage's older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f".{stage}-step-*.tmp"):
        shutil.rmtree(leftover)
    aside = folder / f".{stage}-step-{step}.tmp"
    aside.mkdir()
    save_model(modules, str(aside / "model.safetensors"))
    with (aside / "training.pt").open("wb") as file:  # given a path, torch would not say that the disk is full
        states = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"optimizers": states, "rng": torch.get_rng_state(), "step": step}, file)
    final = folder / f"{stage}-step-{step}"
    publish(aside, final)
    for old in _all(folder, stage):
        if old != final:
            shutil.rmtree(old)
    return final


def _all(folder: Path, stage: str) -> list[Path]:
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    mine = [(int(match["step"]), path) for match, path in named if match["stage"] == stage]
    return [path for _, path in sorted(mine)]


def resume(folder: Path, stage: str, modules: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Load the stage's newest checkpoint, if any; returns the number of steps already done."""
    found = _all(folder, stage)
    if not found:
        return 0
    load_model(modules, str(found[-1] / "model.safetensors"))
    # not onto the device that wrote it: every process would fill the first one's GPU, and a CPU has none
    state: dict[str, Any] = torch.load(found[-1] / "training.pt", map_location="cpu", weights_only=True)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    return int(state["step"])

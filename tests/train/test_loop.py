"""The training loop on a toy module: it goes on exactly where it stopped, however it stopped."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vsr1.errors import Vsr1Error
from vsr1.train import checkpoint, loop
from vsr1.train.loop import Interrupted, Keeper, Optimisation, StepResult
from vsr1.train.monitor import Monitor

STEPS = 12
SETTINGS = Optimisation(steps=STEPS, learning_rate=1e-2, warmup=3)


class Killed(Exception):
    """Stands for a process that is gone."""


class Toy(nn.Module):
    """A regression with dropout, so that the random state matters too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)
        self.seen: list[int] = []

    def step(self, index: int) -> StepResult:
        self.seen.append(index)
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(index))
        hidden = nn.functional.dropout(self.body(batch).tanh(), 0.3)
        loss = (self.head(hidden)[:, 0] - batch.sum(1)).square().mean()
        return loss, {"square": loss.item()}

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.body.parameters())}, {"params": list(self.head.parameters()), "lr": 3e-2}]


Train = Callable[..., Toy]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Runs the loop on a fresh toy in the folder `name`; `every` is the time between checkpoints in seconds."""

    def run(
        name: str,
        step: Callable[[Toy, int], StepResult] = Toy.step,
        every: float = 1e-9,
        settings: Optimisation = SETTINGS,
        toy: Toy | None = None,
    ) -> Toy:
        toy = toy or Toy()
        torch.manual_seed(1)
        with Monitor(tmp_path / name) as monitor:
            keeper = Keeper(tmp_path / name / "checkpoints", monitor, every)
            loop.train("toy", toy, toy.groups(), lambda index: step(toy, index), settings, keeper)
        return toy

    return run


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def same(one: Toy, other: Toy) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def dies_at(fatal: int) -> Callable[[Toy, int], StepResult]:
    def step(toy: Toy, index: int) -> StepResult:
        if index == fatal:
            raise Killed
        return toy.step(index)

    return step


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(train: Train, tmp_path: Path) -> None:
    whole = train("whole")
    with pytest.raises(Killed):
        train("broken", dies_at(5))
    again = train("broken")
    assert again.seen == list(range(5, STEPS))
    assert same(again, whole)
    assert not same(again, Toy())
    assert saved(tmp_path / "broken") == ["toy-step-12"]


def test_a_run_killed_between_checkpoints_repeats_the_steps_since(train: Train, tmp_path: Path) -> None:
    whole = train("whole")
    with pytest.raises(Killed):
        train("broken", dies_at(4))

    def slow(toy: Toy, index: int) -> StepResult:
        return dies_at(8)(toy, index)

    with pytest.raises(Killed):
        train("broken", slow, every=1e9)
    assert saved(tmp_path / "broken") == ["toy-step-4"]
    again = train("broken")
    assert again.seen == list(range(4, STEPS))
    assert same(again, whole)


def test_a_finished_stage_is_loaded_and_not_repeated(train: Train) -> None:
    whole = train("whole")
    again = train("whole")
    assert again.seen == []
    assert same(again, whole)


def test_the_last_step_is_saved_however_rare_checkpoints_are(train: Train, tmp_path: Path) -> None:
    train("rare", every=1e9)
    assert saved(tmp_path / "rare") == ["toy-step-12"]


def test_schedule() -> None:
    settings = Optimisation(steps=110, learning_rate=1.0, warmup=10, final_fraction=0.05)
    assert [settings.rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert settings.rate(10) == pytest.approx(1.0)
    assert settings.rate(60) == pytest.approx(0.525)
    assert settings.rate(35) == pytest.approx(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert settings.rate(110) == pytest.approx(0.05)
    assert settings.rate(500) == pytest.approx(0.05)
    assert Optimisation(steps=5, learning_rate=1.0, warmup=0).rate(0) == 1.0
    assert Optimisation(steps=2, learning_rate=1.0, warmup=5).rate(1) == pytest.approx(0.4)


def test_each_group_keeps_its_own_peak(train: Train) -> None:
    """AdamW's first update is the learning rate times the sign of the gradient, less the decay."""
    settings = Optimisation(steps=1, learning_rate=1e-2, warmup=4, weight_decay=0.0, clip=1e9, muon=0.0)
    before, after = Toy(), train("peaks", settings=settings)
    moved = {name: (weight - before.state_dict()[name]).abs().max() for name, weight in after.state_dict().items()}
    assert moved["body.weight"] == pytest.approx(1e-2 / 4, rel=1e-3)
    assert moved["head.weight"] == pytest.approx(3e-2 / 4, rel=1e-3)


def test_the_gradient_is_clipped_over_all_groups(train: Train, tmp_path: Path) -> None:
    squares: list[float] = []

    def step(toy: Toy, index: int) -> StepResult:
        assert all(weight.grad is None for weight in toy.parameters())  # they have made room
        squares.append(0.0)
        loss, numbers = toy.step(index)
        assert loss is not None
        return 1e3 * loss, numbers

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        squares[-1] += sum(float(weight.grad.square().sum()) for weight in weights if weight.grad is not None)

    handle = register_optimizer_step_pre_hook(look)
    try:
        train("clipped", step)
    finally:
        handle.remove()
    assert [square**0.5 for square in squares] == pytest.approx([SETTINGS.clip] * STEPS, rel=1e-4)
    assert all(line["gradient_norm"] > 10 for line in log(tmp_path / "clipped"))


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_log_lines(train: Train, tmp_path: Path) -> None:
    train("logged")
    lines = log(tmp_path / "logged")
    assert [line["step"] for line in lines] == [0, 5, 10, 11]
    assert all(line["stage"] == "toy" for line in lines)
    assert all({"time", "learning_rate", "square", "loss", "gradient_norm"} <= set(line) for line in lines)
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-2 * SETTINGS.rate(i) for i in (0, 5, 10, 11)])
    assert list((tmp_path / "logged" / "tensorboard").glob("events.*"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_stage_and_step(train: Train, tmp_path: Path, value: float) -> None:
    def step(toy: Toy, index: int) -> StepResult:
        loss, numbers = toy.step(index)
        assert loss is not None
        return (loss * value if index == 6 else loss), numbers

    with pytest.raises(Vsr1Error, match=rf"stage 'toy', step 6: the loss is {value}"):
        train("diverged", step)
    assert saved(tmp_path / "diverged") == ["toy-step-6"]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(train: Train, tmp_path: Path) -> None:
    toys: list[Toy] = []

    def step(toy: Toy, index: int) -> StepResult:
        toys.append(toy)
        loss, numbers = toy.step(index)
        assert loss is not None
        spoiled = (toy.body.weight.sum() * 0).sqrt()  # 0, and its derivative is infinite
        return (loss + spoiled if index == 6 else loss), numbers

    with pytest.raises(Vsr1Error, match="stage 'toy', step 6: the gradient_norm is nan"):
        train("spoiled", step)
    assert saved(tmp_path / "spoiled") == ["toy-step-6"]
    assert all(torch.isfinite(weight).all() for weight in toys[-1].parameters())


def test_a_step_with_nothing_to_learn_from_makes_no_update(train: Train, tmp_path: Path) -> None:
    def step(toy: Toy, index: int) -> StepResult:
        return None, {"reward": 0.5}

    assert same(train("idle", step), Toy())
    assert all(line["reward"] == 0.5 and "loss" not in line for line in log(tmp_path / "idle"))

    weights: list[torch.Tensor] = []

    def sometimes(toy: Toy, index: int) -> StepResult:
        weights.append(toy.body.weight.detach().clone())
        return toy.step(index) if index != 4 else (None, {})

    train("sometimes", sometimes)
    assert [torch.equal(a, b) for a, b in itertools.pairwise(weights)] == [i == 4 for i in range(STEPS - 1)]


@pytest.mark.parametrize("moment", [5, STEPS - 1], ids=["midway", "in the last step"])
def test_ctrl_c_ends_the_step_saves_and_the_next_call_goes_on(train: Train, tmp_path: Path, moment: int) -> None:
    def step(toy: Toy, index: int) -> StepResult:
        if index == moment:
            os.kill(os.getpid(), signal.SIGINT)
        return toy.step(index)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=rf"'toy' after step {moment + 1} of 12"):
        train("stopped", step, every=1e9)
    assert signal.getsignal(signal.SIGINT) is before
    assert saved(tmp_path / "stopped") == [f"toy-step-{moment + 1}"]
    again = train("stopped")
    assert again.seen == list(range(moment + 1, STEPS))
    assert same(again, train("whole"))


def test_a_second_ctrl_c_does_not_wait_for_the_step(train: Train) -> None:
    def step(toy: Toy, index: int) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train("stopped", step)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_loop_runs_outside_the_main_thread(train: Train) -> None:
    found: list[Toy] = []
    thread = threading.Thread(target=lambda: found.append(train("thread")))
    thread.start()
    thread.join()
    assert found[0].seen == list(range(STEPS))


# Checkpoints


def parts(seed: int) -> tuple[nn.Linear, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 3)
    return model, [torch.optim.AdamW(model.parameters())]


def test_leftovers_of_a_kill_are_ignored_and_replaced(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    checkpoint.save(tmp_path, "toy", 3, model, optimizer)
    for step in (4, 9):
        (tmp_path / f".toy-step-{step}.tmp").mkdir()
        (tmp_path / f".toy-step-{step}.tmp" / "model.safetensors").write_bytes(b"half")
    other, its_optimizer = parts(1)
    assert checkpoint.resume(tmp_path, "toy", other, its_optimizer) == 3
    assert torch.equal(other.weight, model.weight)
    checkpoint.save(tmp_path, "toy", 4, model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["toy-step-4"]
    assert checkpoint.resume(tmp_path, "toy", *parts(1)) == 4


def test_a_checkpoint_is_not_loaded_onto_the_device_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run begun on a GPU goes on without one, and several processes do not all fill the first one's."""
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        checkpoint.save(tmp_path, "toy", 3, *parts(0))
    assert checkpoint.resume(tmp_path, "toy", *parts(1)) == 3


@pytest.mark.parametrize("fails", ["save_model", "publish"])
def test_a_save_that_dies_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    model, optimizer = parts(0)
    checkpoint.save(tmp_path, "toy", 3, model, optimizer)

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, fails, die)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, "toy", 4, model, optimizer)
    assert checkpoint.resume(tmp_path, "toy", *parts(1)) == 3
    checkpoint.save(tmp_path, "toy", 4, model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["toy-step-4"]


def test_a_checkpoint_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its final name a checkpoint is only ever seen complete."""
    seen: list[set[str]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        assert not Path(target).exists()
        seen.append({path.name for path in self.iterdir()})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    checkpoint.save(tmp_path, "toy", 1, *parts(0))
    assert seen == [{"model.safetensors", "training.pt"}]


def test_stages_and_numbers_are_told_apart(tmp_path: Path) -> None:
    model, optimizer = parts(0)
    checkpoint.save(tmp_path, "sft", 8, model, optimizer)
    checkpoint.save(tmp_path, "grpo", 2, model, optimizer)
    (tmp_path / "notes").mkdir()
    assert checkpoint.resume(tmp_path, "grpo", *parts(1)) == 2
    checkpoint.save(tmp_path, "sft", 10, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grpo-step-2", "notes", "sft-step-10"]
    assert checkpoint.resume(tmp_path, "vision", *parts(1)) == 0
    assert checkpoint.resume(tmp_path / "none", "vision", *parts(1)) == 0


def test_ten_is_newer_than_nine(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint.save(tmp_path / str(step), "toy", step, *parts(step))
        (tmp_path / str(step) / f"toy-step-{step}").rename(tmp_path / f"toy-step-{step}")
    model, optimizer = parts(1)
    assert checkpoint.resume(tmp_path, "toy", model, optimizer) == 10
    assert torch.equal(model.weight, parts(10)[0].weight)


def test_publish_replaces_what_stood_there(tmp_path: Path) -> None:
    for name, text in (("old", "old"), ("new", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(text)
    (tmp_path / "old" / "b.txt").write_text("gone")
    checkpoint.publish(tmp_path / "new", tmp_path / "old")
    assert [(path.name, path.read_text()) for path in (tmp_path / "old").iterdir()] == [("a.txt", "new")]
    assert not (tmp_path / "new").exists()

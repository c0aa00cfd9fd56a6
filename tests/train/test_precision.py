"""Training in bfloat16: float32 masters take the small updates, and every part of both stages' losses takes the mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.train.recorder import Recorder
from vsr1.agent import generate
from vsr1.data.world import World
from vsr1.errors import Vsr1Error
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.train import checkpoint, grpo, loop, sft
from vsr1.train.grpo import GrpoTraining
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation, StepResult
from vsr1.train.monitor import Monitor
from vsr1.train.precision import masters
from vsr1.train.sft import SftTraining
from vsr1.train.templated import Templates
from vsr1.train.templated import meanings as meanings_of

SETTINGS = Optimisation(steps=40, learning_rate=1e-4, warmup=0, weight_decay=0.0, muon=0.0, final_fraction=1.0)


class Killed(Exception):
    """Stands for a process that is gone."""


class Toy(nn.Module):
    """A bfloat16 map with a float32 head, as a policy is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Linear(6, 6).bfloat16()
        self.head = nn.Linear(6, 1)

    def step(self, index: int) -> StepResult:
        """The loss comes in two parts, whose gradients add up."""
        return (self.loss(half) for half in batch(index).to(self.body.weight).chunk(2)), {}

    def loss(self, part: Tensor) -> Tensor:
        return (self.head(self.body(part).float())[:, 0] - 3.0).square().sum() / 8


def batch(index: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(index))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Toy]:
    def run(name: str, fatal: int = -1, toy: Toy | None = None) -> Toy:
        toy = toy or Toy()

        def step(index: int) -> StepResult:
            if index == fatal:
                raise Killed
            return toy.step(index)

        with Monitor(tmp_path / name) as monitor:
            keeper = Keeper(tmp_path / name / "checkpoints", monitor, 1e9 if fatal < 0 else 1e-9)
            loop.train("toy", toy, [{"params": list(toy.parameters())}], step, SETTINGS, keeper)
        return toy

    return run


def test_masters_move_where_plain_bfloat16_stands_still(train: Any) -> None:
    plain, start = Toy(), Toy().body.weight
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-4, weight_decay=0.0)
    for index in range(SETTINGS.steps):
        optimizer.zero_grad()
        plain.loss(batch(index).bfloat16()).backward()
        optimizer.step()
    far = start.abs() > 2**-4  # from here on half the distance to the next number is more than two updates
    assert torch.equal(plain.body.weight[far], start[far])
    trained = train("masters")
    moved = (trained.body.weight - start).float()
    assert trained.body.weight.dtype == torch.bfloat16 and trained.head.weight.dtype == torch.float32
    assert (moved[far] != 0).float().mean() > 0.4
    assert moved.abs().max() < 40 * 1e-4 + 2**-8


def test_masters_end_where_float32_does(train: Any, tmp_path: Path) -> None:
    """But for the rounding of what the model computes."""
    train("half")
    train("wide", toy=Toy().float())
    found = torch.load(tmp_path / "half" / "checkpoints" / "toy-step-40" / "training.pt", weights_only=True)
    (master,) = [one for state in found["optimizers"] for one in state.get("masters", ()) if one.dim() == 2]
    wide = load_file(tmp_path / "wide" / "checkpoints" / "toy-step-40" / "model.safetensors")["body.weight"]
    assert (master - wide).norm() < 0.02 * (wide - Toy().body.weight).norm()


def test_resuming_restores_the_masters(train: Any, tmp_path: Path) -> None:
    whole = train("whole")
    with pytest.raises(Killed):
        train("broken", 17)
    again = train("broken")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), whole.parameters(), strict=True))
    ends = [tmp_path / name / "checkpoints" / "toy-step-40" / "training.pt" for name in ("whole", "broken")]
    one, other = (torch.load(end, weights_only=True)["optimizers"][0] for end in ends)
    assert len(one["masters"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(one["masters"], other["masters"], strict=True))
    assert not any(torch.equal(a, a.bfloat16().float()) for a in one["masters"])  # they hold what bfloat16 does not


def test_the_precision_of_a_checkpoint_does_not_change(train: Any, tmp_path: Path) -> None:
    toy = Toy()
    checkpoint.save(tmp_path, "toy", 1, toy, [torch.optim.AdamW(toy.parameters())])
    optimizer = torch.optim.AdamW(toy.parameters())
    with masters([optimizer]), pytest.raises(Vsr1Error, match="masters of 0 weights, and 2"):
        checkpoint.resume(tmp_path, "toy", toy, [optimizer])

    half = torch.optim.AdamW(toy.parameters())
    with masters([half]):
        checkpoint.save(tmp_path, "half", 1, toy, [half])
    wide = torch.optim.AdamW(toy.float().parameters())
    with masters([wide]), pytest.raises(Vsr1Error, match="masters of 2 weights, and 0"):
        checkpoint.resume(tmp_path, "half", toy, [wide])


def test_nothing_is_left_behind() -> None:
    toy = Toy()
    optimizer = torch.optim.AdamW(toy.parameters())
    with masters([optimizer]):
        loss = toy.body(torch.ones(1, 6).bfloat16()).sum()
        loss.backward()
        assert toy.body.weight.grad is None
        assert any(weight is toy.head.weight for weight in optimizer.param_groups[0]["params"])
    toy.body(torch.ones(1, 6).bfloat16()).sum().backward()
    assert toy.body.weight.grad is not None
    assert {weight.dtype for weight in optimizer.param_groups[0]["params"]} == {torch.float32}


# The two stages


@pytest.fixture
def half_policy(tiny_policy: Policy) -> Policy:
    """The language model in bfloat16, the refine head in float32; the vision tower belongs to the embedder too."""
    tiny_policy.model.model.language_model.bfloat16()
    tiny_policy.model.lm_head.bfloat16()
    assert tiny_policy.model.lm_head.weight is tiny_policy.model.get_input_embeddings().weight
    return tiny_policy


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in policy.named_parameters()}


def test_the_first_stage_trains_in_bfloat16(
    half_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, tmp_path: Path
) -> None:
    optimisation = Optimisation(steps=2, learning_rate=1e-3, warmup=0)
    settings = SftTraining(optimisation, batch=6, refine_from=0.0, contrast_from=0.0)
    before, monitor = weights(half_policy), Recorder()
    keeper = Keeper(tmp_path, monitor, 1e9)  # type: ignore[arg-type]
    source = Templates(half_policy, tiny_embedder, world, shelf, settings, 1)
    sft.train_sft(half_policy, tiny_embedder, source, shelf, settings, keeper)
    assert {"say", "distillation", "contrast", "loss"} <= set(monitor.lines[-1])
    after = weights(half_policy)
    moved = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert {name.split(".")[0] for name in moved} == {"model", "head"} and not any("visual" in name for name in moved)
    assert all(one.dtype == (torch.float32 if "head." in name[:5] or "visual" in name else torch.bfloat16)
               for name, one in after.items())  # fmt: skip


@pytest.mark.parametrize("rank", [0, 2])
def test_the_second_stage_trains_in_bfloat16(
    half_policy: Policy,
    tiny_embedder: Embedder,
    world: World,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: Any,
    rank: int,
) -> None:
    if rank:
        pytest.importorskip("peft")
    settings = GrpoTraining(
        optimisation=Optimisation(steps=2, learning_rate=1e-3, warmup=0, muon=0.0),
        queries=2,
        group=3,
        turns=2,
        max_tokens=6,
        validate_every=0,
        lora_rank=rank,
        latent_beta=0.1,
    )
    speak = generate.draw

    def refining(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """Every other reply ends with <REFINE> at once, which random weights never say."""
        tokens, _ = speak(logits, *options)
        tokens[::2] = half_policy.refine_id
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(generate, "draw", refining)
    before, monitor = weights(half_policy), Recorder()
    moments = [query.moment for query in world.queries("train")]
    keeper = Keeper(tmp_path, monitor, 1e9)  # type: ignore[arg-type]
    meanings = meanings_of(tiny_embedder, world.queries("train"))
    grpo.train_grpo(half_policy, tiny_embedder, moments, shelf, settings, 1, keeper, None, meanings)
    assert all(math.isfinite(line["loss"]) for line in monitor.lines), monitor.lines
    assert {"latent_loss", "latent_kl", "contrast", "distillation", "kl"} <= set(monitor.lines[-1])
    after = weights(half_policy)
    assert any(not torch.equal(one, after[name]) for name, one in before.items() if name.startswith("model."))

"""GRPO's stage as a whole, small: stale policies, adapters, validation, speakers, resuming between rollouts."""

from __future__ import annotations

import itertools
import random
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.train.recorder import Recorder
from vsr1.agent import rollout
from vsr1.data.world import World
from vsr1.errors import ConfigError
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.train import grpo, lora
from vsr1.train.grpo import GrpoTraining
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation
from vsr1.train.sft import trainable


def unlike(trajectory: Any, context: Any) -> float:
    """A reward in which any two trajectories differ, so that there is something to learn."""
    return random.Random(str([turn.token_ids for turn in trajectory.turns])).random()


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> GrpoTraining:
    monkeypatch.setitem(sys.modules, "rewards_of_mine", SimpleNamespace(unlike=unlike))
    return GrpoTraining(
        optimisation=Optimisation(steps=4, learning_rate=1e-3, warmup=0, muon=0.0),
        queries=2,
        group=3,
        turns=2,
        max_tokens=6,
        rewards={"rewards_of_mine:unlike": 1.0},
    )


@pytest.fixture
def trained(tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, tmp_path: Any) -> Any:
    """Runs the stage and returns its log."""

    def run(settings: GrpoTraining, validate: Any = None) -> list[dict[str, float]]:
        monitor: Any = Recorder()
        moments = [query.moment for query in world.queries("train")]
        keeper = Keeper(tmp_path / "checkpoints", monitor, 0.0)
        grpo.train_grpo(tiny_policy, tiny_embedder, moments, shelf, settings, 1, keeper, validate)
        return monitor.lines

    return run


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many trajectories each rollout asked for."""
    calls, run = [], rollout.run

    def counted(*arguments: Any, **options: Any) -> Any:
        found = run(*arguments, **options)
        calls.append(len(found))
        return found

    monkeypatch.setattr(rollout, "run", counted)
    return calls


@pytest.mark.parametrize("bootstrapped", [0.0, 0.5])
def test_a_step_expects_the_videos_that_the_next_one_is_shown_first(
    trained: Any, settings: GrpoTraining, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, bootstrapped: float
) -> None:
    expected, shown = [], []
    run = rollout.run
    monkeypatch.setattr(shelf, "expect", lambda video_ids: expected.append(set(video_ids)))

    def watched(*arguments: Any, **options: Any) -> list[Any]:
        found = run(*arguments, **options)
        shown.append({one.turns[0].video_id for one in found})
        return found

    monkeypatch.setattr(rollout, "run", watched)
    trained(replace(settings, bootstrapped=bootstrapped))
    assert len(shown) == 4 and expected == shown[1:]


def test_a_rollout_serves_several_updates_of_a_moving_policy(trained: Any, settings: Any, rolled: list[int]) -> None:
    lines = trained(replace(settings, updates=2))
    assert rolled == [6, 6] and [line["step"] for line in lines] == [0, 1, 2, 3]
    for line in lines:
        fresh = line["step"] % 2 == 0
        assert (line["old_kl"] < 1e-9) == fresh, line
        assert line["ratio"] == pytest.approx(1.0, abs=1e-4 if fresh else 0.5)
    assert lines[0]["reward"] == lines[1]["reward"] != lines[2]["reward"]


def test_a_checkpoint_stands_between_rollouts(
    trained: Any, settings: Any, rolled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the third of four updates, a run goes on from the second, which ended a rollout."""
    losses, calls = grpo.losses, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(*arguments)

    monkeypatch.setattr(grpo, "losses", failing)
    with pytest.raises(KeyboardInterrupt):
        trained(replace(settings, updates=2))
    lines = trained(replace(settings, updates=2))
    assert [line["step"] for line in lines] == [2, 3] and rolled == [6, 6, 6]


def test_held_out_figures_are_logged_as_often_as_asked(trained: Any, settings: Any) -> None:
    lines = trained(replace(settings, validate_every=3), lambda: {"held_out_vcmr": 0.5})
    assert ["held_out_vcmr" in line for line in lines] == [True, False, False, True]
    for line in lines:
        assert 0 <= line["vcmr"] <= line["accepted_right"] <= 1 and 0 <= line["ver"] <= 1
    assert any(name.startswith("refine_gain_") for line in lines for name in line) == any(
        line["latent_loss"] for line in lines if "latent_loss" in line
    )


def test_another_speaker_is_told_of_every_update(trained: Any, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[torch.Tensor] = []

    class Spy(grpo.OwnSpeaker):
        def __init__(self, url: str, *, weights: str) -> None:
            super().__init__()
            assert (url, weights) == ("http://server:1", "shared")

        def sync(self, policy: Policy) -> None:
            told.append(policy.model.lm_head.weight.detach().clone())

    monkeypatch.setattr(grpo, "VllmSpeaker", Spy)
    trained(replace(settings, speaker="vllm", vllm_url="http://server:1", vllm_weights="shared"))
    assert len(told) == 4 and all(not torch.equal(one, other) for one, other in itertools.pairwise(told))


def logits(policy: Policy, shelf: Shelf) -> torch.Tensor:
    row = grpo.protocol.prompt(policy.tokenizer, "a red circle", shelf.features(shelf.video_ids[:1])[0])
    with torch.no_grad():
        return policy.logits(backbone.run(policy.model.model, [row])[0])


def test_adapters_learn_and_leave_a_plain_model(tiny_policy: Policy, shelf: Shelf, trained: Any, settings: Any) -> None:
    pytest.importorskip("peft")
    names = set(tiny_policy.state_dict())
    before = {name: weight.clone() for name, weight in tiny_policy.model.state_dict().items()}
    lines = trained(
        replace(settings, lora_rank=2, beta=0.1, optimisation=replace(settings.optimisation, learning_rate=0.05))
    )
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6) and lines[-1]["kl"] > 1e-5
    assert set(tiny_policy.state_dict()) == names
    after = tiny_policy.model.state_dict()
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved and all(name.split(".")[-2] in lora.PROJECTIONS for name in moved)


def test_the_reference_of_adapters_is_the_base(tiny_policy: Policy, shelf: Shelf) -> None:
    pytest.importorskip("peft")
    plain = logits(tiny_policy, shelf)
    tuner = lora.adapt(tiny_policy, 2)
    groups = trainable(tiny_policy, 1e-3, adapters=True)
    learning = [name for name, weight in tiny_policy.named_parameters() if weight.requires_grad]
    assert all("lora_" in name or name.startswith("head.") for name in learning)
    assert sum(len(group["params"]) for group in groups) == len(learning)
    with torch.no_grad():
        for name, weight in tiny_policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    adapted = logits(tiny_policy, shelf)
    assert (adapted - plain).abs().max() > 1e-2
    with lora.without(tiny_policy, tuner)() as base:
        assert torch.equal(logits(base, shelf), plain)
    assert torch.equal(logits(tiny_policy, shelf), adapted)
    lora.merge(tiny_policy, tuner)
    torch.testing.assert_close(logits(tiny_policy, shelf), adapted, atol=1e-4, rtol=1e-4)


def test_adapters_without_their_library_say_what_to_install(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'vsr1\[lora\]'"):
        lora.adapt(tiny_policy, 2)

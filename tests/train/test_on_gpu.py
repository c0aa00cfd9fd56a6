"""The loop and an update of it on a GPU, beside the same on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Sampling
from vsr1.data.world import World
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.records import Trajectory
from vsr1.train import grpo
from vsr1.train.credit import Judged
from vsr1.train.grpo import GrpoTraining, Learning, Rolled
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper, Optimisation
from vsr1.train.monitor import Monitor
from vsr1.train.sft import trainable

EAGERNESS = 3.0


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights would hardly ever ask for a refinement."""
    plain = Policy.logits

    def eager(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
        logits = plain(policy, hidden).clone()
        logits[:, policy.refine_id] += EAGERNESS
        return logits

    monkeypatch.setattr(Policy, "logits", eager)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def on_gpu(
    tiny_embedder: Embedder, tiny_policy: Policy, shelf: Shelf, tmp_path: Path
) -> tuple[Embedder, Policy, Shelf]:
    """The same models and corpus on the card."""
    tiny_embedder.save_pretrained(tmp_path / "embedder")
    tiny_policy.save_pretrained(tmp_path / "policy")
    embedder = Embedder.from_pretrained(tmp_path / "embedder").to("cuda").eval().requires_grad_(False)
    policy = Policy.from_pretrained(tmp_path / "policy", videos=embedder.videos).to("cuda").eval()
    return embedder, policy, Shelf(shelf.corpus, embedder.videos)


def test_the_loop_finds_and_says_the_same(
    on_gpu: tuple[Embedder, Policy, Shelf], tiny_embedder: Embedder, tiny_policy: Policy, shelf: Shelf, world: World
) -> None:
    moments = [query.moment for query in world.queries("train")[:6]]
    settings = LoopSettings(turns=2, sampling=Sampling(max_tokens=12), accumulate=True)
    ours = rollout.run(on_gpu[1], on_gpu[0], on_gpu[2], moments, settings=settings)
    theirs = rollout.run(tiny_policy, tiny_embedder, shelf, moments, settings=settings)
    assert any(turn.actions is not None for one in theirs for turn in one.turns)
    for one, other in zip(ours, theirs, strict=True):
        assert one.stop == other.stop != "failed"
        for turn, expected in zip(one.turns, other.turns, strict=True):
            assert (turn.video_id, turn.token_ids, turn.rank) == (
                expected.video_id,
                expected.token_ids,
                expected.rank,
            )
            torch.testing.assert_close(turn.token_logps.cpu(), expected.token_logps, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(turn.query.cpu(), expected.query, atol=1e-3, rtol=1e-3)


def moved(one: Trajectory, device: str) -> Trajectory:
    """A trajectory with the tensors of its turns on a device."""
    turns = []
    for turn in one.turns:
        tensors = {
            name: getattr(turn, name).to(device)
            for name in ("token_logps", "query", "latents", "actions")
            if getattr(turn, name) is not None
        }
        turns.append(replace(turn, **tensors))
    return replace(one, turns=tuple(turns))


def test_an_update_has_the_same_gradients(
    on_gpu: tuple[Embedder, Policy, Shelf], tiny_embedder: Embedder, tiny_policy: Policy, shelf: Shelf, world: World
) -> None:
    moments = [query.moment for query in world.queries("train")[:3]]
    settings = GrpoTraining(contrast_weight=0.3)
    loop = LoopSettings(turns=2, samples=2, sigma=settings.sigma, sampling=Sampling(1.0, 1.0, 12))
    found = rollout.run(tiny_policy, tiny_embedder, shelf, moments, settings=loop)
    said = sum(len(one.turns) for one in found)
    refined = sum(turn.actions is not None for one in found for turn in one.turns)
    assert refined > 1
    generator = torch.Generator().manual_seed(0)
    judged = Judged(torch.randn(said, generator=generator), torch.randn(refined, generator=generator), {})
    gradients = []
    for embedder, policy, corpus in ((tiny_embedder, tiny_policy, shelf), on_gpu):
        trainable(policy, 1e-3)
        there = [moved(one, str(policy.videos.device)) for one in found]
        packs = grpo.pack(Rolled(there, judged, {}), policy, corpus, settings)
        learning = Learning(policy, grpo.frozen_copy(policy), embedder, corpus, settings)
        for loss in grpo.losses(learning, packs, {}):
            loss.backward()
        gradients.append({name: one.grad.cpu() for name, one in policy.named_parameters() if one.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(float(one.abs().max()) for one in gradients[0].values())
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=2e-3 * scale, rtol=1e-2, msg=name)


def test_stage_two_trains(on_gpu: tuple[Embedder, Policy, Shelf], world: World, tmp_path: Path) -> None:
    embedder, policy, shelf = on_gpu
    before = {name: one.detach().clone() for name, one in policy.named_parameters()}
    settings = GrpoTraining(
        optimisation=Optimisation(steps=2, learning_rate=1e-3, warmup=1, muon=0.0), queries=2, turns=2, max_tokens=12
    )
    moments = [query.moment for query in world.queries("train")[:4]]
    with Monitor(tmp_path) as monitor:
        grpo.train_grpo(policy, embedder, moments, shelf, settings, 1, Keeper(tmp_path / "kept", monitor))
    changed = [name for name, one in policy.named_parameters() if not torch.equal(one, before[name])]
    assert changed and all(bool(torch.isfinite(one).all()) for one in policy.parameters())
    assert not any("visual" in name for name in changed)

"""The packed update against the plain one: every reply a row of its own, with its own copy of prompt and video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.data.world import World
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import info_nce
from vsr1.ops.soft_query import gaussian_logp
from vsr1.records import Reply, Trajectory, Turn
from vsr1.train import grpo
from vsr1.train.credit import Judged
from vsr1.train.grpo import GrpoTraining, Learning, Rolled
from vsr1.train.library import Shelf
from vsr1.train.losses import distillation_loss, latent_loss, policy_loss
from vsr1.train.sft import trainable


@pytest.fixture
def policy(tiny_policy: Policy) -> Policy:
    """In float64, and moved away from what was sampled."""
    return tiny_policy.double()


@pytest.fixture
def rolled(policy: Policy, world: World, shelf: Shelf) -> Rolled:
    """Five trajectories of two queries: up to three turns, replies of different lengths, prompts shared by some."""
    generator = torch.Generator().manual_seed(1)
    queries, names = world.queries("train")[:2], shelf.video_ids

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def turn(video_id: str, answer: Any, words: int) -> Turn:
        span = (1.0, 2.0) if answer == "matched" else (None, None)
        reply = Reply(answer, *span, " ".join(["red"] * words), True)
        ids = tuple(policy.tokenizer(protocol.render(reply), add_special_tokens=False)["input_ids"])
        soft = normal(8, policy.settings.soft_size) if answer != "matched" else None
        means = None if soft is None else soft + 0.05 * normal(8, policy.settings.soft_size)
        query = torch.nn.functional.normalize(normal(shelf.corpus.dimension), dim=0).float()
        logps = -6.0 + 0.1 * normal(len(ids))
        return Turn(video_id, 0.5, 1, reply, protocol.render(reply), ids, logps, query, means, soft)

    def path(query: Any, *turns: Turn) -> Trajectory:
        return Trajectory(query.moment, turns, turns[-1].query, 1, "turns")

    a, b, c = names[:3]
    no, yes = "not_matched", "matched"
    found = [
        path(queries[0], turn(a, no, 3), turn(b, no, 1), turn(c, no, 6)),
        path(queries[0], turn(a, no, 9), turn(c, yes, 2)),
        path(queries[0], turn(b, yes, 4)),
        path(queries[1], turn(a, no, 2), turn(b, no, 5)),
        path(queries[1], turn(a, yes, 7)),
    ]
    return Rolled(
        found, Judged(torch.tensor([1.0, 0.9, 1.1, -0.5, -0.4, -0.5, 0.7, 0.6, -0.7]).double(), normal(6), {}), {}
    )


SETTINGS = GrpoTraining(
    beta=0.3,
    distillation_weight=0.0,
    latent_beta=0.4,
    sigma=0.1,
    clip_low=5e-1,
    clip_high=5e-1,
    sampling_temperature=0.8,
    contrast_weight=0.0,
)


def meanings(embedder: Embedder, rolled: Rolled) -> dict[str, Tensor]:
    """What the soft tokens of each query should resemble: anything."""
    size = embedder.model.get_input_embeddings().weight.shape[1]
    names = sorted({one.moment.query_id for one in rolled.found})
    targets = torch.randn((len(names), 8, size), generator=torch.Generator().manual_seed(7))
    return dict(zip(names, targets, strict=True))


def plain_soft(policy: Policy, row: Row, actions: Tensor) -> Tensor:
    """Means along the recorded actions, re-reading everything at every step."""
    model = policy.model.model
    inputs, _, following = backbone._assemble(model, [row], None)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    means = []
    for step in range(len(actions)):
        hidden = model.language_model(inputs_embeds=embeds, position_ids=positions).last_hidden_state
        means.append(policy.head.refine_projector(hidden[:, -1]))
        embeds = torch.cat([embeds, policy.head.refine_latent_input_projector(actions[None, step])[:, None]], 1)
        positions = torch.cat([positions, (following + step).view(1, 1, 1).expand(3, 1, 1)], 2)
    return torch.stack(means, 1)[0]


def plain_loss(
    policy: Policy, reference: Any, embedder: Embedder, shelf: Shelf, rolled: Rolled, settings: Any
) -> Tensor:
    """The same formulas over padded rows of plain passes."""

    def logps(model: Policy, row: Row, ids: tuple[int, ...]) -> Tensor:
        hidden, _ = backbone.run(model.model.model, [row])
        logits = model.model.lm_head(hidden[0, -len(ids) - 1 : -1]) / settings.sampling_temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]

    now, before, old, advantages, soft, anchors, queries, positive = [], [], [], [], [], [], [], []
    said = iter(rolled.judged.text_advantage)
    for one in rolled.found:
        for turn in one.turns:
            (video,) = shelf.features([turn.video_id])
            prompt = protocol.prompt(policy.tokenizer, one.moment.text, video, system=policy.settings.system)
            row = Row((*prompt.token_ids, *turn.token_ids), video)
            now.append(logps(policy, row, turn.token_ids))
            with torch.no_grad(), reference() as frozen:
                before.append(logps(frozen, row, turn.token_ids))
                if turn.actions is not None:
                    anchors.append(plain_soft(frozen, row, turn.actions))
            old.append(turn.token_logps)
            advantages.append(next(said))
            if turn.actions is not None:
                soft.append((plain_soft(policy, row, turn.actions), turn.actions, turn.latents))
                entering = policy.head.soft_tokens(soft[-1][0])[None]
                queries.append(embedder.embed_texts([one.moment.text], entering))
                positive.append(shelf.row(one.moment.video_id))
    pad = lambda parts: torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)  # noqa: E731
    mask = pad([torch.ones(len(one), dtype=torch.bool) for one in now])
    loss, _ = policy_loss(
        pad(now), pad(old), torch.stack(advantages), mask, loss_type=settings.loss_type, clip_low=0.5, clip_high=0.5,
        beta=settings.beta, ref_logp=pad(before), max_length=settings.max_tokens,
    )  # fmt: skip
    means, actions, latents = (torch.stack(part) for part in zip(*soft, strict=True))
    drawn = gaussian_logp(actions, latents, settings.sigma)
    latent, _ = latent_loss(means, actions, drawn, rolled.judged.turn_advantage, settings.sigma, 0.5)
    drift = (means - torch.stack(anchors)).square().mean() / (2 * settings.sigma**2)
    loss = loss + settings.latent_weight * latent + settings.latent_beta * drift
    if settings.distillation_weight:
        wanted = meanings(embedder, rolled)
        target = [wanted[one.moment.query_id] for one in rolled.found for turn in one.turns if turn.actions is not None]
        distilled = distillation_loss(
            policy.head.soft_tokens(means), torch.stack(target), torch.stack(list(wanted.values())).square().mean()
        )
        loss = loss + settings.distillation_weight * distilled
    if settings.contrast_weight:
        contrast = info_nce(torch.cat(queries), shelf.matrix(), torch.tensor(positive), settings.temperature).mean()
        loss = loss + settings.contrast_weight * contrast
    return loss


def gradients(policy: Policy) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def packed(policy: Policy, reference: Any, embedder: Embedder, shelf: Shelf, rolled: Rolled, settings: Any) -> Any:
    numbers: dict[str, float] = {}
    packs = grpo.pack(rolled, policy, shelf, settings)
    total = 0.0
    learning = Learning(policy, reference, embedder, shelf, settings, meanings(embedder, rolled))
    for part in grpo.losses(learning, packs, numbers):
        part.backward()
        total += float(part.detach())
    return total, gradients(policy), numbers, packs


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_a_packed_update_equals_plain_rows(
    policy: Policy, tiny_embedder: Embedder, shelf: Shelf, rolled: Rolled, loss_type: Any
) -> None:
    settings = replace(SETTINGS, loss_type=loss_type)
    reference = grpo.frozen_copy(policy)
    with torch.no_grad():
        for weight in policy.model.model.language_model.parameters():
            weight += 0.01 * weight.abs().mean()
    trainable(policy, 1e-3)
    loss, ours, numbers, packs = packed(policy, reference, tiny_embedder, shelf, rolled, settings)
    assert len(packs) == 1 and len(packs[0].replies) == 9 and len(packs[0].prompts) == 5
    expected = plain_loss(policy, reference, tiny_embedder, shelf, rolled, settings)
    expected.backward()
    plain = gradients(policy)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-7)
    assert numbers["loss"] == pytest.approx(loss - numbers["latent_loss"] - 0.4 * numbers["latent_kl"], rel=1e-5)
    assert numbers["latent_kl"] > 1e-6
    assert set(ours) == set(plain)
    scale = max(float(one.abs().max()) for one in plain.values())
    for name, one in plain.items():
        # float64, but transformers' norms round to float32 inside
        torch.testing.assert_close(
            ours[name], one, atol=1e-7 * scale, rtol=1e-6, msg=lambda text, name=name: name + text
        )


def test_contrast_joins_and_packs_change_nothing(
    policy: Policy, tiny_embedder: Embedder, shelf: Shelf, rolled: Rolled
) -> None:
    """InfoNCE of the means' query, whose vectors are float32, and what the soft tokens should resemble: in one pack and in
    one for almost every reply."""
    settings = replace(SETTINGS, contrast_weight=0.7, distillation_weight=0.6)
    reference = grpo.frozen_copy(policy)
    trainable(policy, 1e-3)
    loss, whole, numbers, _ = packed(policy, reference, tiny_embedder, shelf, rolled, settings)
    expected = plain_loss(policy, reference, tiny_embedder, shelf, rolled, settings)
    expected.backward()
    plain = gradients(policy)
    small = replace(settings, pack_tokens=250)
    parts, several, other, packs = packed(policy, reference, tiny_embedder, shelf, rolled, small)
    assert len(packs) > 2 and max(len(one.replies) for one in packs) > 1
    assert all(len(one.replies) == 1 or _tokens(one) <= 250 for one in packs)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6) and parts == pytest.approx(loss, rel=1e-6)
    for name in ("loss", "latent_loss", "contrast", "distillation", "kl", "latent_distance"):
        assert other[name] == pytest.approx(numbers[name], rel=1e-2 if name == "latent_distance" else 1e-5)
    scale = max(float(one.abs().max()) for one in plain.values())
    for name, one in plain.items():
        torch.testing.assert_close(whole[name], one, atol=1e-5 * scale, rtol=1e-4, msg=name)
        torch.testing.assert_close(several[name], one, atol=1e-5 * scale, rtol=1e-4, msg=name)


def _tokens(one: grpo.Pack) -> int:
    longest = max(len(reply.turn.token_ids) for reply in one.replies)
    return len(one.prompts) * max(map(len, one.prompts.values())) + len(one.replies) * longest


def test_replies_that_teach_nothing_are_left_out(policy: Policy, shelf: Shelf, rolled: Rolled) -> None:
    silent = Judged(torch.tensor([*[0.0] * 6, 0.7, 0.7, -0.7]), torch.tensor([0.0, 0.0, 0.3, 0.0, 0.0, 0.0]), {})
    (one,) = grpo.pack(replace(rolled, judged=silent), policy, shelf, SETTINGS)
    taught = [([one is reply.one for one in rolled.found].index(True), reply.place) for reply in one.replies]
    assert sorted(taught) == [(0, 2), (3, 0), (3, 1), (4, 0)]
    nothing = Judged(torch.zeros(9), torch.zeros(6), {})
    assert grpo.pack(replace(rolled, judged=nothing), policy, shelf, SETTINGS) == []
    contrasted = grpo.pack(replace(rolled, judged=nothing), policy, shelf, replace(SETTINGS, contrast_weight=1.0))
    assert [len(one.replies) for one in contrasted] == [6]
    distilled = grpo.pack(replace(rolled, judged=nothing), policy, shelf, replace(SETTINGS, distillation_weight=1.0))
    assert [len(one.replies) for one in distilled] == [6]


def test_soft_tokens_of_earlier_turns_stay_where_they_accumulate(
    policy: Policy, tiny_embedder: Embedder, shelf: Shelf, rolled: Rolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, contrast_weight=1.0, accumulate=True)
    counts: list[int] = []
    embed = tiny_embedder.embed_texts

    def counted(texts: Any, soft: Tensor) -> Tensor:
        counts.extend([soft.shape[1]] * len(texts))
        return embed(texts, soft)

    monkeypatch.setattr(tiny_embedder, "embed_texts", counted)
    packed(policy, grpo.frozen_copy(policy), tiny_embedder, shelf, rolled, settings)
    assert sorted(counts) == [8, 8, 8, 16, 16, 24]


def test_the_loop_grows_with_the_steps() -> None:
    settings = GrpoTraining(turns=3, curriculum=0.5)
    settings.optimisation.steps = 40
    assert [settings.turns_at(step) for step in (0, 9, 10, 19, 20, 39)] == [1, 1, 2, 2, 3, 3]
    assert GrpoTraining(turns=3).turns_at(0) == 3

"""What stage 2 and evaluation make of trajectories: rewards, advantages, one update, the figures of the controls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.agent.generate import soft_tokens
from vsr1.data.rationale import judge
from vsr1.data.world import World
from vsr1.eval import ablations, exchange, refinements
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.corpus_scan import CorpusMatrix
from vsr1.ops.soft_query import NoiseStream
from vsr1.records import Moment, Reply, Trajectory, Turn
from vsr1.train import credit, grpo, sft
from vsr1.train.credit import Judged
from vsr1.train.grpo import GrpoTraining
from vsr1.train.library import Shelf

ROWS = torch.eye(4)[:3]  # a corpus of the videos a, b, c, and one direction that no video has


def tiny_library() -> Any:
    names = ["a", "b", "c"]
    return SimpleNamespace(matrix=lambda: CorpusMatrix(ROWS), row=names.index, video_ids=names)


def toward(*weights: float) -> Tensor:
    return torch.tensor([*weights, 0.0])


def turn(video: str, answer: Any, query: Tensor, refined: bool = False, **changes: Any) -> Turn:
    span = (1.0, 3.0) if answer == "matched" else (None, None)
    soft = torch.ones(2, 4) if refined else None
    reply = Reply(answer, *span, "because", True)
    made = Turn(video, 0.5, 1, reply, "", (1, 2), torch.zeros(2), query, soft, soft)
    return replace(made, **changes)


def path(video: str, turns: list[Turn], final: Tensor, stop: Any = "turns") -> Trajectory:
    numbered = tuple(replace(one, number=place) for place, one in enumerate(turns, 1))
    return Trajectory(Moment(f"q-{video}", "text", video, 1.0, 3.0, 9.0), numbered, final, 1, stop)


def probability(query: Tensor, row: int, temperature: float) -> float:
    scores = [math.exp(float(query @ vector) / temperature) for vector in ROWS]
    return scores[row] / sum(scores)


def standardised(numbers: list[float]) -> list[float]:
    return [(number - np.mean(numbers)) / (np.std(numbers, ddof=1) + 1e-4) for number in numbers]


def judged_by(settings: GrpoTraining, found: list[Trajectory], groups: list[int]) -> Judged:
    return credit.judge(
        found,
        tiny_library(),
        torch.tensor(groups),
        weights=settings.rewards,
        credit=settings.credit,
        advantage=settings.advantage,
        temperature=settings.temperature,
    )


def test_grpo_judges_texts_within_a_query_and_soft_tokens_within_a_query_and_turn() -> None:
    settings = GrpoTraining(
        rewards={"answer": 1.0, "retrieval": 2.0}, advantage="std", credit="trajectory", turns=3, temperature=0.5
    )
    start = toward(0.0, 1.0, 0.0)
    after = [toward(0.9, 0.1, 0.0), toward(0.2, 0.8, 0.0), toward(0.1, 0.1, 0.7), toward(0.6, 0.2, 0.2)]
    found = [
        # the query about video a: refined once and right; refined twice and never; accepted the wrong video
        path("a", [turn("b", "not_matched", start, True), turn("a", "matched", after[0])], after[0], "matched"),
        path(
            "a",
            [
                turn("b", "not_matched", start, True),
                turn("c", "not_matched", after[1], True),
                turn("a", None, after[2]),
            ],
            after[2],
        ),
        path("a", [turn("b", "matched", start)], start, "matched"),
        # the query about video b: two equal ones, found at once
        path("b", [turn("b", "matched", start)], start, "matched"),
        path("b", [turn("b", "matched", start)], start, "matched"),
        # the query about video c: one refinement alone at its turn
        path("c", [turn("a", "not_matched", start, True)], after[3]),
    ]
    judged = judged_by(settings, found, [0, 0, 0, 1, 1, 2])

    heat = settings.temperature
    rewards = [
        1 + 2 * probability(after[0], 0, heat),
        -1 + 2 * probability(after[2], 0, heat),
        -1 + 2 * probability(start, 0, heat),
    ]
    first, second, third = standardised(rewards)
    each = [first] * 2 + [second] * 3 + [third]  # every turn has that of its trajectory
    assert judged.text_advantage.tolist() == pytest.approx([*each, 0, 0, 0], abs=1e-4)
    # refined turns in order: 0 of the first, 0 and 1 of the second, 0 of the last; only turn 0 of query a compares
    first = standardised([probability(after[0], 0, heat), probability(after[1], 0, heat)])
    assert judged.turn_advantage.tolist() == pytest.approx([first[0], first[1], 0, 0], abs=1e-4)
    assert judged.numbers["accepted_right"] == pytest.approx(3 / 6)
    assert judged.numbers["turns"] == pytest.approx(9 / 6)
    assert judged.numbers["groups_with_variance"] == pytest.approx(1 / 3)
    assert judged.numbers["reward_answer"] == pytest.approx((1 - 1 - 1 + 1 + 1 + 1) / 6)
    gains = [probability(after[i], 0, heat) for i in (0, 1)]
    assert judged.numbers["retrieval_variance"] == pytest.approx(np.var(gains, ddof=1), rel=1e-4)


def test_a_reply_is_judged_among_the_replies_to_its_own_prompt() -> None:
    """Three trajectories of a query, of which two are shown b and then a, and one b alone: the wrong verdict of a turn costs
    the others of its trajectory nothing, and a prompt with one reply teaches nothing."""
    settings = GrpoTraining(rewards={"answer": 1.0, "retrieval": 2.0}, advantage="mean", credit="turn", temperature=0.5)
    start, near, far = toward(0.0, 1.0, 0.0), toward(0.9, 0.1, 0.0), toward(0.2, 0.8, 0.0)
    no, yes = "not_matched", "matched"
    found = [
        path("a", [turn("b", no, start, True), turn("a", yes, near)], near, "matched"),
        path("a", [turn("b", no, start, True), turn("a", no, far, True), turn("c", no, near, True)], near),
        path("a", [turn("b", yes, start)], start, "matched"),
        path("c", [turn("b", no, start, True)], far),  # another query: not compared
    ]
    judged = judged_by(settings, found, [0, 0, 0, 1])
    chance = {name: 2 * probability(one, 0, 0.5) for name, one in (("start", start), ("near", near), ("far", far))}
    first = [1 + chance["near"], 1 + chance["far"], -1 + chance["start"]]
    second = [1 + chance["near"], -1 + chance["near"]]
    first, second = ([one - sum(part) / len(part) for one in part] for part in (first, second))
    expected = [first[0], second[0], first[1], second[1], 0, first[2], 0]
    assert judged.text_advantage.tolist() == pytest.approx(expected, abs=1e-5)
    assert judged.numbers["groups_with_variance"] == pytest.approx(2 / 4)


def test_grpo_without_any_refinement() -> None:
    start = toward(1.0, 0.0, 0.0)
    found = [path("a", [turn("a", "matched", start)], start, "matched"), path("a", [turn("a", None, start)], start)]
    judged = judged_by(GrpoTraining(rewards={"answer": 1.0}, advantage="std"), found, [0, 0])
    assert judged.turn_advantage.shape == (0,)
    assert judged.text_advantage.tolist() == pytest.approx(standardised([1.0, -1.0]))
    assert judged.numbers["retrieval_variance"] == 0.0


@torch.no_grad()
def spoken(policy: Policy, shelf: Shelf, moment: Moment, video_id: str, reply: Reply, sigma: float, seed: int) -> Turn:
    """The turn in which `policy` says `reply`, as the loop would have recorded it."""
    prompt = protocol.prompt(
        policy.tokenizer, moment.text, shelf.features([video_id])[0], system=policy.settings.system
    )
    ids = tuple(policy.tokenizer(protocol.render(reply), add_special_tokens=False)["input_ids"])
    hidden, state = backbone.run(policy.model.model, [Row((*prompt.token_ids, *ids), prompt.video)], keep_cache=True)
    assert state is not None
    logp = policy.logits(hidden[0, -len(ids) - 1 : -1]).log_softmax(-1)[range(len(ids)), ids]
    made = Turn(video_id, 0.5, 1, reply, protocol.render(reply), ids, logp, torch.zeros(4))
    if reply.answer == "matched":
        return made
    soft = soft_tokens(policy, hidden[:, -1], state, sigma=sigma, noise=NoiseStream(seed, 0))
    return replace(made, latents=soft.means[0], actions=soft.actions[0])


@pytest.fixture
def step(tiny_policy: Policy, world: World, shelf: Shelf) -> tuple[list[Trajectory], Judged, GrpoTraining]:
    """Two trajectories of one query, of different lengths, and made-up advantages."""
    settings = GrpoTraining(sigma=0.1, beta=0.1)
    query = world.queries("train")[0]
    other = next(scene for scene in world.scenes("train") if judge(query.attributes, scene).answer == "not_matched")
    right, wrong = judge(query.attributes, query.scene), judge(query.attributes, other)
    assert query.moment.video_id is not None

    def said(video_id: str, reply: Reply, seed: int) -> Turn:
        return spoken(tiny_policy, shelf, query.moment, video_id, reply, settings.sigma, seed)

    found = [
        Trajectory(
            query.moment,
            (said(other.video_id, wrong, 1), said(query.moment.video_id, right, 2)),
            torch.zeros(4),
            1,
            "matched",
        ),
        Trajectory(query.moment, (said(other.video_id, wrong, 3),), torch.zeros(4), 2, "turns"),
    ]
    return found, Judged(torch.tensor([1.0, 1.0, -1.0]), torch.tensor([1.0, -1.0]), {}), settings


def update(
    policy: Policy,
    embedder: Embedder,
    shelf: Shelf,
    step: tuple[list[Trajectory], Judged, GrpoTraining],
    reference: grpo.Reference | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss of an update as training would differentiate it, and its numbers."""
    found, judged, settings = step
    packs = grpo.pack(grpo.Rolled(found, judged, {}), policy, shelf, settings)
    numbers: dict[str, float] = {}
    learning = grpo.Learning(policy, reference or grpo.frozen_copy(policy), embedder, shelf, settings)
    parts = grpo.losses(learning, packs, numbers)
    return torch.stack(list(parts)).sum(), numbers


def test_a_grpo_step_starts_at_ratio_one_and_kl_zero(
    tiny_policy: Policy, tiny_embedder: Embedder, shelf: Shelf, step: Any
) -> None:
    _, numbers = update(tiny_policy, tiny_embedder, shelf, step)
    assert numbers["ratio"] == pytest.approx(1, abs=1e-3)
    assert numbers["latent_ratio"] == pytest.approx(1, abs=1e-3)
    assert numbers["kl"] == pytest.approx(0, abs=1e-6)
    assert numbers["latent_distance"] == pytest.approx(1, abs=0.15)


def test_a_grpo_step_teaches_model_and_head_and_leaves_the_reference_alone(
    tiny_policy: Policy, tiny_embedder: Embedder, shelf: Shelf, step: Any
) -> None:
    settings = step[2]
    reference = grpo.frozen_copy(tiny_policy)
    with reference() as frozen:
        before = {name: weight.clone() for name, weight in frozen.named_parameters()}
    groups = sft.trainable(tiny_policy, settings.head_learning_rate)
    loss, _ = update(tiny_policy, tiny_embedder, shelf, step, reference)
    loss.backward()

    def learns(module: torch.nn.Module) -> bool:
        return all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    assert all(
        learns(layer.mlp) and learns(layer.self_attn.o_proj) for layer in tiny_policy.model.model.language_model.layers
    )
    assert learns(tiny_policy.head.refine_projector)
    assert learns(tiny_policy.head.refine_latent_input_projector)
    assert learns(tiny_policy.head.refine_append_input_projector)  # by InfoNCE of the query it makes
    assert all(weight.grad is None for weight in tiny_embedder.parameters())
    assert all(weight.grad is None for weight in tiny_policy.videos.visual.parameters())

    torch.optim.SGD([weight for group in groups for weight in group["params"]], lr=1e-2).step()
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in frozen.named_parameters())
    assert frozen.videos.visual is tiny_policy.videos.visual
    _, moved = update(tiny_policy, tiny_embedder, shelf, step, reference)
    assert moved["kl"] > 1e-7


def test_a_grpo_step_makes_the_better_trajectory_likelier(
    tiny_policy: Policy, tiny_embedder: Embedder, shelf: Shelf, step: Any
) -> None:
    found, judged, settings = step
    groups = sft.trainable(tiny_policy, settings.head_learning_rate)
    text_only = replace(settings, latent_weight=0.0, contrast_weight=0.0)
    loss, _ = update(tiny_policy, tiny_embedder, shelf, (found, judged, text_only))
    loss.backward()
    torch.optim.SGD([weight for group in groups for weight in group["params"]], lr=1e-2).step()
    better = found[0].turns[1]
    again = spoken(tiny_policy, shelf, found[0].moment, better.video_id, better.reply, settings.sigma, 2)
    assert float(again.token_logps.sum()) > float(better.token_logps.sum()) + 1e-4


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "gspo"])
def test_every_loss_type_can_be_trained_with(
    tiny_policy: Policy, tiny_embedder: Embedder, shelf: Shelf, step: Any, loss_type: Any
) -> None:
    found, judged, settings = step
    settings = replace(settings, loss_type=loss_type, latent_weight=0.0, contrast_weight=0.0, beta=0.0)
    sft.trainable(tiny_policy, settings.head_learning_rate)
    loss, _ = update(tiny_policy, tiny_embedder, shelf, (found, judged, settings))
    loss.backward()
    lengths = [len(one.token_ids) for row in found for one in row.turns]
    signs = [1, 1, -1]  # of the turns' trajectories; at ratio 1 a token costs minus its advantage
    tokens = sum(sign * length for sign, length in zip(signs, lengths, strict=True))
    expected = {"dr_grpo": tokens / (3 * settings.max_tokens), "grpo": 1 / 3, "gspo": 1 / 3}
    assert loss.item() == pytest.approx(-expected.get(loss_type, tokens / sum(lengths)), rel=1e-3)
    assert tiny_policy.model.lm_head.weight.grad.any()


def test_advantages_without_the_deviation() -> None:
    start = toward(1.0, 0.0, 0.0)
    found = [path("a", [turn("a", said, start)], start) for said in ("matched", None, None)]
    for mode, expected in (("mean", [4 / 3, -2 / 3, -2 / 3]), ("leave_one_out", [2, -1, -1])):
        settings = GrpoTraining(rewards={"answer": 1.0}, advantage=mode)
        judged = judged_by(settings, found, [0, 0, 0])
        assert judged.text_advantage.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("head", [torch.float32, torch.bfloat16])
def test_a_grpo_step_in_half_precision(
    tiny_policy: Policy, tiny_embedder: Embedder, shelf: Shelf, step: Any, head: torch.dtype
) -> None:
    """A bfloat16 model, as checkpoints come, with a float32 head or one of its own; the records are float32."""
    settings = step[2]
    wide, _ = update(tiny_policy, tiny_embedder, shelf, step)
    tiny_policy.model.bfloat16()
    tiny_policy.head.to(head)
    sft.trainable(tiny_policy, settings.head_learning_rate)
    loss, numbers = update(tiny_policy, tiny_embedder, shelf, step)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wide.item(), abs=0.05)
    assert numbers["ratio"] == pytest.approx(1, abs=0.02)
    assert numbers["kl"] == pytest.approx(0, abs=1e-6)
    loss.backward()
    weight = tiny_policy.model.lm_head.weight
    assert weight.grad.dtype == torch.bfloat16
    assert all(torch.isfinite(one.grad).all() for one in tiny_policy.parameters() if one.grad is not None)
    assert tiny_policy.head.refine_latent_input_projector[1].weight.grad.any()


def test_hits_rank_without_the_rejected_videos_only_where_asked() -> None:
    matrix, rows = CorpusMatrix(ROWS), {"a": 0, "b": 1, "c": 2}
    toward_b = toward(0.4, 0.9, 0.1)
    found = [
        path("a", [turn("b", "not_matched", toward_b)], toward_b),  # right once b has left
        path("b", [turn("b", "matched", toward_b)], toward_b, "matched"),  # accepted: b stays
        path("b", [turn("b", "not_matched", toward_b)], toward_b),  # wrongly rejected
        path("c", [turn("b", "not_matched", toward_b), turn("a", "matched", toward_b)], toward_b, "matched"),
    ]
    assert ablations.hits(found, matrix, rows, exclude=True).tolist() == [1, 1, 0, 0]
    assert ablations.hits(found, matrix, rows, exclude=False).tolist() == [0, 1, 1, 0]


def test_found_second_looks_at_the_second_video_alone() -> None:
    query = toward(1.0, 0.0, 0.0)
    shown = {name: turn(name, "not_matched", query) for name in "abc"}
    found = [
        path("a", [shown["b"], shown["a"]], query),
        path("a", [shown["a"]], query, "matched"),
        path("a", [shown["b"], shown["c"], shown["a"]], query),
        path("a", [shown["b"]], query),
    ]
    assert ablations.found_second(found).tolist() == [1, 0, 0, 0]


@torch.no_grad()
def test_the_first_refinement_counts_the_hits_of_every_number_of_soft_tokens(
    tiny_policy: Policy, tiny_embedder: Embedder
) -> None:
    """The corpus holds the refined queries themselves, one row for each number of soft tokens: with n of them a query
    finds exactly its row n, and query i is after row i % 4 + 1. Every third video was accepted at once, at rank 1."""
    texts = [
        "a small red circle",
        "an ivory cross in still motion",
        "find a hulking hoop",
        "a plank",
        "a pole",
        "a bar",
    ]
    actions = torch.randn(len(texts), 8, tiny_policy.settings.soft_size, generator=torch.Generator().manual_seed(0))
    counts = range(1, 9)
    vectors = [tiny_embedder.embed_texts(texts, tiny_policy.head.soft_tokens(actions[:, :count])) for count in counts]
    rows = {f"{query}-{count}": 8 * query + count - 1 for query in range(len(texts)) for count in counts}
    found = []
    for query, text in enumerate(texts):
        accepted = query % 3 == 0
        soft = None if accepted else actions[query]
        made = replace(turn("a", None, toward(0, 0, 0)), rank=1 if accepted else 2, actions=soft)
        found.append(Trajectory(Moment("q", text, f"{query}-{query % 4 + 1}"), (made,), torch.zeros(4), 1, "turns"))
    matrix = CorpusMatrix(torch.stack(vectors, 1).flatten(0, 1))
    curve = refinements.first(tiny_policy, tiny_embedder, matrix, rows, found)
    assert list(curve) == [str(count) for count in range(9)]
    # queries 0 and 3 were accepted; 1, 2, 4 and 5 are after 2, 3, 1 and 2 soft tokens
    hits = [2, 3, 4, 3, 2, 2, 2, 2, 2]
    assert [point.sum() for point in curve.values()] == hits


def test_a_trajectory_as_json_holds_no_tensors() -> None:
    query = toward(1.0, 0.0, 0.0)
    one = path("a", [turn("b", "not_matched", query, True), turn("a", "matched", query)], query, "matched")
    said = json.loads(json.dumps(exchange.as_json(one)))
    assert [shown["video_id"] for shown in said["turns"]] == ["b", "a"]
    assert (said["turns"][1]["start"], said["turns"][1]["end"]) == (1.0, 3.0)
    assert (said["first_rank"], said["final_rank"], said["stop"], said["failure"]) == (1, 1, "matched", None)

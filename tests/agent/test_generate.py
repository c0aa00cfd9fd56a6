"""Replies and soft tokens of the own engine against passes without a cache and against transformers' own generation."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from vsr1.agent import generate as engine
from vsr1.agent import protocol
from vsr1.agent.generate import OwnSpeaker, Prompt, Refining, draw, generate, soft_tokens, soft_tokens_after
from vsr1.agent.speech import Question, Sampling
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.ops.soft_query import NoiseStream

COUNTS = (4, 6)
TEXTS = ("a small red circle", "a circle")


@pytest.fixture
def clips(frames):
    return [frames(count, seed=count) for count in COUNTS]


@pytest.fixture
def prompts(policy, clips):
    features = policy.videos.encode_frames(clips)
    system = policy.settings.system
    rows = [
        protocol.prompt(policy.tokenizer, text, one, system=system) for text, one in zip(TEXTS, features, strict=True)
    ]
    return [Prompt(row, duration=one.duration) for row, one in zip(rows, features, strict=True)]


@pytest.fixture
def restless(policy):
    """A policy that says `<REFINE>` often enough for replies to end at different lengths."""
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight.detach().clone())
    with torch.no_grad():
        policy.model.lm_head.weight[policy.refine_id] *= 0.0
    return policy


def said(found):
    """What was said, by place."""
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def full_pass(policy, prompt, ids):
    """Hidden states (n + 1, H) from the prompt's end on, all read at once."""
    hidden, _ = backbone.run(policy.model.model, [Row((*prompt.row.token_ids, *ids), prompt.row.video)])
    return hidden[0, -len(ids) - 1 :]


def stock_inputs(policy, clip, prompt):
    pixels, grid = policy.videos.frames_to_rows(clip.pixels)
    ids = torch.tensor([prompt.row.token_ids])
    types = (ids == policy.model.config.video_token_id).int() * 2
    return {"input_ids": ids, "mm_token_type_ids": types, "pixel_values_videos": pixels, "video_grid_thw": grid}


@torch.no_grad()
def test_greedy_replies_equal_transformers(policy, clips, prompts):
    found = said(generate(policy, prompts, [0, 1, 0], Sampling(max_tokens=12)))
    assert found[0].spoken.token_ids == found[2].spoken.token_ids
    for clip, prompt, one in zip(clips, prompts, found, strict=False):
        stock = policy.model.generate(
            **stock_inputs(policy, clip, prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[policy.refine_id, policy.eos_id],
        )
        assert one.spoken.token_ids == tuple(stock[0, len(prompt.row) :].tolist())


def chi_square(counts, chances):
    """Pearson's statistic and its degrees of freedom."""
    expected = chances * counts.sum()
    assert counts[expected == 0].sum() == 0
    seen = expected > 0
    return float(((counts - expected)[seen] ** 2 / expected[seen]).sum()), int(seen.sum()) - 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.5, 0.8), (1.0, 0.3)])
def test_tokens_are_drawn_as_transformers_would_draw_them(temperature, top_p):
    logits = 1.5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    chances = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, logits)).softmax(-1)[0]
    draws = 20_000
    uniforms = torch.rand(draws, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens, logps = draw(logits.expand(draws, -1), temperature, top_p, uniforms)
    statistic, freedom = chi_square(tokens.bincount(minlength=12).double(), chances.double())
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4
    torch.testing.assert_close(logps, (logits / temperature).log_softmax(-1)[0, tokens])


@torch.no_grad()
def test_first_tokens_of_a_prompt_are_distributed_as_the_policy_says(policy, prompts):
    """The same through the engine, whose replies draw from seeds of their own."""
    policy.model.lm_head.weight = torch.nn.Parameter(4 * policy.model.lm_head.weight)
    replies = 4000
    found = said(generate(policy, prompts, [1] * replies, Sampling(1.0, max_tokens=1, seed=3), rows=2048))
    counts = torch.tensor([one.spoken.token_ids[0] for one in found]).bincount(minlength=len(policy.tokenizer))
    chances = policy.logits(full_pass(policy, prompts[1], (0,))[0]).double().softmax(-1)
    common = chances > 5 / replies  # the rare ones count as one
    counts = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    chances = torch.cat([chances[common], chances[~common].sum()[None]])
    statistic, freedom = chi_square(counts, chances)
    assert freedom > 5 and statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


@torch.no_grad()
def test_replies_end_on_their_own_and_keep_their_log_probabilities(restless, prompts):
    found = said(generate(restless, prompts, [0] * 4 + [1] * 4, Sampling(3.0, max_tokens=300, seed=3)))
    assert len({len(one.spoken.token_ids) for one in found}) > 4
    for place, one in enumerate(found):
        ids, prompt = one.spoken.token_ids, prompts[place // 4]
        ends = [token in (restless.refine_id, restless.eos_id) for token in ids]
        assert one.spoken.finished == ends[-1] and not any(ends[:-1]) and len(ids) <= 300
        logps = (restless.logits(full_pass(restless, prompt, ids)[:-1]) / 3.0).log_softmax(-1)
        expected = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(one.spoken.token_logps, expected, atol=2e-4, rtol=1e-3)


@torch.no_grad()
def test_a_reply_does_not_depend_on_its_neighbours(restless, prompts, monkeypatch):
    """Three rows for eight replies say what eight rows say; each prompt is read once, each row is used again."""
    owner, sampling = [1, 0, 1, 0, 0, 1, 1, 0], Sampling(2.0, 0.9, max_tokens=60, seed=5)
    refining = Refining(lambda place, ids: place != 2)
    whole = list(generate(restless, prompts, owner, sampling, refining=refining))
    read = []
    run = backbone.run
    monkeypatch.setattr(
        backbone, "run", lambda model, rows, **options: read.extend(rows) or run(model, rows, **options)
    )
    narrow = list(generate(restless, prompts, owner, sampling, refining=refining, rows=3))
    assert sorted(map(len, read)) == sorted(len(prompt.row) for prompt in prompts)
    assert [place for place, _ in whole] != [place for place, _ in narrow]  # they end in another order
    for one, other in zip(said(whole), said(narrow), strict=True):
        assert one.spoken.token_ids == other.spoken.token_ids
        torch.testing.assert_close(one.spoken.token_logps, other.spoken.token_logps, atol=1e-4, rtol=1e-3)
        assert (one.soft is None) == (other.soft is None)
        if one.soft is not None:
            torch.testing.assert_close(one.soft.means, other.soft.means, atol=1e-4, rtol=1e-3)
    refined = [one.soft is not None for one in said(whole)]
    ended = [one.spoken.token_ids[-1] == restless.refine_id for one in said(whole)]
    assert any(refined) and refined == [end and place != 2 for place, end in enumerate(ended)]


@torch.no_grad()
def test_seeds_belong_to_replies(policy, prompts):
    sampling = Sampling(1.0, max_tokens=8)
    first = said(generate(policy, prompts, [0, 0, 1], sampling, seeds=[1, 2, 1]))
    second = said(generate(policy, prompts, [0, 1, 0], sampling, seeds=[2, 1, 1]))
    assert first[0].spoken.token_ids == second[2].spoken.token_ids
    assert first[1].spoken.token_ids == second[0].spoken.token_ids
    assert first[2].spoken.token_ids == second[1].spoken.token_ids
    assert first[0].spoken.token_ids != first[1].spoken.token_ids


@torch.no_grad()
def test_limits_stops_and_deadlines(policy, prompts):
    found = said(generate(policy, prompts, [0, 1, 0], Sampling(max_tokens=9), limits=[3, 9, 20]))
    assert [len(one.spoken.token_ids) for one in found] == [3, 9, 9]
    assert not any(one.spoken.finished for one in found)
    whole = policy.text(found[1].spoken.token_ids)
    stop = policy.piece(found[1].spoken.token_ids[4])
    (cut,) = said(generate(policy, prompts, [1], Sampling(max_tokens=9), stop=stop))
    assert cut.spoken.finished and policy.text(cut.spoken.token_ids) == whole[: whole.index(stop) + len(stop)]
    late = said(generate(policy, prompts, [0, 1, 0], Sampling(), deadline=time.monotonic()))
    assert [one.spoken.token_ids for one in late] == [(), (), ()] and not any(one.spoken.finished for one in late)
    assert list(generate(policy, prompts, [], Sampling())) == []


def begun(policy, prompt, text):
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Prompt(replace(prompt.row, token_ids=(*prompt.row.token_ids, *ids)), text, prompt.duration)


@torch.no_grad()
def test_constrained_replies_say_only_what_a_tag_may_hold(policy, prompts):
    answering = begun(policy, prompts[0], "<think>so</think><answer>")
    timing = begun(policy, prompts[1], "<answer>matched</answer><start>")
    thinking = begun(policy, prompts[0], "<think>an <answer>")
    sampling = Sampling(3.0, max_tokens=24, constrained=True)
    found = said(generate(policy, [answering, timing, thinking], [0] * 12 + [1] * 12 + [2] * 4, sampling))
    texts = [policy.text(one.spoken.token_ids) for one in found]
    answers = {text.split("</answer>")[0] for text in texts[:12]}
    assert answers == {"matched", "not_matched"} and all("</answer>" in text for text in texts[:12])
    times = [float(text.split("</start>")[0]) for text in texts[12:24]]
    assert len(set(times)) > 3 and min(times) >= 0 and max(times) <= prompts[1].duration
    assert not any(text.startswith(("matched</answer>", "not_matched</answer>")) for text in texts[24:])
    for one, text in zip(found[:12], texts, strict=False):  # the policy's own log-probabilities, not the constraint's
        logps = (policy.logits(full_pass(policy, answering, one.spoken.token_ids)[:-1]) / 3.0).log_softmax(-1)
        expected = logps.gather(1, torch.tensor(one.spoken.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(one.spoken.token_logps, expected, atol=2e-4, rtol=1e-3, msg=text)


@torch.no_grad()
def test_the_log_odds_of_a_match_are_read_where_the_answer_begins(policy, prompts):
    answering = begun(policy, prompts[0], "<think>an <answer> in thought</think><answer>")
    (one,) = said(generate(policy, [answering], [0], Sampling(max_tokens=2)))
    logits = policy.logits(full_pass(policy, answering, ())[0])
    yes, no = (policy.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("matched", "not_matched"))
    assert one.spoken.matched == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    thinking = begun(policy, prompts[0], "<think>an <answer>")
    (none,) = said(generate(policy, [thinking], [0], Sampling(max_tokens=2)))
    assert none.spoken.matched is None


@torch.no_grad()
def test_the_speaker_asks_about_questions(policy, clips, prompts, tmp_path):
    questions = [
        Question(text, video, tmp_path) for text, video in zip(TEXTS, policy.videos.encode_frames(clips), strict=True)
    ]
    found = OwnSpeaker(rows=2).speak(policy, questions, [1, 0, 1], Sampling(1.0, max_tokens=5, seed=7))
    expected = said(generate(policy, prompts, [1, 0, 1], Sampling(1.0, max_tokens=5, seed=7)))
    assert [one.token_ids for one in found] == [one.spoken.token_ids for one in expected]


def full_soft_tokens(policy, prompt, reply):
    """The recurrence by re-reading the whole row, its soft tokens included, at every step; the first state is taken before
    the last norm where the policy says so."""
    model = policy.model.model
    inputs, _, following = backbone._assemble(model, [Row((*prompt.token_ids, *reply), prompt.video)], None)
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    raw = policy.settings.first_latent == "unnormed"
    means = []
    for step in range(policy.settings.soft_tokens):
        hidden = backbone.pass_through(model, not (raw and step == 0), inputs_embeds=embeds, position_ids=positions)
        means.append(policy.head.refine_projector(hidden[:, -1]))
        entering = policy.head.refine_latent_input_projector(means[-1])
        embeds = torch.cat([embeds, entering[:, None]], 1)
        positions = torch.cat([positions, (following + step).view(1, 1, 1).expand(3, 1, 1)], 2)
    return torch.stack(means, 1)[0]


@pytest.mark.parametrize("first", ["normed", "unnormed"])
def test_cached_soft_tokens_equal_a_full_pass_and_so_do_their_gradients(policy, prompts, first):
    policy.settings = replace(policy.settings, first_latent=first)
    replies = [(35, 36, 37, policy.refine_id), (38, policy.refine_id)]
    rows = [prompt.row for prompt in prompts]
    policy.model.model.language_model.requires_grad_(True)
    weight = policy.model.model.language_model.layers[0].self_attn.q_proj.weight
    full = torch.stack([full_soft_tokens(policy, row, ids) for row, ids in zip(rows, replies, strict=True)])
    cached = soft_tokens_after(policy, rows, [0, 1], replies).means
    torch.testing.assert_close(cached, full, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(cached)
    (ours,) = torch.autograd.grad((cached * direction).sum(), weight)
    (expected,) = torch.autograd.grad((full * direction).sum(), weight)
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("first", ["normed", "unnormed"])
def test_soft_tokens_follow_a_reply_in_the_same_batch(restless, prompts, first):
    restless.settings = replace(restless.settings, first_latent=first)
    sampling, refining = Sampling(3.0, max_tokens=300, seed=3), Refining(lambda place, ids: True)
    found = said(generate(restless, prompts, [0] * 4 + [1] * 4, sampling, refining=refining))
    refined = [place for place, one in enumerate(found) if one.soft is not None]
    assert len({len(found[place].spoken.token_ids) for place in refined}) > 1
    for place in refined:
        full = full_soft_tokens(restless, prompts[place // 4].row, found[place].spoken.token_ids)
        torch.testing.assert_close(found[place].soft.means, full, atol=1e-5, rtol=1e-4)
        assert torch.equal(found[place].soft.means, found[place].soft.actions)


@torch.no_grad()
def test_exploration_is_fed_back_and_has_its_probability(policy, prompts, monkeypatch):
    monkeypatch.setattr(engine, "draw", lambda logits, *_: (torch.full((len(logits),), policy.refine_id), logits[:, 0]))
    refining = Refining(lambda place, ids: True, 0.3, NoiseStream(5))
    drawn = [one.soft for one in said(generate(policy, prompts, [0, 1, 1], Sampling(), refining=refining))]
    assert all((soft.actions - soft.means).std() == pytest.approx(0.3, rel=0.2) for soft in drawn)
    assert not torch.equal(drawn[1].actions, drawn[2].actions)
    rows, actions = [prompt.row for prompt in prompts], torch.stack([soft.actions for soft in drawn])
    _, state = backbone.run(policy.model.model, rows, keep_cache=True)
    state = state.branch(torch.tensor([0, 1, 1]))
    _, last = backbone.feed_tokens(policy.model.model, state, [(policy.refine_id,)] * 3)
    again = soft_tokens(policy, last, state, sigma=0.3, replay=actions)
    torch.testing.assert_close(again.means, torch.stack([soft.means for soft in drawn]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(again.logps, torch.stack([soft.logps for soft in drawn]), atol=1e-4, rtol=1e-3)
    silent = soft_tokens_after(policy, rows, [0, 1, 1], [(policy.refine_id,)] * 3)
    assert (silent.means[:, 1] - again.means[:, 1]).abs().max() > 1e-4  # the action, not the mean, was fed back


def test_prompts_are_read_in_passes_that_change_nothing(policy, prompts, monkeypatch):
    greedy = Sampling(max_tokens=12)
    owner = [0, 1, 1, 0]
    together = said(generate(policy, prompts, owner, greedy))
    passes = []
    run = backbone.run

    def counted(model, rows, **options):
        passes.append(len(rows))
        return run(model, rows, **options)

    monkeypatch.setattr(backbone, "run", counted)
    apart = said(generate(policy, prompts, owner, greedy, read_tokens=max(len(one.row) for one in prompts)))
    assert passes == [1, 1]
    assert [one.spoken.token_ids for one in apart] == [one.spoken.token_ids for one in together]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one.spoken.token_logps, other.spoken.token_logps, rtol=1e-5, atol=1e-5)
    passes.clear()
    list(generate(policy, prompts, owner, greedy))
    assert passes == [2]

"""What each stage feeds its loop: labels, sentences, replies, confusions, advantages; and what evaluation counts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vsr1.agent import protocol
from vsr1.agent.generate import Sampling, soft_tokens
from vsr1.corpus import Corpus
from vsr1.data.rationale import describe, judge
from vsr1.data.scene import Event, Scene
from vsr1.data.vocabulary import ATTRIBUTES, all_words, canonical, canonical_rewrite, values
from vsr1.data.world import World, WorldConfig, build
from vsr1.eval import evaluate
from vsr1.job import _texts
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.ops.corpus_scan import CorpusMatrix
from vsr1.ops.soft_query import NoiseStream
from vsr1.records import Moment, Reply, Trajectory, Turn
from vsr1.train import grpo, sft
from vsr1.train.embedder import (
    EmbedderTraining,
    _draw,
    contrast,
    event_codes,
    matches,
    mentioned,
    write_sentences,
)
from vsr1.train.grpo import GrpoTraining
from vsr1.train.library import Shelf
from vsr1.train.sft import Example, SftTraining
from vsr1.train.vision import IGNORE, pair_labels

FIRST = Event(2, 5, "small", "red", "circle", "left")
SECOND = Event(7, 11, "large", "blue", "ring", "grow")
SCENE = Scene("v", 12, "navy", "striped", (FIRST, SECOND))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(train_videos=16, validation_videos=1, test_videos=4, pixels=32, workers=1)
    return build(tmp_path_factory.mktemp("run") / "world", config, seed=3)


@pytest.fixture(scope="module")
def tiny_embedder() -> Embedder:
    torch.manual_seed(0)
    config = TinyConfig(hidden=64, layers=2, feed_forward=96, vision_hidden=32)
    return Embedder.tiny(train_tokenizer(_texts()), config).eval().requires_grad_(False)


@pytest.fixture
def tiny_policy(tiny_embedder: Embedder) -> Policy:
    torch.manual_seed(0)
    return Policy.tiny(tiny_embedder, soft_tokens=8).eval()


@pytest.fixture(scope="module")
def shelf(world: World, tiny_embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    scenes = world.scenes("train")
    paths = [world.video_path(scene.video_id) for scene in scenes]
    corpus = Corpus.create(tmp_path_factory.mktemp("shelf") / "corpus", tiny_embedder.dimension, tiny_embedder.identity)
    features: Any = tiny_embedder.videos.encode(paths)
    corpus.add([scene.video_id for scene in scenes], tiny_embedder.embed_videos(features), paths=paths)
    return Shelf(corpus, tiny_embedder.videos)


# Vision


def test_pair_labels_count_an_event_only_where_both_frames_show_it() -> None:
    labels = pair_labels(SCENE, torch.arange(12.0))
    first = [values(name).index(getattr(FIRST, name)) for name in ATTRIBUTES[:4]]
    second = [values(name).index(getattr(SECOND, name)) for name in ATTRIBUTES[:4]]
    nothing = [IGNORE] * 4
    # pairs:      0,1      2,3    4,5 (ends at 5)  6,7 (starts at 7)  8,9   10,11 (ends at 11)
    assert labels[:, :4].tolist() == [nothing, first, nothing, nothing, second, nothing]
    ground = [values("background_colour").index("navy"), values("texture").index("striped")]
    assert labels[:, 4:].tolist() == [ground] * 6


def test_pair_labels_repeat_the_last_frame_of_an_odd_number() -> None:
    labels = pair_labels(SCENE, torch.tensor([2.0, 4.5, 8.0]))
    assert labels.shape == (2, 6)
    assert labels[:, 0].tolist() == [values("size").index("small"), values("size").index("large")]


# Embedder


def test_event_codes_and_matches() -> None:
    other = replace(SCENE, video_id="w", events=(replace(FIRST, colour="green"),))
    codes = event_codes([SCENE, other])
    assert codes.shape == (2, 2, 6)
    assert (codes[1, 1] == -2).all()
    for column, name in enumerate(ATTRIBUTES):
        assert values(name)[codes[0, 1, column]] == SCENE.attributes(1)[name]

    exact = codes[0, 0]
    any_colour = np.where(np.array(ATTRIBUTES) == "colour", -1, exact)
    mixed = np.where(np.array(ATTRIBUTES) == "shape", codes[0, 1], exact)  # no single event has both
    nothing_said = np.full(6, -1)
    found = matches(np.stack([exact, any_colour, mixed, nothing_said, codes[1, 0]]), codes)
    assert found.tolist() == [[True, False], [True, True], [False, False], [True, True], [False, True]]


def test_mentioned_reads_every_synonym() -> None:
    said = "a dinky vermilion orb with leftward motion on a lined indigo background"
    assert mentioned(said) == SCENE.attributes(0)
    assert mentioned("find a thing with motion") == {}


@pytest.mark.parametrize("keywords", [0.0, 1.0])
def test_sentences_say_what_is_wanted_of_their_owner(keywords: float) -> None:
    scenes = [SCENE, replace(SCENE, video_id="w", events=(SECOND,)), replace(SCENE, video_id="x")]
    settings = EmbedderTraining(sentences=2, drop=0.4, keywords=keywords)
    dropped = 0
    for seed in range(20):
        about = write_sentences(scenes, settings, Random(seed))
        assert about.owner.tolist() == [0, 0, 1, 2, 2]
        assert about.wanted.shape == (5, 6)
        assert matches(about.wanted, event_codes(scenes))[range(5), about.owner].all()
        for text, wanted in zip(about.texts, about.wanted, strict=True):
            meant = {name: values(name)[code] for name, code in zip(ATTRIBUTES, wanted, strict=True) if code >= 0}
            assert mentioned(text) == meant
            if keywords:
                assert text.endswith(" " + " ".join(meant.values()))
        dropped += int((about.wanted == -1).sum())
    assert 0.3 < dropped / (20 * 5 * 6) < 0.5


def test_the_sentences_of_a_scene_are_about_different_events() -> None:
    settings = EmbedderTraining(sentences=2, drop=0.0, keywords=0.0)
    for seed in range(10):
        wanted = write_sentences([SCENE], settings, Random(seed)).wanted
        assert sorted(wanted[:, 0]) == sorted(values("size").index(size) for size in ("small", "large"))


def test_contrast_against_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(5, 7, generator=generator), dim=-1)
    videos = torch.nn.functional.normalize(torch.randn(3, 7, generator=generator), dim=-1)
    owner = torch.tensor([0, 0, 1, 2, 2])
    excused = torch.zeros(5, 3, dtype=torch.bool)
    excused[1, 2] = excused[3, 0] = True
    heat = 0.2

    def score(sentence: int, video: int) -> float:
        return math.exp(float(texts[sentence] @ videos[video]) / heat)

    costs_text, costs_video = [], []
    for s in range(5):
        own = score(s, int(owner[s]))
        rivals = sum(score(s, v) for v in range(3) if v != owner[s] and not excused[s, v])
        costs_text.append(-math.log(own / (own + rivals)))
        strangers = [z for z in range(5) if owner[z] != owner[s] and not excused[z, owner[s]]]
        costs_video.append(-math.log(own / (own + sum(score(z, int(owner[s])) for z in strangers))))
    loss, scores = contrast(texts, videos, owner, excused, heat)
    assert loss.item() == pytest.approx((np.mean(costs_text) + np.mean(costs_video)) / 2, rel=1e-5)
    assert torch.equal(scores == -math.inf, excused)


def test_every_other_batch_holds_few_backgrounds() -> None:
    backgrounds = np.array([f"b{i % 6}" for i in range(60)])
    for seed in range(5):
        rng = np.random.default_rng(seed)
        assert len(set(backgrounds[_draw(rng, backgrounds, 12, 2)])) == 2
        pick = _draw(rng, backgrounds, 40, 0)
        assert len(set(pick)) == 40
        assert len(set(backgrounds[pick])) == 6
        assert len(_draw(rng, backgrounds, 40, 2)) == 20


# SFT


def test_describe_names_all_events_and_the_background() -> None:
    assert describe(SCENE) == "2 to 5 s small red circle left ; 7 to 11 s large blue ring grow ; navy striped"


def compared(reply: Reply) -> list[tuple[str, str]]:
    """The comparison of a reply: each seen word with its mark."""
    return re.findall(r"(\w+) (=|!=)", reply.think)


def test_judge_accepts_the_event_asked_for() -> None:
    reply = judge(SCENE.attributes(1), SCENE)
    assert (reply.answer, reply.start, reply.end, reply.refine) == ("matched", 7.0, 11.0, True)
    assert compared(reply) == [(SCENE.attributes(1)[name], "=") for name in ATTRIBUTES]


def test_judge_compares_with_the_closest_event_and_says_what_to_find() -> None:
    wanted = SCENE.attributes(1) | {"motion": "blink", "texture": "plain"}
    reply = judge(wanted, SCENE)
    assert (reply.answer, reply.start, reply.end, reply.refine) == ("not_matched", None, None, True)
    marks = dict.fromkeys(ATTRIBUTES, "=") | {"motion": "!=", "texture": "!="}
    assert compared(reply) == [(SCENE.attributes(1)[name], marks[name]) for name in ATTRIBUTES]
    assert "7 to 11 s" in reply.think
    assert "find large blue ring blink on navy plain background" in reply.think


def test_judge_rejects_attributes_of_two_events_mixed() -> None:
    assert judge(SCENE.attributes(0) | {"shape": "ring"}, SCENE).answer == "not_matched"


@pytest.mark.parametrize("wanted", [SCENE.attributes(0), SCENE.attributes(0) | {"colour": "cyan"}])
def test_a_judgement_survives_the_protocol(wanted: dict[str, str]) -> None:
    reply = judge(wanted, SCENE)
    assert protocol.parse(protocol.render(reply), duration=12.0) == reply


def test_reply_tokens_weigh_the_answer_the_marks_and_the_numbers(tiny_policy: Policy) -> None:
    settings = SftTraining(answer_weight=4.0, mark_weight=2.0)
    reply = judge(SCENE.attributes(1) | {"colour": "cyan"}, SCENE)
    ids, weights = sft.reply_tokens(tiny_policy, protocol.render(reply), settings)
    pieces = [tiny_policy.tokenizer.decode([token]).strip() for token in ids]
    assert pieces[-2:] == ["<REFINE>", "<|im_end|>"]
    assert ids[-1] == tiny_policy.eos_id
    inside = range(pieces.index("<answer>") + 1, pieces.index("</answer>"))
    assert "".join(pieces[place] for place in inside) == "not_matched"
    for place, (piece, weight) in enumerate(zip(pieces, weights, strict=True)):
        marked = piece in ("=", "!=") or piece[:1].isdigit()
        assert weight == (4.0 if place in inside else 2.0 if marked else 1.0), piece
    assert sum(piece in ("=", "!=") for piece in pieces) == 6


def test_the_loop_lets_the_policy_finish_the_longest_reply(tiny_policy: Policy) -> None:
    """A reply cut short has no answer and no <REFINE>; what SFT teaches must fit what the loop and GRPO allow."""
    events = tuple(
        Event(3 * i, 3 * i + 3, "large", "purple", "circle", "blink") for i in range(WorldConfig().max_events)
    )
    scene = Scene("long", 16, "navy", "striped", events)
    longest = 0
    for wanted in (scene.attributes(0), scene.attributes(0) | {"motion": "up"}):
        ids, _ = sft.reply_tokens(tiny_policy, protocol.render(judge(wanted, scene)), SftTraining())
        longest = max(longest, len(ids) - 1)
    assert longest <= Sampling().max_tokens
    assert longest <= GrpoTraining().max_tokens


def test_reply_tokens_weigh_the_span_of_an_accepted_video(tiny_policy: Policy) -> None:
    text = protocol.render(judge(SCENE.attributes(0), SCENE))
    ids, weights = sft.reply_tokens(tiny_policy, text, SftTraining(mark_weight=3.0))
    pieces = [tiny_policy.tokenizer.decode([token]).strip() for token in ids]
    behind = pieces.index("</answer>")
    assert [piece for piece, w in zip(pieces[behind:], weights[behind:], strict=True) if w == 3.0] == ["2", "5"]


def examples(
    policy: Policy, embedder: Embedder, world: World, shelf: Shelf, **changes: Any
) -> tuple[sft.Examples, SftTraining]:
    settings = replace(SftTraining(batch=8, confusions=4), **changes)
    return sft.Examples(policy, embedder, world, shelf, settings, seed=1), settings


def shown_video(example: Example, shelf: Shelf) -> str:
    assert example.row.video is not None
    return next(name for name in shelf.video_ids if shelf.features(name) is example.row.video)


@pytest.mark.parametrize("confusions", [1, 4, 500], ids=["nearest", "few", "more than there are"])
def test_a_confusion_is_never_the_right_video(
    tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, confusions: int
) -> None:
    drawer, _ = examples(tiny_policy, tiny_embedder, world, shelf, confusions=confusions)
    for step in range(6):
        drawn = drawer.draw(step)
        shown = [shown_video(one, shelf) for one in drawn]
        assert [name == one.video_id for name, one in zip(shown, drawn, strict=True)] == [True] * 4 + [False] * 4
        assert all(one.matched for one in drawn[:4])
        for name, one in zip(shown, drawn, strict=True):
            scene = next(scene for scene in world.scenes("train") if scene.video_id == name)
            fits = any(scene.attributes(event) == one.attributes for event in range(len(scene.events)))
            assert one.matched == fits
            if drawer.has_one_answer(one):
                assert one.matched == (name == one.video_id)


def test_the_rows_of_a_step_depend_on_the_step_alone(
    tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf
) -> None:
    drawer, _ = examples(tiny_policy, tiny_embedder, world, shelf)
    later, _ = examples(tiny_policy, tiny_embedder, world, shelf)
    drawer.draw(0)

    def plain(drawn: list[Example]) -> list[tuple[str, tuple[int, ...]]]:
        return [(one.text, one.row.token_ids) for one in drawn]

    assert plain(drawer.draw(5)) == plain(later.draw(5))
    assert plain(later.draw(5)) != plain(later.draw(6))


def test_an_example_asks_in_words_that_mean_its_attributes_and_ends_before_the_last_token(
    tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf
) -> None:
    drawer, _ = examples(tiny_policy, tiny_embedder, world, shelf)
    for one in drawer.draw(2):
        assert mentioned(one.text) == one.attributes
        assert one.row.token_ids[-len(one.reply) + 1 :] == one.reply[:-1]
        assert one.reply[-2:] == (tiny_policy.refine_id, tiny_policy.eos_id)
        assert one.row.token_ids[-1] == tiny_policy.refine_id  # behind it the soft tokens begin
        text = tiny_policy.tokenizer.decode(one.reply[:-1])
        assert protocol.parse(text).answer == ("matched" if one.matched else "not_matched")


def test_say_loss_reads_each_reply_off_its_own_row(
    tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf
) -> None:
    drawer, _ = examples(tiny_policy, tiny_embedder, world, shelf)
    drawn = drawer.draw(0)[2:6]
    with torch.no_grad():
        hidden, _ = backbone.run(tiny_policy.model.model, [one.row for one in drawn])
        found = sft.say_loss(tiny_policy, hidden, drawn)
        cost = weight = 0.0
        for one in drawn:
            alone, _ = backbone.run(tiny_policy.model.model, [one.row])
            logp = tiny_policy.logits(alone[0]).log_softmax(-1)
            start = alone.shape[1] - len(one.reply)
            for place, (token, heavy) in enumerate(zip(one.reply, one.weights, strict=True)):
                cost -= heavy * float(logp[start + place, token])
                weight += heavy
    assert found.item() == pytest.approx(cost / weight, rel=1e-4)


def test_canonical_embeddings_are_the_words_own(tiny_embedder: Embedder) -> None:
    found = sft.canonical_embeddings(tiny_embedder, [SCENE.attributes(0), SCENE.attributes(1)])
    table = tiny_embedder.model.get_input_embeddings().weight
    assert found.shape == (2, 8, table.shape[1])
    for row, event in zip(found, (0, 1), strict=True):
        for vector, word in zip(row, canonical_rewrite(SCENE.attributes(event)).split(), strict=True):
            (token,) = tiny_embedder.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            assert torch.equal(vector, table[token])


def test_every_word_is_one_token(tiny_embedder: Embedder) -> None:
    for word in all_words():
        ids = tiny_embedder.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 or canonical(word) is None, word


# GRPO

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
    return Trajectory(Moment(f"q-{video}", "text", video, 1.0, 3.0, 9.0), tuple(turns), final, 1, stop)


def probability(query: Tensor, row: int, temperature: float) -> float:
    scores = [math.exp(float(query @ vector) / temperature) for vector in ROWS]
    return scores[row] / sum(scores)


def standardised(numbers: list[float]) -> list[float]:
    return [(number - np.mean(numbers)) / (np.std(numbers, ddof=1) + 1e-4) for number in numbers]


def test_grpo_judges_texts_within_a_query_and_soft_tokens_within_a_query_and_turn() -> None:
    settings = GrpoTraining(rewards={"answer": 1.0, "retrieval": 2.0}, turns=3, temperature=0.5)
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
    judged = grpo.judge(found, tiny_library(), settings, torch.tensor([0, 0, 0, 1, 1, 2]))

    heat = settings.temperature
    rewards = [
        1 + 2 * probability(after[0], 0, heat),
        -1 + 2 * probability(after[2], 0, heat),
        -1 + 2 * probability(start, 0, heat),
    ]
    assert judged.text_advantage.tolist() == pytest.approx([*standardised(rewards), 0, 0, 0], abs=1e-4)
    # refined turns in order: 0 of the first, 0 and 1 of the second, 0 of the last; only turn 0 of query a compares
    first = standardised([probability(after[0], 0, heat), probability(after[1], 0, heat)])
    assert judged.turn_advantage.tolist() == pytest.approx([first[0], first[1], 0, 0], abs=1e-4)
    assert judged.numbers["accepted_right"] == pytest.approx(3 / 6)
    assert judged.numbers["turns"] == pytest.approx(9 / 6)
    assert judged.numbers["groups_with_variance"] == pytest.approx(1 / 3)
    assert judged.numbers["reward_answer"] == pytest.approx((1 - 1 - 1 + 1 + 1 + 1) / 6)
    gains = [probability(after[i], 0, heat) for i in (0, 1)]
    assert judged.numbers["retrieval_variance"] == pytest.approx(np.var(gains, ddof=1), rel=1e-4)


def test_grpo_without_any_refinement() -> None:
    start = toward(1.0, 0.0, 0.0)
    found = [path("a", [turn("a", "matched", start)], start, "matched"), path("a", [turn("a", None, start)], start)]
    judged = grpo.judge(found, tiny_library(), GrpoTraining(rewards={"answer": 1.0}), torch.tensor([0, 0]))
    assert judged.turn_advantage.shape == (0,)
    assert judged.text_advantage.tolist() == pytest.approx(standardised([1.0, -1.0]))
    assert judged.numbers["retrieval_variance"] == 0.0


@torch.no_grad()
def spoken(policy: Policy, shelf: Shelf, moment: Moment, video_id: str, reply: Reply, sigma: float, seed: int) -> Turn:
    """The turn in which `policy` says `reply`, as the loop would have recorded it."""
    prompt = protocol.prompt(policy.tokenizer, moment.text, shelf.features(video_id), system=policy.settings.system)
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
def step(tiny_policy: Policy, world: World, shelf: Shelf) -> tuple[list[Trajectory], grpo.Judged, GrpoTraining]:
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
    return found, grpo.Judged(torch.tensor([1.0, -1.0]), torch.tensor([1.0, -1.0]), {}), settings


def test_a_grpo_step_starts_at_ratio_one_and_kl_zero(tiny_policy: Policy, shelf: Shelf, step: Any) -> None:
    found, judged, settings = step
    reference = grpo._frozen_copy(tiny_policy)
    _, numbers = grpo._loss(tiny_policy, reference, shelf, found, judged, settings)
    assert numbers["ratio"] == pytest.approx(1, abs=1e-3)
    assert numbers["latent_ratio"] == pytest.approx(1, abs=1e-3)
    assert numbers["kl"] == pytest.approx(0, abs=1e-6)
    assert numbers["latent_distance"] == pytest.approx(1, abs=0.15)


def test_a_grpo_step_teaches_model_and_head_and_leaves_the_reference_alone(
    tiny_policy: Policy, shelf: Shelf, step: Any
) -> None:
    found, judged, settings = step
    reference = grpo._frozen_copy(tiny_policy)
    before = {name: weight.clone() for name, weight in reference.named_parameters()}
    groups = sft.trainable(tiny_policy, settings.head_learning_rate)
    loss, _ = grpo._loss(tiny_policy, reference, shelf, found, judged, settings)
    loss.backward()

    def learns(module: torch.nn.Module) -> bool:
        return all(p.grad is not None and bool(p.grad.any()) for p in module.parameters())

    assert all(
        learns(layer.mlp) and learns(layer.self_attn.o_proj) for layer in tiny_policy.model.model.language_model.layers
    )
    assert learns(tiny_policy.head.refine_projector)
    assert learns(tiny_policy.head.refine_latent_input_projector)
    assert all(weight.grad is None for weight in tiny_policy.head.refine_append_input_projector.parameters())
    assert all(weight.grad is None for weight in tiny_policy.videos.visual.parameters())

    torch.optim.SGD([weight for group in groups for weight in group["params"]], lr=1e-2).step()
    assert all(
        weight.grad is None and torch.equal(weight, before[name]) for name, weight in reference.named_parameters()
    )
    assert reference.videos.visual is tiny_policy.videos.visual
    _, moved = grpo._loss(tiny_policy, reference, shelf, found, judged, settings)
    assert moved["kl"] > 1e-7


def test_a_grpo_step_makes_the_better_trajectory_likelier(tiny_policy: Policy, shelf: Shelf, step: Any) -> None:
    found, judged, settings = step
    reference = grpo._frozen_copy(tiny_policy)
    groups = sft.trainable(tiny_policy, settings.head_learning_rate)
    text_only = replace(settings, latent_weight=0.0)
    loss, _ = grpo._loss(tiny_policy, reference, shelf, found, judged, text_only)
    loss.backward()
    torch.optim.SGD([weight for group in groups for weight in group["params"]], lr=1e-2).step()
    better = found[0].turns[1]
    again = spoken(tiny_policy, shelf, found[0].moment, better.video_id, better.reply, settings.sigma, 2)
    assert float(again.token_logps.sum()) > float(better.token_logps.sum()) + 1e-4


# Evaluation


def test_hits_rank_without_the_rejected_videos_only_where_asked() -> None:
    matrix, rows = CorpusMatrix(ROWS), {"a": 0, "b": 1, "c": 2}
    toward_b = toward(0.4, 0.9, 0.1)
    found = [
        path("a", [turn("b", "not_matched", toward_b)], toward_b),  # right once b has left
        path("b", [turn("b", "matched", toward_b)], toward_b, "matched"),  # accepted: b stays
        path("b", [turn("b", "not_matched", toward_b)], toward_b),  # wrongly rejected
        path("c", [turn("b", "not_matched", toward_b), turn("a", "matched", toward_b)], toward_b, "matched"),
    ]
    assert evaluate.hits(found, matrix, rows, exclude=True).tolist() == [1, 1, 0, 0]
    assert evaluate.hits(found, matrix, rows, exclude=False).tolist() == [0, 1, 1, 0]


def test_found_second_looks_at_the_second_video_alone() -> None:
    query = toward(1.0, 0.0, 0.0)
    shown = {name: turn(name, "not_matched", query) for name in "abc"}
    found = [
        path("a", [shown["b"], shown["a"]], query),
        path("a", [shown["a"]], query, "matched"),
        path("a", [shown["b"], shown["c"], shown["a"]], query),
        path("a", [shown["b"]], query),
    ]
    assert evaluate.found_second(found).tolist() == [1, 0, 0, 0]


@torch.no_grad()
def test_by_soft_tokens_goes_from_the_first_query_to_the_refined_one(
    tiny_policy: Policy, tiny_embedder: Embedder, shelf: Shelf, world: World
) -> None:
    matrix, rows = shelf.matrix(), {name: row for row, name in enumerate(shelf.video_ids)}
    generator = torch.Generator().manual_seed(0)
    found, first_hits, last_hits = [], [], []
    for number, query in enumerate(world.queries("train")):
        moment = query.moment
        assert moment.video_id is not None
        accepts = number % 3 == 0
        actions = None if accepts else torch.randn(8, tiny_policy.settings.soft_size, generator=generator)
        rank = 1 + number % 2
        made = replace(turn("a", None, toward(0, 0, 0)), rank=rank, actions=actions)
        found.append(Trajectory(moment, (made,), torch.zeros(4), 1, "turns"))
        first_hits.append(rank == 1)
        if actions is None:
            last_hits.append(rank == 1)
            continue
        vector = tiny_embedder.embed_texts([moment.text], tiny_policy.head.soft_tokens(actions[None]))[0]
        last_hits.append(int((matrix.rows @ vector).argmax()) == rows[moment.video_id])
    curve = evaluate.by_soft_tokens(tiny_policy, tiny_embedder, matrix, rows, found, 10)
    assert [point["tokens"] for point in curve] == list(range(9))
    assert curve[0]["R@1"]["value"] == pytest.approx(np.mean(first_hits))
    assert curve[8]["R@1"]["value"] == pytest.approx(np.mean(last_hits))
    assert np.mean(first_hits) != np.mean(last_hits)


def test_a_trajectory_as_json_holds_no_tensors() -> None:
    query = toward(1.0, 0.0, 0.0)
    one = path("a", [turn("b", "not_matched", query, True), turn("a", "matched", query)], query, "matched")
    said = json.loads(json.dumps(evaluate.as_json(one)))
    assert [shown["video_id"] for shown in said["turns"]] == ["b", "a"]
    assert (said["turns"][1]["start"], said["turns"][1]["end"]) == (1.0, 3.0)
    assert (said["first_rank"], said["final_rank"], said["stop"], said["failure"]) == (1, 1, "matched", None)

"""What the stages before GRPO feed their loop: labels, sentences, replies, confusions."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from vsr1.agent import protocol
from vsr1.agent.speech import Sampling
from vsr1.data.rationale import describe, judge
from vsr1.data.scene import Event, Scene
from vsr1.data.vocabulary import (
    ATTRIBUTES,
    BACKGROUND_ATTRIBUTES,
    EVENT_ATTRIBUTES,
    all_words,
    canonical,
    canonical_rewrite,
    values,
)
from vsr1.data.world import World, WorldConfig
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.records import Reply
from vsr1.train import sft
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
from vsr1.train.templated import Templates, canonical_embeddings, meanings
from vsr1.train.vision import IGNORE, pair_labels

FIRST = Event(2, 5, "small", "red", "circle", "left")
SECOND = Event(7, 11, "large", "blue", "ring", "grow")
SCENE = Scene("v", 12, "navy", "striped", (FIRST, SECOND))


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


def marks(wanted: dict[str, str]) -> list[tuple[str, str]]:
    """Every attribute of SCENE in the order it is told, with the mark it deserves."""
    told = [(name, getattr(event, name)) for event in SCENE.events for name in EVENT_ATTRIBUTES]
    told += [(name, getattr(SCENE, name)) for name in BACKGROUND_ATTRIBUTES]
    return [(word, "=" if wanted[name] == word else "!=") for name, word in told]


def test_judge_accepts_the_event_asked_for() -> None:
    reply = judge(SCENE.attributes(1), SCENE)
    assert (reply.answer, reply.start, reply.end, reply.refine) == ("matched", 7.0, 11.0, True)
    assert compared(reply) == marks(SCENE.attributes(1))
    assert [mark for _, mark in compared(reply)[4:]] == ["="] * 6


def test_judge_marks_every_attribute_and_says_first_what_to_find() -> None:
    wanted = SCENE.attributes(1) | {"motion": "blink", "texture": "plain"}
    reply = judge(wanted, SCENE)
    assert (reply.answer, reply.start, reply.end, reply.refine) == ("not_matched", None, None, True)
    assert compared(reply) == marks(wanted)
    assert [mark for _, mark in compared(reply)].count("=") == 4
    assert reply.think.startswith("find large blue ring blink on navy plain background ; 2 to 5 s small")


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
    assert sum(piece in ("=", "!=") for piece in pieces) == 10


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
) -> tuple[Templates, SftTraining]:
    settings = replace(SftTraining(batch=8, confusions=4), **changes)
    return Templates(policy, embedder, world, shelf, settings, seed=1), settings


def shown_video(example: Example, shelf: Shelf) -> str:
    assert example.row.video is not None
    return next(name for name in shelf.video_ids if shelf.features([name])[0] is example.row.video)


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


def test_an_expected_step_is_the_same_step(
    tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    expecting, _ = examples(tiny_policy, tiny_embedder, world, shelf)
    surprised, _ = examples(tiny_policy, tiny_embedder, world, shelf)
    announced: list[list[str]] = []
    monkeypatch.setattr(shelf, "expect", lambda video_ids: announced.append(list(video_ids)))
    expecting.expect(3)
    monkeypatch.setattr(expecting, "ask", None)  # the questions are known by now
    drawn, others = expecting.draw(3), surprised.draw(3)
    assert [one.row.token_ids for one in drawn] == [other.row.token_ids for other in others]
    assert announced == [[shown_video(one, shelf) for one in drawn]]


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
    found = canonical_embeddings(tiny_embedder, [SCENE.attributes(0), SCENE.attributes(1)])
    table = tiny_embedder.model.get_input_embeddings().weight
    assert found.shape == (2, 8, table.shape[1])
    for row, event in zip(found, (0, 1), strict=True):
        for vector, word in zip(row, canonical_rewrite(SCENE.attributes(event)).split(), strict=True):
            (token,) = tiny_embedder.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            assert torch.equal(vector, table[token])


def test_meanings_go_by_the_query(tiny_embedder: Embedder, world: World) -> None:
    queries = world.queries("train")[:3]
    found = meanings(tiny_embedder, queries)
    assert list(found) == [query.moment.query_id for query in queries]
    for query in queries:
        (expected,) = canonical_embeddings(tiny_embedder, [query.attributes])
        assert torch.equal(found[query.moment.query_id], expected)


def test_every_word_is_one_token(tiny_embedder: Embedder) -> None:
    for word in all_words():
        ids = tiny_embedder.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
        assert len(ids) == 1 or canonical(word) is None, word


@pytest.mark.parametrize("second", [0.5, 7.0, 14.5, 63.5])
def test_a_time_stamp_is_one_token(tiny_embedder: Embedder, second: float) -> None:
    stamp = f"<{second:.1f} seconds>"
    ids = tiny_embedder.tokenizer(f"<|vision_end|>{stamp}<|vision_start|>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3, stamp

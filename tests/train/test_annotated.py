"""Stage 1 on the files of a data set: which rows a step holds, what they are made of, and what refines."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import datasets
from tests.train.recorder import Recorder
from vsr1.data.layout import Layout
from vsr1.data.rows import SftRow, read_hard_negatives, read_sft
from vsr1.data.world import World
from vsr1.errors import ConfigError
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.train import sft
from vsr1.train.annotated import Annotated
from vsr1.train.library import Shelf
from vsr1.train.sft import SftTraining


@pytest.fixture(scope="module")
def layout(world: World, tiny_embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return datasets.write(tmp_path_factory.mktemp("data"), world, tiny_embedder)


def source(policy: Policy, layout: Layout, shelf: Shelf, **changes: Any) -> Annotated:
    settings = replace(SftTraining(batch=4), **changes)
    return Annotated(policy, read_sft(layout.sft), shelf, settings, 1, read_hard_negatives(layout.hard_negatives))


def test_an_epoch_holds_every_row_once_and_the_next_in_another_order(
    tiny_policy: Policy, layout: Layout, shelf: Shelf
) -> None:
    drawer = source(tiny_policy, layout, shelf)
    rows = len(drawer.rows)
    asked = [row.query_id for step in range(2 * rows) for row in drawer.ask(step)]  # 8 epochs
    for epoch in range(8):
        part = asked[epoch * rows : (epoch + 1) * rows]
        assert Counter(part) == Counter(row.query_id for row in drawer.rows)
    assert asked[:rows] != asked[rows : 2 * rows]


def test_a_row_is_its_prompt_and_its_reply(tiny_policy: Policy, layout: Layout, shelf: Shelf) -> None:
    drawer = source(tiny_policy, layout, shelf)
    by_text = {row.query: row for row in drawer.rows}
    for one in drawer.draw(1):
        row = by_text[one.text]
        said = tiny_policy.text(one.reply)
        assert said == row.reply + tiny_policy.text([tiny_policy.eos_id])
        assert one.row.token_ids[-len(one.reply) + 1 :] == one.reply[:-1]
        assert one.row.video is shelf.features([row.shown])[0]
        assert (one.matched, one.video_id) == (row.matched, row.video_id)


def test_an_expected_step_is_the_same_step(tiny_policy: Policy, layout: Layout, shelf: Shelf) -> None:
    expecting, surprised = (source(tiny_policy, layout, shelf, negatives=5) for _ in range(2))
    expecting.expect(2)
    assert [one.row.token_ids for one in expecting.draw(2)] == [one.row.token_ids for one in surprised.draw(2)]
    assert [one.negatives for one in expecting.draw(3)] == [one.negatives for one in surprised.draw(3)]


def test_negatives_are_the_shown_video_the_listed_ones_and_random_ones(
    tiny_policy: Policy, layout: Layout, shelf: Shelf
) -> None:
    drawer = source(tiny_policy, layout, shelf, negatives=6)
    listed = read_hard_negatives(layout.hard_negatives)
    by_text = {row.query: row for row in drawer.rows}
    for one in [*drawer.draw(0), *drawer.draw(1)]:
        row = by_text[one.text]
        names = [shelf.video_ids[place] for place in one.negatives]
        first = ([] if row.matched else [row.shown]) + [n for n in listed[row.query_id] if n != row.shown]
        assert names[: len(first)] == first
        assert len(names) == len(set(names)) == 6
        assert row.video_id not in names


def test_a_text_that_asks_for_two_videos_has_no_one_answer(tiny_policy: Policy, layout: Layout, shelf: Shelf) -> None:
    rows = read_sft(layout.sft)
    other = next(row.video_id for row in rows if row.video_id != rows[0].video_id)
    twin = SftRow("other", rows[0].query, rows[0].shown, True, other, rows[0].reply)
    drawer = Annotated(tiny_policy, [*rows, twin], shelf, SftTraining(batch=len(rows) + 1), 1)
    answers = {one.text: drawer.has_one_answer(one) for one in drawer.draw(0)}
    assert answers[rows[0].query] is False
    assert answers[rows[-1].query] is True


def test_rows_of_unknown_videos_are_counted_and_none_is_an_error(
    tiny_policy: Policy, layout: Layout, shelf: Shelf
) -> None:
    rows = read_sft(layout.sft)
    strange = [replace(row, shown="elsewhere") for row in rows[:3]]
    assert Annotated(tiny_policy, [*rows, *strange], shelf, SftTraining(), 1).left_out == 3
    with pytest.raises(ConfigError, match="none of the 3 SFT rows"):
        Annotated(tiny_policy, strange, shelf, SftTraining(), 1)
    with pytest.raises(ConfigError, match=f"corpus has {len(shelf.video_ids)} videos"):
        source(tiny_policy, layout, shelf, negatives=len(shelf.video_ids))


def step_losses(
    policy: Policy, embedder: Embedder, drawer: Annotated, shelf: Shelf, settings: SftTraining
) -> tuple[list[torch.Tensor], dict[str, float]]:
    numbers: dict[str, float] = {}
    stage = sft._Stage(policy, embedder, drawer, shelf, settings)
    return list(stage.losses(drawer.draw(0), True, True, numbers)), numbers


@pytest.mark.parametrize("first_latent", ["normed", "unnormed"])
@pytest.mark.parametrize("negatives", [0, 5])
def test_the_parts_of_a_step_add_up_to_the_step(
    tiny_policy: Policy, tiny_embedder: Embedder, layout: Layout, shelf: Shelf, negatives: int, first_latent: str
) -> None:
    tiny_policy.settings = replace(tiny_policy.settings, first_latent=first_latent)
    drawer = source(tiny_policy, layout, shelf, negatives=negatives)
    whole = replace(drawer.settings, refine="all")
    (once,), numbers = step_losses(tiny_policy, tiny_embedder, drawer, shelf, whole)
    longest = max(len(one.row) for one in drawer.draw(0))
    parts, summed = step_losses(tiny_policy, tiny_embedder, drawer, shelf, replace(whole, pack_tokens=longest))
    assert len(parts) == 4
    torch.testing.assert_close(torch.stack(parts).sum(), once, rtol=1e-5, atol=1e-5)
    assert numbers.keys() == summed.keys() == {"say", "contrast"}
    assert summed == pytest.approx(numbers, rel=1e-4)


def test_replies_are_read_off_the_normed_states_whatever_seeds_the_soft_tokens(
    tiny_policy: Policy, tiny_embedder: Embedder, layout: Layout, shelf: Shelf
) -> None:
    drawer = source(tiny_policy, layout, shelf)
    said = []
    for first_latent in ("normed", "unnormed"):
        tiny_policy.settings = replace(tiny_policy.settings, first_latent=first_latent)
        said.append(step_losses(tiny_policy, tiny_embedder, drawer, shelf, drawer.settings)[1])
    assert said[0]["say"] == pytest.approx(said[1]["say"], rel=1e-6)
    assert said[0]["contrast"] != pytest.approx(said[1]["contrast"], rel=1e-6)


def test_hard_negatives_are_contrasted_as_the_formula_says(
    tiny_policy: Policy, tiny_embedder: Embedder, layout: Layout, shelf: Shelf
) -> None:
    drawer = source(tiny_policy, layout, shelf, negatives=5)
    drawn = drawer.draw(0)
    stage = sft._Stage(tiny_policy, tiny_embedder, drawer, shelf, drawer.settings)
    queries = torch.nn.functional.normalize(torch.randn(4, tiny_embedder.dimension), dim=-1)
    found = stage._contrast(queries, drawn)
    rows = shelf.matrix().rows
    expected = 0.0
    for query, one in zip(queries, drawn, strict=True):
        scores = torch.stack([query @ rows[i] for i in (shelf.row(one.video_id), *one.negatives)])
        expected -= float((scores / drawer.settings.temperature).log_softmax(0)[0]) / 4
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("refine", "rows"), [("rejected", 2), ("all", 4)])
def test_which_rows_refine(
    tiny_policy: Policy, tiny_embedder: Embedder, layout: Layout, shelf: Shelf, refine: str, rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    drawer = source(tiny_policy, layout, shelf, batch=len(read_sft(layout.sft)))
    seen: list[int] = []
    plain = sft.soft_tokens

    def counted(policy: Policy, hidden: torch.Tensor, state: backbone.State) -> Any:
        seen.append(len(hidden))
        return plain(policy, hidden, state)

    monkeypatch.setattr(sft, "soft_tokens", counted)
    settings = replace(drawer.settings, refine=refine, refine_rows=rows)
    step_losses(tiny_policy, tiny_embedder, drawer, shelf, settings)
    assert seen == [rows]
    wanted = sum(refine == "all" or not one.matched for one in drawer.draw(0))
    step_losses(tiny_policy, tiny_embedder, drawer, shelf, replace(settings, refine_rows=100))
    assert seen == [rows, wanted]


def test_adapters_learn_alone_and_end_in_the_weights(
    tiny_policy: Policy, tiny_embedder: Embedder, layout: Layout, shelf: Shelf, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    settings = SftTraining(
        optimisation=sft.Optimisation(steps=2, learning_rate=1e-2, warmup=0, muon=0.0), batch=2, lora_rank=2
    )
    before = {name: value.clone() for name, value in tiny_policy.model.named_parameters()}
    monitor: Any = Recorder()
    keeper = sft.Keeper(tmp_path, monitor, float("inf"))
    drawer = source(tiny_policy, layout, shelf, batch=2)
    sft.train_sft(tiny_policy, tiny_embedder, drawer, shelf, settings, keeper)
    after = dict(tiny_policy.model.named_parameters())
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("_proj" in name and "visual" not in name for name in changed)

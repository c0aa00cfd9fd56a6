"""Conditions beside the method: their figures are those of loops run one by one, and what stands is not run again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.agent.loop import ACCEPT, REJECT
from vsr1 import ablating, cli
from vsr1.agent import rollout, verdict
from vsr1.agent.generate import Said
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Spoken
from vsr1.eval import ablations, metrics, outcomes, refinements
from vsr1.eval.ablations import (
    ACCUMULATED,
    CONDITIONS,
    IN_WORDS,
    METHOD,
    ONE_SHOT,
    WITHOUT,
    Ablations,
    EvaluationSettings,
    Opened,
)
from vsr1.models.policy import Policy

SETTINGS = EvaluationSettings(turns=3, max_tokens=24, resamples=20)


def words(query: str, number: int) -> str:
    """Accepts some pairs, so that loops end in every way: at once, later, on a wrong video, never."""
    return ACCEPT if (len(query) + 3 * number) % 4 == 0 else REJECT


@pytest.fixture
def spoken(says, policy, monkeypatch) -> list[int]:
    """Puts `words` into the policy's mouth, and three of its own into its refinements in words; the replies it was asked for
    at a time."""
    says(words)
    scripted, asked = verdict.generate, []
    rewriting = tuple(policy.tokenizer(" a circle ;", add_special_tokens=False)["input_ids"])[:3]

    def generate(policy, prompts, owner, sampling, *, stop=None, **options):
        if stop is None:
            asked.append(len(owner))
            yield from scripted(policy, prompts, owner, sampling, **options)
            return
        for place in range(len(owner)):  # a rewriting, or the span of an answer fallen back on
            yield place, Said(Spoken(rewriting, torch.zeros(len(rewriting)), None, True), None)

    monkeypatch.setattr(verdict, "generate", generate)
    return asked


@pytest.fixture
def begin(policy, embedder, corpus, moments, spoken):
    def make(**options: Any) -> Ablations:
        given = {"settings": SETTINGS, "moments": moments, "policy": policy, **options}
        return Ablations(given.pop("policy"), embedder, corpus, given.pop("moments"), given.pop("settings"), **given)

    return make


@pytest.mark.parametrize("verify", [1, 2])
def test_a_loop_cut_after_some_turns_is_the_shorter_loop(policy, embedder, corpus, moments, spoken, verify):
    # tiny soft tokens hardly move a query; random ones change its ranks
    settings = LoopSettings(turns=3, verify=verify, refinement="random")
    long = outcomes.of(rollout.run(policy, embedder, corpus, moments, settings=settings))
    assert "matched" in long.stop and (outcomes.cut(long, 1).final_rank != long.final_rank).any()
    for turns in (1, 2, 3):
        short = rollout.run(policy, embedder, corpus, moments, settings=replace(settings, turns=turns))
        short, cut = outcomes.of(short), outcomes.cut(long, turns)
        for column in dataclasses.fields(short):
            np.testing.assert_array_equal(getattr(cut, column.name), getattr(short, column.name), column.name)


def test_figures_after_some_turns_are_those_of_the_shorter_loop(begin, policy, embedder, corpus, moments):
    for one in ablations.by_turns(begin()):
        found = rollout.run(policy, embedder, corpus, moments, turns=one["turns"])
        assert one["R@1"]["value"] == metrics.retrieval(found)["R@1"]
        assert one["ver"]["value"] == metrics.verification(found)["ver"]
        assert {at: share["value"] for at, share in one["vcmr"].items()} == metrics.vcmr(found)
        assert one["answered"]["value"] == np.mean([path.stop == "matched" for path in found])


def test_every_condition_is_its_own_loop(begin, policy, embedder, corpus, moments, spoken):
    work = begin()
    found = ablations.figures(work)
    pairs = sum(spoken)
    assert (
        set(found["ablations"]) == set(CONDITIONS) and work.runs == len(CONDITIONS) + 3
    )  # 1, 2 and 3 of 4 soft tokens
    assert pairs <= len(moments) * len(corpus.video_ids)  # every pair is asked about once
    for name, options in CONDITIONS.items():
        alone = rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(**options))
        hits = ablations.hits(alone, work.matrix, work.rows, options.get("exclude", True))
        one = found["ablations"][name]
        assert one["R@1"]["value"] == hits.mean(), name
        assert {at: share["value"] for at, share in one["vcmr"].items()} == metrics.vcmr(alone), name
        if name != METHOD:
            method = found["ablations"][METHOD]
            for gain, ours, theirs in (
                (one["gain"]["R@1"], method["R@1"], one["R@1"]),
                (one["gain"]["vcmr"]["0.5"], method["vcmr"]["0.5"], one["vcmr"]["0.5"]),
            ):
                assert gain["value"] == pytest.approx(ours["value"] - theirs["value"])
    assert set(found["refinement_gain"]) == set(CONDITIONS) - {METHOD, ONE_SHOT, ACCUMULATED}
    assert {name for name, one in found["ablations"].items() if "R@1 wrong" not in one} == {ONE_SHOT}


def test_fewer_soft_tokens_through_the_whole_loop(begin, policy, embedder, corpus, moments):
    work = begin()
    found = ablations.figures(work, [ablations.SOFT_TOKENS])
    assert set(found["ablations"]) == {METHOD} and "refinements" not in found
    curve = found["by_soft_tokens"]
    assert [point["tokens"] for point in curve] == [0, 1, 2, 3, 4]
    assert work.with_soft_tokens(0) is work.values(WITHOUT) and work.with_soft_tokens(4) is work.values(METHOD)
    for point in curve:
        settings = LoopSettings(soft_tokens=point["tokens"])
        alone = rollout.run(policy, embedder, corpus, moments, settings=settings)
        assert point["R@1 excluded"]["value"] == ablations.hits(alone, work.matrix, work.rows, True).mean()
        assert point["vcmr"]["0.5"]["value"] == metrics.vcmr(alone)["0.5"]
        once = rollout.run(policy, embedder, corpus, moments, settings=replace(settings, turns=1))
        assert point["R@1"]["value"] == metrics.retrieval(once)["R@1"]


def test_only_the_first_soft_tokens_of_the_first_refinement_are_inserted(begin, policy, embedder, moments, monkeypatch):
    """An embedder that finds the right video with three soft tokens, and not with fewer: tiny ones hardly move a query."""
    work = begin()
    refined = [one for one in work.method() if one.turns[0].actions is not None]
    texts = [one.moment.text for one in refined]
    assert refined and all(one.turns[0].actions.shape[0] == 4 for one in refined)
    inserted = []

    def embed_texts(asked, soft):
        assert asked == texts
        inserted.append(soft)
        right = torch.tensor([work.rows[one.moment.video_id] for one in refined])
        return work.matrix.rows[right if soft.shape[1] >= 3 else (right + 1) % len(work.rows)].float()

    monkeypatch.setattr(embedder, "embed_texts", embed_texts)
    found = refinements.first(policy, embedder, work.matrix, work.rows, work.method())
    place = [work.method().index(one) for one in refined]
    assert {count: values[place].tolist() for count, values in found.items()} == {
        "0": [float(one.turns[0].rank == 1) for one in refined],
        **{count: [float(count in "34")] * len(refined) for count in "1234"},
    }
    whole = policy.head.soft_tokens(torch.stack([one.turns[0].actions for one in refined]))
    for count, soft in enumerate(inserted, start=1):
        torch.testing.assert_close(soft, whole[:, :count])


def test_many_queries_run_the_loop_for_powers_of_two_only(begin, policy, moments):
    assert begin().counts() == [0, 1, 2, 3, 4]
    many = begin(moments=moments * 20)
    assert many.counts() == [0, 1, 2, 4]
    policy.settings = replace(policy.settings, soft_tokens=6)
    assert many.counts() == [0, 1, 2, 4, 6]


def test_soft_and_hard_refinement_side_by_side(begin):
    found = ablations.figures(begin(), [IN_WORDS])
    both = found["refinements"]
    assert both["soft"]["tokens"]["value"] == 4 and both["hard"]["tokens"]["value"] == 3
    for kind, name in (("soft", METHOD), ("hard", IN_WORDS)):
        assert both[kind]["R@1"] == found["ablations"][name]["R@1"]
        assert both[kind]["seconds"]["value"] > 0


def test_nothing_refined_is_nothing_measured(begin, says):
    says(lambda query, number: ACCEPT)
    found = ablations.figures(begin(), [IN_WORDS, ablations.SOFT_TOKENS])
    assert found["refinements"]["soft"]["tokens"]["value"] is None
    assert found["refinements"]["hard"]["seconds"]["value"] is None
    assert len({json.dumps(point["R@1"]) for point in found["by_soft_tokens"]}) == 1


def test_one_shot_judges_the_first_video_alone(begin, policy, embedder, corpus, moments):
    found = ablations.baseline(begin())
    alone = rollout.run(policy, embedder, corpus, moments, settings=LoopSettings(turns=1, refinement="none"))
    assert {at: share["value"] for at, share in found["vcmr"].items()} == metrics.vcmr(alone)
    assert found["ver"]["value"] == metrics.verification(alone)["ver"]
    assert {k: found[k]["value"] for k in ("R@1", "R@100")} == {
        k: metrics.retrieval(alone, "before")[k] for k in ("R@1", "R@100")
    }


def test_a_query_that_failed_in_one_condition_is_left_out_of_all(begin, moments):
    work = begin()
    rocchio, method = work.values("rocchio"), work.values(METHOD)
    rocchio["failed"][2] = 1.0
    found = ablations.figures(work, ["rocchio"])
    assert found["compared"] == {"queries": len(moments), "measured": len(moments) - 1}
    kept = [index for index in range(len(moments)) if index != 2]
    assert found["ablations"][METHOD]["R@1"]["value"] == method["R@1"][kept].mean()
    assert found["ablations"]["rocchio"]["R@1"]["value"] == rocchio["R@1"][kept].mean()


def test_what_stands_is_not_run_again(begin, policy, moments, tmp_path):
    first = begin(kept=tmp_path)
    found = ablations.figures(first, [WITHOUT, IN_WORDS])
    again = begin(kept=tmp_path)
    assert set(again.standing()) == {METHOD, WITHOUT, IN_WORDS}
    assert ablations.figures(again, [WITHOUT, IN_WORDS]) == found and again.runs == 0
    more = begin(kept=tmp_path)
    ablations.figures(more, [WITHOUT, "rocchio"])
    assert more.runs == 1 and set(begin(kept=tmp_path).standing()) == {METHOD, WITHOUT, IN_WORDS, "rocchio"}

    others: dict[str, dict[str, Any]] = {
        "turns": {"settings": replace(SETTINGS, turns=2)},
        "tokens": {"settings": replace(SETTINGS, max_tokens=20)},
        "seed": {"seed": 1},
        "queries": {"moments": moments[:5]},
        "truth": {"moments": [replace(moments[0], start=0.5), *moments[1:]]},
    }
    for name, other in others.items():
        assert begin(kept=tmp_path, **other).standing() == [], name
    assert begin(kept=tmp_path, settings=replace(SETTINGS, resamples=30)).standing()  # changes no number of a query
    with torch.no_grad():
        next(policy.head.parameters()).view(-1)[0] += 1
    assert begin(kept=tmp_path).standing() == []


# The command


@pytest.fixture
def finished(policy, embedder, corpus, moments, spoken, monkeypatch, tmp_path) -> Path:
    """A run folder that opens as the tiny models; its policy before training is not at hand."""

    def opened(folder: Path) -> Opened:
        assert folder == tmp_path / "run"
        given: Any = (lambda stage: policy, lambda: None, embedder, corpus, moments, SETTINGS, 0)
        return Opened(("sft", "grpo"), *given)

    monkeypatch.setattr(ablating, "reopened", lambda folder: SimpleNamespace(opened=lambda: opened(folder)))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(["eval", *map(str, arguments)]) == code
    text = capsys.readouterr()
    return text.err if code else text.out


def test_the_command_measures_prints_and_keeps(finished, policy, capsys, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(ablating, "write_report", lambda folder, video_path: written.append(video_path("v1").name))
    out = said(capsys, finished, "--ablations", "rocchio", "fine-tuned-one-shot", "--stage", "grpo", "--queries", 4)
    found = json.loads((finished / "ablations.json").read_text())
    assert set(found) == {"seed", "queries", "turns", "corpus_size", "grpo", "baselines"} and found["queries"] == 4
    assert set(found["grpo"]["ablations"]) == {METHOD, "rocchio"} and len(found["grpo"]["by_turns"]) == 3
    assert set(found["baselines"]) == {"fine-tuned one-shot"} and not written
    shown = f"{100 * found['grpo']['ablations']['rocchio']['R@1']['value']:.1f}"
    assert any(line.startswith("rocchio") and shown in line for line in out.splitlines())
    assert "grpo: rocchio" in out

    (finished / "report.html").write_text("old")
    out = said(capsys, finished, "--ablations", "exclusion-only", "--queries", 4)
    assert "grpo: rocchio" not in out and "sft: exclusion only" in out and written == ["1.mp4"]
    found = json.loads((finished / "ablations.json").read_text())
    assert set(found["grpo"]["ablations"]) == {METHOD, WITHOUT, "rocchio"}
    assert set(found["sft"]["ablations"]) == {METHOD, WITHOUT, ONE_SHOT} and set(found["baselines"]) == {
        "fine-tuned one-shot"
    }
    said(capsys, finished, "--ablations", "exclusion-only", "--queries", 3, "--stage", "sft")
    assert set(json.loads((finished / "ablations.json").read_text())) == {
        "seed",
        "queries",
        "turns",
        "corpus_size",
        "sft",
    }


def test_all_ablations_and_a_zero_shot_policy(finished, policy, embedder, capsys, tmp_path, monkeypatch):
    opened = []

    def load(folder: Path) -> Policy:
        opened.append(folder)
        return Policy.tiny(embedder, soft_tokens=4).eval()

    monkeypatch.setattr(Policy, "from_pretrained", load)
    out = said(capsys, finished, "--ablations", "--zero-shot", tmp_path, "--stage", "sft", "--queries", 3)
    found = json.loads((finished / "ablations.json").read_text())
    assert set(found["sft"]["ablations"]) == set(CONDITIONS)
    assert set(found["baselines"]) == {"zero-shot", "fine-tuned one-shot"} and opened == [tmp_path]
    assert [point["tokens"] for point in found["sft"]["by_soft_tokens"]] == [0, 1, 2, 3, 4]
    for title in ("by turns", "by soft tokens", "generated tokens", "zero-shot"):
        assert title in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ablations", "words"], "unknown ablation 'words'; known: all, refinement-exclusion, exclusion-only"),
        (["--ablations", "rocchio", "--stage", "sft2"], "has no stage 'sft2'; it has sft, grpo"),
        (["--ablations", "zero-shot", "--stage", "sft"], "name its folder with --zero-shot"),
        (["--ablations", "--turns", "2"], "--ablations takes one run folder"),
        (["--ablations", "--queries", "0"], "--queries must be at least 1"),
        (["--stage", "sft"], "--stage is for --ablations"),
    ],
)
def test_mistakes_are_one_line(finished, capsys, flags, message):
    err = said(capsys, finished, *flags, code=2)
    assert message in err and err.count("\n") == 1


def test_a_folder_that_is_no_run(tmp_path, capsys):
    assert f"'{tmp_path}' is no run folder" in said(capsys, tmp_path, "--ablations", code=2)

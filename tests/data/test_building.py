"""`vsr1 data build`: what training reads is what annotations, videos and an exact sweep say, and is made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.data.teacher_stub import Stub, reply, serving, words
from vsr1 import cli
from vsr1.agent import protocol
from vsr1.building import queries, steps
from vsr1.building.standing import Outcome
from vsr1.building.steps import Building, Settings
from vsr1.corpus import Corpus
from vsr1.data.annotation_files import AnnotationError
from vsr1.data.endpoint import Endpoint
from vsr1.data.layout import Layout, dataset
from vsr1.data.rows import read_grpo, read_hard_negatives, read_sft
from vsr1.data.teacher import Teacher
from vsr1.errors import ConfigError, CorpusError
from vsr1.models.embedder import Embedder
from vsr1.models.policy import SYSTEM
from vsr1.records import Reply
from vsr1.video import encode

VIDEOS = 8
TRAIN = ("queries/train", "negatives", "pool", "rationales", "sft", "grpo")
PUBLIC_GRPO = {
    "problem_id", "qid", "problem", "data_type", "problem_type", "options", "solution", "path", "data_source", "query",
    "gt_video", "gt_time", "gt_duration", "retrieved_video", "label", "hard_negative_ids", "hard_negative_scores",
    "hard_negative_ranks", "is_augmented",
}  # fmt: skip
PUBLIC_COPY = {"augmentation_type", "source_label", "source_retrieved_video"}


def fig(number: int, video: str, text: str, start: float, end: float, duration: float = 3.0) -> dict[str, Any]:
    row = {"video": video, "time": [start, end], "desc_id": number, "duration": duration, "cog_desc": ""}
    return {**row, "fig_desc": text, "fig_desc_score": 0.5 + number / 100}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos and a broken file; two queries a video and some that are not as they should be."""
    root = tmp_path_factory.mktemp("root")
    (root / "videos" / "deep").mkdir(parents=True)
    (root / "raw_annotation").mkdir()
    random = np.random.default_rng(0)
    for number in range(VIDEOS):
        pixels = random.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
        encode(root / "videos" / ("deep" if number % 2 else "") / f"v{number}.mp4", pixels, fps=4.0)
    (root / "videos" / "broken.mp4").write_bytes(b"nothing")
    colours = ("red", "green", "blue", "small", "large", "step", "moment", "circle")
    rows = [
        fig(2 * video + second, f"v{video}", f"a {colour} circle {second}", 0.5 + second, 2.0 + second / 2)
        for video, colour in enumerate(colours)
        for second in (0, 1)
    ]
    rows += [
        fig(20, "v1", "a red circle 0", 1.0, 2.0),  # the words of query 0, about another video
        fig(21, "v2", "it ends late", 1.0, 3.5),
        fig(22, "v9", "its video is missing", 1.0, 2.0),
        fig(23, "broken", "its video is broken", 1.0, 2.0),
    ]
    for split, part in (("train", rows), ("test", rows[:4])):
        (root / "raw_annotation" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


Build = Callable[..., dict[str, Outcome]]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def build(root: Path, tmp_path: Path, embedder: Embedder, said: list[str]) -> Build:
    """Runs the steps; what became of each artefact, by name."""

    def run(with_embedder: Embedder = embedder, **settings: Any) -> dict[str, Outcome]:
        options = {"out": tmp_path / "out", "negatives": 5, "practice": 3, "workers": 1, **settings}
        asked = Settings(dataset("charades"), root, **options)
        outcomes = Building(asked, lambda: with_embedder, lambda *told: None, said.append).run()
        return {one.name: one for one in outcomes}

    return run


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"root": root, "out": tmp_path_factory.mktemp("finished") / "out"}


@pytest.fixture
def out(finished: dict[str, Any], tmp_path: Path, build: Build) -> Path:
    """A copy of what was built once for all tests."""
    if not finished["out"].exists():
        build(out=finished["out"])
    return Path(shutil.copytree(finished["out"], tmp_path / "out"))


def states(outcomes: dict[str, Outcome]) -> dict[str, str]:
    return {name: outcomes[name].state for name in TRAIN if name in outcomes}


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def ranking(out: Path, embedder: Embedder, finished: dict[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Query id -> (video, score) of all videos, best first, by a plain product and a plain sort; made once."""
    if "ranking" not in finished:
        corpus, meta = Corpus.open(out / "train" / "corpus"), jsonl(Layout(out).query_meta("train"))
        with torch.no_grad():
            asked = embedder.embed_texts([row["query"] for row in meta]).double().numpy()
        scores = asked @ corpus.matrix().rows.double().numpy().T
        finished["ranking"] = {
            row["qid"]: [(corpus.video_ids[i], float(own[i])) for i in np.argsort(-own, kind="stable")]
            for row, own in zip(meta, scores, strict=True)
        }
    return finished["ranking"]


def truths(root: Path) -> dict[str, dict[str, Any]]:
    """The rows that can be learned from, by query id."""
    rows = jsonl(root / "raw_annotation" / "train.jsonl")
    return {f"{row['desc_id']}_fig": row for row in rows if row["video"] not in ("v9", "broken")}


def test_corpus_and_queries_of_each_split_go_by_the_annotations_ids(out: Path, root: Path, embedder: Embedder) -> None:
    layout = Layout(out)
    for split, videos, asked in (("train", VIDEOS, 19), ("test", 2, 4)):
        corpus = Corpus.open(layout.corpus(split), embedder.identity)
        assert sorted(corpus.video_ids) == [f"v{number}" for number in range(videos)]
        vectors, meta = np.load(layout.query_embeddings(split)), jsonl(layout.query_meta(split))
        assert vectors.shape == (asked, embedder.dimension) and vectors.dtype == np.float32 and len(meta) == asked
        assert list(meta[2]) == ["qid", "query", "pos_doc_id", "weight", "fig_score"]
        assert (meta[2]["qid"], meta[2]["pos_doc_id"], meta[2]["fig_score"]) == ("2_fig", "v1", 0.52)
        with torch.no_grad():
            own = embedder.embed_texts([row["query"] for row in meta])
        torch.testing.assert_close(torch.from_numpy(vectors), own, atol=1e-5, rtol=0)
    assert corpus.path("v1") == root / "videos" / "deep" / "v1.mp4"


def test_what_cannot_be_used_is_told(build: Build, said: list[str]) -> None:
    outcomes = build(only="annotations") | build(only="corpus")
    assert outcomes["annotations/train"].counts == {"rows": 20, "moments": 19, "repaired": 1, "refused": 1}
    assert outcomes["corpus/train"].counts == {"videos": VIDEOS, "embedded now": VIDEOS, "failed": 1}
    assert any("missing video" in line for line in said) and any("ends after" in line for line in said)
    assert not any(line.lstrip().startswith("0 ") for line in said)
    assert any("broken.mp4" in line and "corpus of 'train'" in line for line in said)


def test_hard_negatives_are_the_best_wrong_videos_of_a_plain_sort(
    out: Path, root: Path, ranking: dict[str, list[tuple[str, float]]]
) -> None:
    negatives, truth = read_hard_negatives(Layout(out).hard_negatives), truths(root)
    assert list(negatives) == list(truth)
    outranked = 0
    for query, videos in negatives.items():
        right = truth[query]["video"]
        assert list(videos) == [video for video, _ in ranking[query] if video != right][:5]
        outranked += ranking[query][0][0] != right
    assert outranked  # else nothing shows that they stay in
    assert negatives["0_fig"] != negatives["20_fig"]  # the same words, another truth


def test_the_public_filter_drops_what_scores_as_much_as_the_truth(
    out: Path, root: Path, ranking: dict[str, list[tuple[str, float]]], build: Build
) -> None:
    margin = 0.01
    build(margin=margin, only="negatives", force=True)
    for query, videos in read_hard_negatives(Layout(out).hard_negatives).items():
        right, scores = truths(root)[query]["video"], dict(ranking[query])
        best = [video for video, _ in ranking[query] if video != right][:5]
        assert list(videos) == [video for video in best if scores[video] < scores[right] - margin]


def test_the_pool_shows_what_comes_first_and_is_topped_up_until_halves_are_equal(
    out: Path, root: Path, ranking: dict[str, list[tuple[str, float]]], build: Build
) -> None:
    pool, truth = jsonl(Layout(out).pool), truths(root)
    first_is_right = sum(ranking[query][0][0] == row["video"] for query, row in truth.items())
    half = max(first_is_right, len(truth) - first_is_right)
    assert [sum(row["gold_label"] == label for row in pool) for label in ("match", "not_match")] == [half, half]
    for row in pool:
        ranked = [video for video, _ in ranking[row["qid"]]]
        right = truth[row["qid"]]["video"]
        wanted = {"top1": ranked[0], "truth": right, "wrong": next(video for video in ranked if video != right)}
        assert row["top1_video_id"] == wanted[row["shown_because"]]
        assert row["top1_rank"] == ranked.index(row["top1_video_id"]) + 1
        assert row["top1_score"] == pytest.approx(dict(ranking[row["qid"]])[row["top1_video_id"]], abs=1e-5)
        assert (row["gold_label"] == "match") == (row["top1_video_id"] == right)
        assert row["pair_id"] == f"{row['qid']}::{row['top1_video_id']}" and Path(row["top1_video_path"]).is_file()
    assert {row["shown_because"] for row in pool} > {"top1"}
    chosen = build(pairs=2, only="pool", force=True)["pool"]
    assert (chosen.counts["matched"], chosen.counts["not matched"]) == (2, 2)


def test_sft_rows_say_the_truth_in_the_protocol(out: Path, root: Path) -> None:
    rows, truth = read_sft(Layout(out).sft), truths(root)
    assert sum(row.matched for row in rows) * 2 == len(rows) > 0
    for row in rows:
        start, end = truth[row.query_id]["time"]
        said = protocol.parse(row.reply)
        span = (start, min(end, 3.0)) if row.matched else (None, None)
        assert said == Reply("matched" if row.matched else "not_matched", *span, said.think, True)
        assert row.reply == protocol.render(said) and row.system == SYSTEM
        assert truth[row.query_id]["fig_desc"] in said.think
        assert (f"{start:g}" in said.think) >= row.matched
    assert any(row.query_id == "21_fig" for row in rows)


def test_grpo_rows_have_the_public_keys_and_copies_balance_them(
    out: Path, root: Path, ranking: dict[str, list[tuple[str, float]]]
) -> None:
    rows, raw, truth = read_grpo(Layout(out).grpo), jsonl(Layout(out).grpo), truths(root)
    own = [row for row in rows if not row.augmented]
    assert [row.query_id for row in own] == list(truth)
    for number, (row, record) in enumerate(zip(rows, raw, strict=True)):
        ranked, right = ranking[row.query_id], truth[row.query_id]["video"]
        wrong = [(rank, video, score) for rank, (video, score) in enumerate(ranked, 1) if video != right][:3]
        assert row.negatives == tuple(video for _, video, _ in wrong)
        assert record["hard_negative_ranks"] == [rank for rank, _, _ in wrong]
        assert record["hard_negative_scores"] == pytest.approx([score for _, _, score in wrong], abs=1e-5)
        assert row.shown == (right if row.augmented else ranked[0][0]) and record["problem_id"] == number
        assert set(record) == PUBLIC_GRPO | (PUBLIC_COPY if row.augmented else set())
        assert record["gt_time"] == [truth[row.query_id]["time"][0], min(truth[row.query_id]["time"][1], 3.0)]
        assert record["gt_duration"] == 3.0 and record["path"] == f"{row.shown}.npy"
        assert protocol.parse(record["solution"]).answer == ("matched" if row.matched else "not_matched")
    not_matched = sum(not row.matched for row in rows)
    assert sum(row.matched for row in rows) == max(not_matched, len(own) - not_matched)
    stats = json.loads(Layout(out).grpo_stats.read_text())
    assert stats["rows_written"] == len(rows) and stats["rows_not_matched"] == not_matched
    assert stats["rows_augmented_match_added"] == len(rows) - len(own) and stats["rows_total"] == 20


def test_a_second_run_makes_nothing(out: Path, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("was made again")

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if "corpus" not in path.parts}
    monkeypatch.setattr(Embedder, "embed_rows", never)
    monkeypatch.setattr(steps, "sweep", never)
    outcomes = build()
    assert states(outcomes) == dict.fromkeys(TRAIN, "stands")
    assert outcomes["corpus/train"].counts["embedded now"] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("lost", "made"),
    [
        ("train/hard_negatives.json", {"negatives"}),
        ("sft_data/train_oneturn.json", {"sft"}),
        ("grpo_data/stats.minimal_top1.json", {"grpo"}),
        ("train/query_embedding/query_meta.train.jsonl", {"queries/train"}),
    ],
)
def test_only_what_is_missing_is_made_and_comes_out_the_same(
    out: Path, build: Build, lost: str, made: set[str]
) -> None:
    whole = (out / lost).read_bytes()
    (out / lost).unlink()
    assert {name for name, state in states(build()).items() if state == "made"} == made
    assert (out / lost).read_bytes() == whole


def test_what_was_made_from_something_else_is_an_error_until_it_is_forced(
    out: Path, build: Build, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"hard_negatives.json.*negatives \(was '5', is '4'\).*--force"):
        build(negatives=4)
    assert states(build(negatives=4, force=True, only="negatives")) == {"negatives": "made"}
    assert {len(videos) for videos in read_hard_negatives(Layout(out).hard_negatives).values()} == {4}
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((root / "raw_annotation" / "train.jsonl").read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(ConfigError, match=r"query_embeddings.train.npy.*annotations.*--force"):
        build(negatives=4, annotations={"train": fewer})


def test_another_embedder_needs_force_and_then_everything_follows(out: Path, build: Build, embedder: Embedder) -> None:
    with torch.no_grad():
        next(embedder.parameters()).add_(1.0)
    with pytest.raises(ConfigError, match="another --out") as raised:
        build()
    assert "--force" in str(raised.value)
    outcomes = build(force=True)
    assert set(states(outcomes).values()) == {"made"} and outcomes["corpus/train"].counts["embedded now"] == VIDEOS
    assert Corpus.open(out / "train" / "corpus").embedder_id == embedder.identity
    assert set(states(build()).values()) == {"stands"}


def test_a_changed_video_is_embedded_again_and_what_was_made_from_it_follows(
    out: Path, build: Build, root: Path
) -> None:
    video = root / "videos" / "v0.mp4"
    whole = video.read_bytes()
    try:
        encode(video, np.zeros((12, 64, 64, 3), dtype=np.uint8), fps=4.0)
        outcomes = build()
    finally:
        video.write_bytes(whole)
    assert outcomes["corpus/train"].counts["embedded now"] == 1
    assert {name for name in ("negatives", "pool", "grpo") if outcomes[name].state == "made"} == {
        "negatives",
        "pool",
        "grpo",
    }
    assert outcomes["queries/train"].state == "stands"


def test_embedding_queries_goes_on_where_it_was_stopped(
    out: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, batches = Layout(out).query_embeddings("train"), list[int]()
    whole = np.load(embeddings)
    embeddings.unlink()
    monkeypatch.setattr(queries, "PART", 6)
    embed_texts = Embedder.embed_texts

    def stopped(self: Embedder, texts: list[str], soft: Any = None) -> Any:
        batches.append(len(texts))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return embed_texts(self, texts, soft)

    monkeypatch.setattr(Embedder, "embed_texts", stopped)
    with pytest.raises(KeyboardInterrupt):
        build(only="queries")
    assert not embeddings.exists()
    build(only="queries")
    assert batches == [6, 6, 6, 6, 1]
    np.testing.assert_allclose(np.load(embeddings), whole, atol=1e-5)
    assert sorted(path.name for path in embeddings.parent.iterdir()) == [
        "query_embeddings.train.npy",
        "query_meta.train.jsonl",
    ]


def test_prepared_query_vectors_of_any_length_give_the_same_scores(out: Path, build: Build) -> None:
    (out / "build.json").unlink()
    layout, pool = Layout(out), jsonl(Layout(out).pool)
    vectors = np.load(layout.query_embeddings("train"))
    np.save(layout.query_embeddings("train"), 3 * vectors)
    build(only="pool", force=True)
    scores = [row["top1_score"] for row in jsonl(layout.pool.with_name("top1_pool.train.jsonl"))]
    assert scores == pytest.approx([row["top1_score"] for row in pool], abs=1e-5)
    vectors[2] = np.nan
    np.save(layout.query_embeddings("train"), vectors)
    with pytest.raises(AnnotationError, match="the vector of '2_fig' is 0 or not finite"):
        build(only="pool", force=True)


def test_a_video_under_two_names_is_told(build: Build, root: Path, tmp_path: Path, said: list[str]) -> None:
    odd = fig(3, "v0", "a red circle", 0.5, 1.5) | {"video": ["v0"]}  # refused, and no trouble for the scores of others
    rows = [fig(1, "v0", "a red circle", 0.5, 1.5), fig(2, "v0.mp4", "a red circle", 0.5, 1.5), odd]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"annotations": {"train": tmp_path / "train.jsonl"}}
    outcomes = build(**given, only="corpus") | build(**given, only="queries")
    assert outcomes["corpus/train"].counts["failed"] == 1 and outcomes["queries/train"].counts["queries"] == 2
    assert any("'v0.mp4' is also called 'v0'" in line for line in said)


def test_files_of_somebody_else_are_used_and_left_alone(out: Path, build: Build) -> None:
    (out / "build.json").unlink()
    foreign = out / "train" / "hard_negatives.json"
    foreign.write_text("{}")
    assert set(states(build()).values()) == {"not ours"}
    assert foreign.read_text() == "{}"
    (out / "grpo_data" / "train.minimal_top1.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"stats.minimal_top1.json.*not built here"):
        build()


def test_a_prepared_corpus_is_not_embedded_again_and_needs_no_videos(
    out: Path, root: Path, build: Build, tmp_path: Path, embedder: Embedder
) -> None:
    built = Corpus.open(out / "train" / "corpus")
    new = tmp_path / "prepared"
    corpus = Corpus.create(new / "train" / "corpus", built.dimension, embedder.identity)
    corpus.add([f"v{number}" for number in range(VIDEOS)], torch.eye(VIDEOS, built.dimension))
    (tmp_path / "none").mkdir()
    given = {"annotations": {"train": root / "raw_annotation" / "train.jsonl"}, "videos": tmp_path / "none", "out": new}
    outcomes = build(**given, only="corpus") | build(**given, only="queries") | build(**given, only="negatives")
    assert outcomes["corpus/train"].counts == {"videos": VIDEOS}
    assert Corpus.open(new / "train" / "corpus").matrix().rows.equal(torch.eye(VIDEOS, built.dimension))
    assert outcomes["negatives"].counts["queries"] == 18


def test_one_step_alone_says_what_has_to_come_first(build: Build) -> None:
    with pytest.raises(CorpusError, match="corpus"):
        build(only="negatives")


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub()) as server:
        yield server


def test_a_teacher_gives_reasons_and_what_failed_is_asked_again(out: Path, build: Build, stub: Stub) -> None:
    layout = Layout(out)
    stub.answer = lambda body: reply("Because." if "a green" not in words(body) else "")
    teacher = Teacher(Endpoint(stub.url, tries=1), "wise", failures=0.5)
    with pytest.raises(ConfigError, match=r"rationales by \(was 'templates 1', is 'wise, prompt 1'\)"):
        build(teacher=teacher, only="rationales")
    outcomes = build(teacher=teacher, only="rationales", force=True) | build(only="sft", force=True)
    pairs = len(jsonl(layout.pool))
    failed = outcomes["rationales"].counts["failed"]
    assert 0 < failed < pairs == len(stub.asked)
    first = read_sft(layout.sft)
    assert not any("a green" in row.query for row in first) and sum(row.matched for row in first) * 2 == len(first)
    assert {protocol.parse(row.reply).think for row in first} == {"Because."}
    stub.answer = lambda body: reply("Look.")
    again = build(teacher=teacher)
    assert states(again) | {"sft": "made"} == states(again) and again["rationales"].counts["failed"] == 0
    assert len(stub.asked) == pairs + failed
    assert {protocol.parse(row.reply).think for row in read_sft(layout.sft)} == {"Because.", "Look."}
    assert states(build(teacher=teacher))["rationales"] == "stands" and len(stub.asked) == pairs + failed


def test_the_command(
    out: Path, root: Path, embedder: Embedder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    embedder.save_pretrained(tmp_path / "embedder")
    given = ["--root", str(root), "--out", str(out), "--negatives", "5", "--practice-negatives", "3", "--workers", "1"]
    asked = [*given, "--embedder", str(tmp_path / "embedder")]
    assert cli.main(["data", "build", "--preset", "charades-sta", *asked, "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "failed 1" in printed and "broken.mp4" in printed and "stands" in printed and "train_oneturn.json" in printed
    assert cli.main(["data", "build", "charades", *given, "--only", "sft"]) == 0
    for arguments, complaint in (
        (given, "name one data set"),
        (["charades", "--preset", "didemo", *given], "name one data set"),
        (["movies", *asked], "known are charades"),
        (["charades", *given], "give --embedder"),
        (["charades", *given, "--only", "nothing"], "--only must be one of"),
        (["charades", *given, "--pairs", "0"], "--pairs must be at least 1"),
        (["charades", *given, "--teacher", "http://localhost/v1"], "go together"),
        (["charades", *given, "--annotations", "train"], "SPLIT=FILE"),
        (["charades", *asked, "--annotations", "val=x"], "no split 'val'"),
    ):
        assert cli.main(["data", "build", *arguments]) == 2
        assert complaint in capsys.readouterr().err

"""The steps of `vsr1 data build`, from annotations and videos to the files that training reads.

    annotations   what is wrong with them; refused rows stay out, repaired ones are used
    corpus        the videos of each split, embedded
    queries       the texts of each split, embedded
    negatives     the best wrong videos of each training query
    pool          queries with a video that is, or is not, the right one
    rationales    why it is or is not, by a teacher or from templates
    sft           replies to learn
    grpo          queries to practise on

Each step reads the files of those before it, and every artefact is made once (`standing`). Everything is joined by query
id and video id, never by text.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import torch

from vsr1 import ingest
from vsr1.building import queries
from vsr1.building.replies import matching, reason_of, sft_row, told
from vsr1.building.standing import Inputs, Outcome, Standing, digest, digest_of
from vsr1.command import Progress
from vsr1.corpus import Corpus
from vsr1.corpus.catalogue import FILE
from vsr1.data import pairs as pooled
from vsr1.data import teacher as teaching
from vsr1.data.annotated_videos import Videos, probed
from vsr1.data.annotation_files import read
from vsr1.data.layout import Dataset, Layout
from vsr1.data.negatives import Candidates, hard_negatives, known, sweep
from vsr1.data.pairs import Pair
from vsr1.data.practice import practice, statistics
from vsr1.data.rationales import TEMPLATE_VERSION, templated
from vsr1.data.rows import write_grpo, write_hard_negatives, write_sft
from vsr1.data.teacher import Journal, Teacher
from vsr1.data.validation import Report, validate_file
from vsr1.errors import ConfigError, VideoError
from vsr1.files import write_whole
from vsr1.models.policy import SYSTEM
from vsr1.records import Moment

if TYPE_CHECKING:
    from vsr1.models.embedder import Embedder

STEPS: Final = ("annotations", "corpus", "queries", "negatives", "pool", "rationales", "sft", "grpo")
SHOWN: Final = 20  # failures that are printed


@dataclass(frozen=True)
class Settings:
    """What to build.

    dataset: its splits; root: annotations and videos; out: where everything goes, `root` if None; videos: their folder,
    `root`/videos or `root` if None; annotations: files of splits that do not lie where the layout says.
    pairs: of each kind in the pool; negatives: hard negatives of a query; practice: those of a GRPO row; ratio: GRPO rows
    that match to those that do not; margin: of the public ambiguity filter, None to keep what outranks the right video.
    only: the one step to do; force: do again what stands; workers: files decoded at a time (0: the cores); device: where
    the corpus is swept.
    """

    dataset: Dataset
    root: Path
    out: Path | None = None
    videos: Path | None = None
    annotations: Mapping[str, Path] = field(default_factory=dict)
    pairs: int = 1000
    negatives: int = 50
    practice: int = 24
    ratio: float = 1.0
    margin: float | None = None
    teacher: Teacher | None = None
    only: str | None = None
    force: bool = False
    workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 42


class Building:
    """One run over a data set. `embedder` is loaded when a step needs it."""

    def __init__(
        self, settings: Settings, embedder: Callable[[], Embedder], progress: Progress, say: Callable[[str], object]
    ) -> None:
        self.settings = settings
        self.embedder = cache(embedder)
        self.progress, self.say = progress, say
        self.out = settings.out or settings.root
        if not settings.root.is_dir():
            raise ConfigError(f"'{settings.root}' is no folder: give the one that holds the annotations and the videos")
        for split in settings.annotations:
            if split not in settings.dataset.splits:
                raise ConfigError(
                    f"'{settings.dataset.name}' has no split '{split}': it has {', '.join(settings.dataset.splits)}"
                )
        usual = settings.root / "videos"
        self.videos = Videos(settings.videos or (usual if usual.is_dir() else settings.root))
        self.out.mkdir(parents=True, exist_ok=True)
        self.layout = Layout(self.out)
        self.standing = Standing(self.out, settings.force)
        self.train = settings.dataset.train
        self._seconds = probed(self.videos)
        self._reports: dict[str, Report] = {}

    def run(self) -> list[Outcome]:
        """Do what the settings ask for; what became of each artefact."""
        steps = STEPS if self.settings.only is None else (self.settings.only,)
        return [outcome for step in steps for outcome in getattr(self, step)()]

    def annotations(self) -> list[Outcome]:
        """Read and check the annotations of every split that has some."""
        outcomes = []
        for split in self.splits:
            report = self.report(split)
            head, _, *rules = report.text(0).partition("\n\nrefused,")[0].splitlines()
            self.say(head)
            for line in rules:
                if line.split()[:1] not in ([], ["0"]):
                    self.say(line)
            counts = {
                "rows": report.rows,
                "moments": len(report.moments),
                "repaired": len({one.place for one in report.of("repaired")}),
                "refused": len({one.place for one in report.of("refused")}),
            }
            outcomes.append(Outcome(f"annotations/{split}", self.place(split), "read", counts))
        return outcomes

    def corpus(self) -> list[Outcome]:
        """Embed the annotated videos of every split."""
        return [self._corpus(split) for split in self.splits]

    def queries(self) -> list[Outcome]:
        """Embed the texts of every split."""
        outcomes = []
        for split in self.splits:
            moments = self.report(split).moments
            asked = digest(*(f"{one.query_id}\n{one.text}\n{one.video_id}".encode() for one in moments))
            embedder, files = self.embedder(), (self.layout.query_embeddings(split), self.layout.query_meta(split))

            def write(
                split: str = split, files: tuple[Path, Path] = files, moments: Sequence[Moment] = moments
            ) -> dict[str, int]:
                scores = self._scores(split)
                queries.embed(*files, moments, scores, self.embedder(), self._told(f"queries {split}"))
                return {"queries": len(moments)}

            inputs = {"annotations": asked, "embedder": embedder.identity}
            outcomes.append(self.standing.make(f"queries/{split}", files, inputs, write))
        return outcomes

    def negatives(self) -> list[Outcome]:
        """Hard negatives of the training queries."""
        count, margin = self.settings.negatives, self.settings.margin

        def write() -> dict[str, Any]:
            found = hard_negatives(self.candidates, count, margin)
            write_hard_negatives(self.layout.hard_negatives, found)
            above = sum(rank > 1 for rank in self.candidates.truth_ranks.tolist())
            mean = sum(map(len, found.values())) / max(len(found), 1)
            recall = {name: round(100 * share, 1) for name, share in self.candidates.recall().items()}
            return {"queries": len(found), "a query": round(mean, 1), "outranked": above, **recall}

        inputs = {**self._swept(), "negatives": count, "margin": margin}
        return [self.standing.make("negatives", [self.layout.hard_negatives], inputs, write)]

    def pool(self) -> list[Outcome]:
        """Pairs to explain and to learn from."""

        def write() -> dict[str, int]:
            corpus, found = self.corpus_of_train, pooled.draw(self.candidates, self.settings.pairs, self.settings.seed)
            meta = self._vectors[1]
            said = {one.query_id: value for one, value in zip(self.moments, meta, strict=True)}
            places = corpus.places()
            pooled.write_pairs(
                self._pool,
                [replace(pair, extra=said[pair.moment.query_id]) for pair in found],
                lambda video_id: (places.get(video_id), corpus.duration(video_id)),
            )
            return matching(found) | {"topped up": sum(pair.why != "top1" for pair in found)}

        inputs = {**self._swept(), "pairs": self.settings.pairs, "seed": self.settings.seed}
        return [self.standing.make("pool", [self._pool], inputs, write)]

    def rationales(self) -> list[Outcome]:
        """Reasons for the verdict of every pair."""
        teacher = self.settings.teacher
        by = f"templates {TEMPLATE_VERSION}"
        if teacher is not None:
            by = f"{teacher.model}, prompt {teaching.PROMPT_VERSION}"
        inputs = {"pool": digest_of(self._pool), "rationales by": by}
        return [self.standing.make("rationales", [self.layout.pool], inputs, lambda: self._explain(by))]

    def sft(self) -> list[Outcome]:
        """Replies to learn, as many that match as do not."""

        def write() -> dict[str, int]:
            found = self._pairs(self.layout.pool)
            usable = [pair for pair in found if reason_of(pair)]
            right, wrong = ([pair for pair in usable if pair.matched is matched] for matched in (True, False))
            half = min(len(right), len(wrong))
            if not half:
                raise ConfigError(
                    f"'{self.layout.pool}' has {len(right)} usable pairs that match and {len(wrong)} that do not: learning "
                    "to judge needs both"
                )
            rng = Random(self.settings.seed)
            kept = {pair.pair_id for group in (right, wrong) for pair in rng.sample(group, half)}
            chosen = [pair for pair in usable if pair.pair_id in kept]
            write_sft(self.layout.sft, [sft_row(pair) for pair in chosen])
            return matching(chosen) | {"without reason": len(found) - len(usable)}

        inputs: Inputs = {
            "rationales": digest_of(self.layout.pool),
            "annotations": _moments_digest(self.moments),
            "protocol": digest(SYSTEM.encode()),
            "seed": self.settings.seed,
        }
        return [self.standing.make("sft", [self.layout.sft], inputs, write)]

    def grpo(self) -> list[Outcome]:
        """Queries to practise on, with their negatives."""
        count, ratio, seed = self.settings.practice, self.settings.ratio, self.settings.seed

        def problem(text: str) -> str:
            return f'{SYSTEM}\n\nQuery: "{text}"'

        def write() -> dict[str, int]:
            seconds = self.corpus_of_train.duration
            rows = practice(self.candidates, seconds, problem, negatives=count, ratio=ratio, seed=seed)
            stats = statistics(rows) | {
                "rows_total": self.report(self.train).rows,
                "target_match_ratio": ratio,
                "augment_seed": seed,
                "hard_negative_topk": count,
            }
            write_whole(self.layout.grpo_stats, json.dumps(stats, indent=2))
            write_grpo(self.layout.grpo, rows)
            return {"matched": stats["rows_matched"], "not matched": stats["rows_not_matched"]} | {
                "copies": stats["rows_augmented_match_added"]
            }

        files = [self.layout.grpo, self.layout.grpo_stats]
        inputs: Inputs = {
            **self._swept(),
            "protocol": digest(SYSTEM.encode()),
            "negatives": count,
            "ratio": ratio,
            "seed": seed,
        }
        return [self.standing.make("grpo", files, inputs, write)]

    @cached_property
    def splits(self) -> list[str]:
        """The training split, and the others that have annotations of videos that are there."""
        found = [self.train]
        for split in self.settings.dataset.splits:
            if split == self.train:
                continue
            if split in self.settings.annotations or self.place(split).is_file():
                if self.report(split).moments:
                    found.append(split)
                else:
                    self.say(f"split '{split}' is left out: {self._unusable(split)}")
            else:
                self.say(f"split '{split}' is left out: '{self.place(split)}' is not there")
        if not self.report(self.train).moments:
            raise ConfigError(self._unusable(self.train))
        return found

    def place(self, split: str) -> Path:
        """The annotation file of a split."""
        return self.settings.annotations.get(split) or Layout(self.settings.root).annotations(split)

    def report(self, split: str) -> Report:
        """The checked annotations of a split, whose videos are those of the folder and those that the corpus has already."""
        if split not in self._reports:
            corpus = self.layout.corpus(split)
            held = Corpus.open(corpus).video_ids if (corpus / FILE).exists() else []
            videos = [*self.videos, *(video_id for video_id in held if self.videos.find(video_id) is None)]
            self._reports[split] = validate_file(self.place(split), durations=self._length, videos=videos)
        return self._reports[split]

    def _unusable(self, split: str) -> str:
        report = self.report(split)
        first = f", the first: {report.findings[0]}" if report.findings else ""
        return f"none of the {report.rows} rows of '{self.place(split)}' can be used{first}"

    @cached_property
    def corpus_of_train(self) -> Corpus:
        return Corpus.open(self.layout.corpus(self.train))

    @cached_property
    def moments(self) -> list[Moment]:
        """The training queries that can be used: with a span, in a video of the corpus."""
        found = self.report(self.train).moments
        usable = known(found, set(self.corpus_of_train.video_ids))
        if len(usable) < len(found):
            self.say(
                f"{len(found) - len(usable)} of {len(found)} training queries have no span or no video in the corpus"
            )
        if not usable:
            raise ConfigError(
                f"no query of '{self.place(self.train)}' has a video in '{self.layout.corpus(self.train)}'"
            )
        return usable

    @cached_property
    def candidates(self) -> Candidates:
        """One sweep for all training queries."""
        corpus, vectors = self.corpus_of_train, self._vectors[0]
        if vectors.shape[1] != corpus.dimension:
            raise ConfigError(
                f"'{self.layout.query_embeddings(self.train)}' holds {vectors.shape[1]}-d vectors, the corpus "
                f"{corpus.dimension}-d ones: give --force to embed the queries with the corpus' embedder"
            )
        depth = max(self.settings.negatives, self.settings.practice)
        matrix = corpus.matrix().to(self.settings.device)
        return sweep(self.moments, vectors, matrix, corpus.video_ids, depth, self._told("sweep"))

    @cached_property
    def _vectors(self) -> Any:
        return queries.load(self.layout.query_embeddings(self.train), self.layout.query_meta(self.train), self.moments)

    @cached_property
    def _pool(self) -> Path:
        return self.layout.pool.with_name(f"top1_pool.{self.train}.jsonl")

    def _swept(self) -> Inputs:
        """What the sweep depends on."""
        return {
            "annotations": _moments_digest(self.moments),
            f"queries/{self.train}": digest_of(self.layout.query_embeddings(self.train)),
            f"corpus/{self.train}": self._corpus_digest,
        }

    @cached_property
    def _corpus_digest(self) -> str:
        corpus = self.corpus_of_train
        return digest("\n".join(corpus.video_ids).encode(), corpus.matrix().rows.float().numpy().tobytes())

    def _corpus(self, split: str) -> Outcome:
        report, folder, embedder = self.report(split), self.layout.corpus(split), self.embedder()
        corpus = self._standing_corpus(folder, embedder)
        there = set() if corpus is None else set(corpus.video_ids)
        marked = {} if corpus is None else corpus.marks()
        # videos that came in prepared, without a mark, are left as they are; the others are compared with their files
        names: dict[str, str] = {}
        also = []  # a file goes in once, under the first of its names
        for video_id, path in report.videos.items():
            if (video_id in there and video_id not in marked) or not os.path.exists(path):
                continue
            first = names.setdefault(os.path.abspath(path), video_id)
            if first != video_id:
                also.append(f"'{video_id}' is also called '{first}': {path}")
        if not names:
            return Outcome(f"corpus/{split}", folder, "stands", {"videos": len(there)})

        def tell(name: str, done: int, total: int, note: str = "") -> None:
            self.progress(f"{name} {split}", done, total, note)

        found = ingest.add(folder, list(names), embedder, names=names, workers=self.settings.workers, progress=tell)
        failures = [*also, *(f"{one.path}: {one.reason}" for one in found.failures)]
        for failure in failures[:SHOWN]:
            self.say(f"not in the corpus of '{split}': {failure}")
        if len(failures) > SHOWN:
            self.say(f"and {len(failures) - SHOWN} more; files are in '{folder / ingest.FAILURES}'")
        if found.embedded:
            self.standing.changed(f"corpus/{split}")
        counts = {"videos": len(Corpus.open(folder)), "embedded now": found.embedded, "failed": len(failures)}
        return Outcome(f"corpus/{split}", folder, "made" if found.embedded else "stands", counts)

    def _standing_corpus(self, folder: Path, embedder: Embedder) -> Corpus | None:
        """The corpus that is there, if there is one of this embedder; another's goes if `force` says so."""
        if not (folder / FILE).exists():
            return None
        corpus = Corpus.open(folder)
        if corpus.embedder_id == embedder.identity:
            return corpus
        if not self.settings.force:
            raise ConfigError(
                f"corpus '{folder}' was built by embedder '{corpus.embedder_id}', this one is '{embedder.identity}': give "
                "--force to embed the videos again, or another --out"
            )
        corpus.close()
        shutil.rmtree(folder)
        return None

    def _explain(self, by: str) -> dict[str, Any]:
        """Write the pool with its rationales; counts."""
        teacher, found = self.settings.teacher, self._pairs(self._pool)
        if teacher is None:
            said = {pair.pair_id: told(templated(pair), None, "stop") for pair in found}
            counts: dict[str, Any] = matching(found) | {"by": by}
        else:
            path = self.layout.pool.with_name("rationales.jsonl")
            with Journal(path) as journal:
                explained = teaching.explain(
                    found, teacher, journal, self.corpus_of_train.path, self._told("rationales")
                )
            said = {pair_id: told(one.text, one.error, one.finish_reason) for pair_id, one in explained.answers.items()}
            self.say(f"{by}: {explained}")
            for one in explained.failures[:SHOWN]:
                self.say(f"no rationale for {one.pair_id}: {one.error}")
            failed = len(explained.failures)
            counts = {"pairs": len(found), "by": by, "failed": failed, "dollars": round(explained.dollars, 2)}
            counts |= {"again": True} if failed else {}
        corpus = self.corpus_of_train
        places = corpus.places()
        pooled.write_pairs(
            self.layout.pool,
            [replace(pair, extra={**pair.extra, "model_name": by, **said[pair.pair_id]}) for pair in found],
            lambda video_id: (places.get(video_id), corpus.duration(video_id)),
        )
        return counts

    def _pairs(self, path: Path) -> list[Pair]:
        return pooled.read_pairs(path, {moment.query_id: moment for moment in self.moments})

    def _length(self, video_id: str) -> float | None:
        """Seconds of a video whose annotation does not give them; None also for a file that cannot be read, which the
        corpus will list."""
        try:
            return self._seconds(video_id)
        except VideoError:
            return None

    def _scores(self, split: str) -> dict[str, float]:
        """`fig_desc_score` of the queries, by id, where the annotations have it."""
        found: dict[tuple[str | None, str], float] = {}
        for entry in read(self.place(split)).entries:
            row = entry.value if isinstance(entry.value, dict) else {}
            if isinstance(row.get("fig_desc_score"), int | float):
                found[str(row.get("video")), str(row.get("fig_desc"))] = row["fig_desc_score"]
        moments = self.report(split).moments
        return {one.query_id: found[one.video_id, one.text] for one in moments if (one.video_id, one.text) in found}

    def _told(self, name: str) -> Callable[..., None]:
        def tell(done: int, total: int, note: str = "") -> None:
            self.progress(name, done, total, note)

        return tell


def _moments_digest(moments: Sequence[Moment]) -> str:
    return digest(*(repr(moment).encode() for moment in moments))

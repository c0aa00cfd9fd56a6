"""The main job: render a world, train the retriever and the policy on it, evaluate on held-out videos, write the report.

Stages run in order and each leaves one finished artefact in the run folder; a stage whose artefact is there is not run
again, and one that was interrupted goes on from its newest checkpoint. So the same command, given again, always finishes
the job.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from vsr1 import config as configuration
from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Sampling
from vsr1.config import STAGES, RunConfig
from vsr1.corpus import Corpus
from vsr1.data.vocabulary import all_words
from vsr1.data.world import World, build
from vsr1.errors import ConfigError, Vsr1Error
from vsr1.eval import calibration, metrics
from vsr1.eval.ablations import Ablations, baseline
from vsr1.eval.evaluate import Evaluation, as_json, evaluate
from vsr1.eval.report import write_report
from vsr1.files import write_whole
from vsr1.models.embedder import INSTRUCTION, Embedder
from vsr1.models.policy import SHORT_SYSTEM, Policy
from vsr1.models.tokenizer import train_tokenizer
from vsr1.records import Moment
from vsr1.train.checkpoint import publish
from vsr1.train.embedder import train_embedder
from vsr1.train.grpo import train_grpo
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper
from vsr1.train.monitor import Monitor, clock
from vsr1.train.sft import meanings, train_sft
from vsr1.train.vision import train_vision

_FREE = ("run", "stage", "workers", "device", "checkpoint_every")  # may change between two calls on one folder
Module = TypeVar("Module", Embedder, Policy)


def run(config: RunConfig) -> Path:
    """Run `config` to the end of its stage; returns the run folder. Errors a person can mend are `Vsr1Error`s."""
    configuration.check(config)
    device_of(config.device)
    claim(config)
    with _Disk(config.run), Monitor(config.run) as monitor:
        Job(config, monitor).run()
    return config.run


def device_of(name: str) -> torch.device:
    """Where models live by the setting `device`; ConfigError for one torch does not know or this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"'device' must be auto, cpu, cuda or cuda:N, got '{name}'") from error
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ConfigError(f"'device' is '{name}', and torch sees {count} CUDA devices here; use --device cpu")
    return device


class _Disk:
    """Tells a full or read-only disk from other errors; safetensors, torch and sqlite each raise their own for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Vsr1Error):
            return
        cause = error
        while cause is not None:
            if _full(cause):
                raise Vsr1Error(
                    f"the disk of '{self.folder}' is full; free some space and run the same command again (checkpoints are kept)"
                ) from error
            if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise Vsr1Error(f"run folder '{self.folder}': '{cause.filename}': {cause.strerror}") from error
            cause = cause.__cause__ or cause.__context__


def _full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(sign in str(error) for sign in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "disk is full"))


def claim(config: RunConfig) -> None:
    """Make the run folder ours: new, or one of the same settings. Otherwise ConfigError says what differs."""
    saved = config.run / "config.yaml"
    if saved.is_file():
        before, now = (configuration.to_dict(one) for one in (configuration.load(saved), config))
        for key in _different(before, now):
            if key.split(".")[0] not in _FREE:
                raise ConfigError(
                    f"run folder '{config.run}' was made with another '{key}'; choose another --run or delete the folder"
                )
        return
    aside = config.run / "config.yaml.tmp"  # a call killed at once leaves this alone
    if config.run.exists() and (not config.run.is_dir() or {*config.run.iterdir()} - {aside}):
        raise ConfigError(f"'{config.run}' exists and is no run folder (no config.yaml in it); choose another --run")
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        configuration.save(config, aside)
        aside.rename(saved)
    except OSError as error:
        raise ConfigError(f"cannot write run folder '{config.run}': {error.strerror}") from error


def _different(one: object, other: object, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [name for key in keys for name in _different(one.get(key), other.get(key), f"{where}.{key}".strip("."))]
    return [] if one == other else [where]


class Job:
    """The stages of one run and what they share."""

    def __init__(self, config: RunConfig, monitor: Monitor) -> None:
        self.config = config
        self.folder = config.run
        self.monitor = monitor
        self.workers = config.workers or os.cpu_count() or 1
        self.device = device_of(config.device)
        self._started = time.monotonic()
        self.keeper = Keeper(self.folder / "checkpoints", monitor, config.checkpoint_every)
        self._world: World | None = None

    def run(self) -> None:
        """All stages up to the configured one."""
        last = len(STAGES) - 1 if self.config.stage == "all" else STAGES.index(self.config.stage)
        began = time.monotonic()
        for number, stage in enumerate(STAGES[: last + 1], 1):
            self.monitor.say(f"[bold]\\[{number}/{last + 1}] {stage}[/bold]")
            self._started = time.monotonic()
            try:
                getattr(self, stage)()
            finally:
                self._spent(stage)
        self.monitor.say(f"done in {clock(time.monotonic() - began)}: {self.folder}")

    def _spent(self, stage: str) -> dict[str, float]:
        """Add the time since the stage started, or since this was last asked, to what it took over all calls;
        `seconds.json` keeps it for the report. Returns the seconds of every stage so far."""
        path = self.folder / "seconds.json"
        spent: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        now = time.monotonic()
        spent[stage] = round(spent.get(stage, 0.0) + now - self._started, 1)
        self._started = now
        write_whole(path, json.dumps(spent))
        return spent

    def world(self) -> World:
        """The rendered world (made at most once a process)."""
        if self._world is None:
            config = dataclasses.replace(self.config.world, workers=self.workers)
            with self.monitor.phase("render", 1) as phase:
                self._world = build(self.folder / "world", config, self.config.seed, progress=phase.update)
        return self._world

    def _model(self, name: str, load: Callable[[Path], Module], make: Callable[[], Module]) -> Module:
        """The finished model called `name`, loaded if its folder stands, else made and published."""
        final = self.folder / "models" / name
        if final.is_dir():
            return load(final).to(self.device).eval().requires_grad_(False)
        model = make().eval().requires_grad_(False)
        aside = final.with_name(f".{name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        publish(aside, final)
        return model

    def embedder(self) -> Embedder:
        """Vision warm-up, then the embedder; both frozen afterwards."""

        def make() -> Embedder:
            world = self.world()
            torch.manual_seed(self.config.seed)
            tokenizer = train_tokenizer(_texts())
            embedder = Embedder.tiny(tokenizer, self.config.model).to(self.device)
            embedder.videos.workers = self.workers
            train_vision(embedder.videos, world, self.config.vision, self.config.seed, self.keeper)
            train_embedder(embedder, world, self.config.embedder, self.config.seed, self.keeper)
            return embedder

        embedder = self._model("embedder", Embedder.from_pretrained, make)
        embedder.videos.workers = self.workers
        return embedder

    def corpus(self, name: str, embedder: Embedder, video_ids: Sequence[str]) -> Shelf:
        """The corpus folder `name` of these videos, indexed at most once."""
        folder = self.folder / "corpus" / name
        paths = [self.world().video_path(video_id).absolute() for video_id in video_ids]
        with self.monitor.phase(f"index {name}", len(paths)) as phase:
            features = embedder.videos.encode_all(paths, progress=phase.update)
        if not folder.is_dir():
            aside = folder.with_name(f".{name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(parents=True, exist_ok=True)
            corpus = Corpus.create(aside, embedder.dimension, embedder.identity)
            for begin in range(0, len(paths), 128):
                part = slice(begin, begin + 128)
                with torch.no_grad():
                    vectors = embedder.embed_videos(features[part])
                durations = [one.duration for one in features[part]]
                corpus.add(video_ids[part], vectors, paths=paths[part], durations=durations)
            aside.rename(folder)
        return Shelf(Corpus.open(folder, embedder.identity), embedder.videos)

    def sft(self) -> None:
        """Stage 1 of the policy."""
        embedder = self.embedder()

        def make() -> Policy:
            shelf = self.corpus("train", embedder, [scene.video_id for scene in self.world().scenes("train")])
            policy = untrained(embedder, self.config).to(self.device)
            train_sft(policy, embedder, self.world(), shelf, self.config.sft, self.config.seed, self.keeper)
            self._calibrate(policy, embedder)
            return policy

        self._policy("policy-sft", embedder, make)

    def grpo(self) -> None:
        """Stage 2 of the policy."""
        embedder = self.embedder()

        def make() -> Policy:
            policy = self._policy("policy-sft", embedder, _absent)
            scenes = self.world().scenes("train", fold="policy")[: self.config.grpo.videos]
            shelf = self.corpus("grpo", embedder, [scene.video_id for scene in scenes])
            known = set(shelf.video_ids)
            queries = self.world().queries("train", fold="policy")
            moments = [query.moment for query in queries if query.moment.video_id in known]
            validate = self._validation(policy, embedder)
            train_grpo(
                policy,
                embedder,
                moments,
                shelf,
                self.config.grpo,
                self.config.seed,
                self.keeper,
                validate,
                meanings(embedder, queries),
            )
            self._calibrate(policy, embedder)
            return policy

        self._policy("policy-grpo", embedder, make)

    def _held_out(self, embedder: Embedder, count: int) -> tuple[list[Moment], Shelf]:
        """At most `count` queries of the validation split, and the corpus of its videos."""
        world = self.world()
        shelf = self.corpus("validation", embedder, [scene.video_id for scene in world.scenes("validation")])
        return [query.moment for query in world.queries("validation")][:count], shelf

    def _calibrate(self, policy: Policy, embedder: Embedder) -> None:
        """Fit the policy's probabilities on held-out queries, so that they mean what they say."""
        moments, shelf = self._held_out(embedder, self.config.evaluation.calibration)
        sampling = Sampling(max_tokens=self.config.evaluation.max_tokens)
        loop = LoopSettings(turns=2, refinement="none", sampling=sampling, batch=128)
        with self.monitor.phase("calibrate", len(moments)) as phase:
            policy.eval()
            found = rollout.run(policy, embedder, shelf, moments, settings=loop, progress=phase.update)
        scale, offset = calibration.fit(*calibration.pairs(found)) if found else (1.0, 0.0)
        policy.settings = dataclasses.replace(policy.settings, calibration=(scale, offset))

    def _validation(self, policy: Policy, embedder: Embedder) -> Callable[[], dict[str, float]] | None:
        """What stage 2 watches while it trains: the loop on held-out queries, greedy, as it will be evaluated."""
        settings = self.config.grpo
        moments, shelf = self._held_out(embedder, settings.validation_queries)
        if not moments:
            return None
        sampling = Sampling(max_tokens=self.config.evaluation.max_tokens)
        loop = LoopSettings(turns=settings.turns, accumulate=settings.accumulate, sampling=sampling, batch=128)

        def validate() -> dict[str, float]:
            found = rollout.run(policy, embedder, shelf, moments, settings=loop)
            figures = {f"refine_gain_{turn}": gain for turn, (gain, _) in metrics.refine_gains(found).items()}
            figures |= {"vcmr": metrics.vcmr(found)["0.5"], "ver": metrics.verification(found)["ver"]}
            figures["R@1"] = metrics.retrieval(found)["R@1"]
            return {f"held_out_{name}": value for name, value in figures.items()}

        return validate

    def _policy(self, name: str, embedder: Embedder, make: Callable[[], Policy]) -> Policy:
        def load(path: Path) -> Policy:
            return Policy.from_pretrained(path, videos=embedder.videos)

        return self._model(name, load, make)

    def eval(self) -> None:
        """Both policies on the test videos; `eval.json`, `trajectories.jsonl` and `report.html`."""
        if not (self.folder / "eval.json").is_file():
            self._evaluate(self.embedder())
        if not (self.folder / "report.html").is_file():
            write_report(self.folder, self.world().video_path)
        self.monitor.say(f"report: {self.folder / 'report.html'}")

    def _evaluate(self, embedder: Embedder) -> None:
        world = self.world()
        shelf = self.corpus("test", embedder, [scene.video_id for scene in world.scenes("test")])
        moments = [query.moment for query in world.queries("test")]
        moments = moments[: self.config.evaluation.queries or None]
        found: dict[str, Evaluation] = {}
        for stage in ("sft", "grpo"):
            policy = self._policy(f"policy-{stage}", embedder, _absent)
            with self.monitor.phase(f"evaluate {stage}", len(moments)) as phase:
                settings, seed = self.config.evaluation, self.config.seed
                found[stage] = evaluate(policy, embedder, shelf, moments, settings, seed, progress=phase.update)
        with self.monitor.phase("evaluate zero-shot", len(moments)) as phase:
            base = untrained(embedder, self.config).to(self.device).eval()
            settings, seed = self.config.evaluation, self.config.seed
            work = Ablations(
                base, embedder, shelf, moments, settings, seed, progress=lambda _, *done: phase.update(*done)
            )
            baselines = {"zero-shot": baseline(work), "fine-tuned one-shot": found["sft"].baseline}
        self._write(found, baselines, len(moments), len(shelf.video_ids))

    def _write(self, found: dict[str, Evaluation], baselines: dict[str, Any], queries: int, corpus_size: int) -> None:
        difference = metrics.difference(found["sft"].trajectories, found["grpo"].trajectories)
        both = [query for query in found["sft"].found if query in found["grpo"].found]
        now, before = ([found[stage].found[query] for query in both] for stage in ("grpo", "sft"))
        difference["R@1 excluded"] = metrics.paired(now, before)
        result = {
            "seed": self.config.seed,
            "split": "test",
            "queries": queries,
            "corpus_size": corpus_size,
            "stages_seconds": self._spent("eval"),
            **{stage: evaluation.figures for stage, evaluation in found.items()},
            "baselines": baselines,
            "difference": {name: interval.as_dict() for name, interval in difference.items()},
        }
        lines = "".join(json.dumps(as_json(one)) + "\n" for one in found["grpo"].trajectories)
        for name, text in (("trajectories.jsonl", lines), ("eval.json", json.dumps(result, indent=1))):
            write_whole(self.folder / name, text)


def untrained(embedder: Embedder, config: RunConfig) -> Policy:
    """The policy before any training: the embedder's language model, and a head drawn from the run's seed."""
    torch.manual_seed(config.seed)
    return Policy.tiny(embedder, soft_tokens=config.model.soft_tokens)


def _texts() -> list[str]:
    """What the tokenizer learns from: every word of the world with and without a space before it, times, and templates."""
    words = all_words()
    frame = ["a = b != c ; find d", "matched not_matched", "system user assistant", 'Query: ""', "Retrieved video: "]
    times = [f"{second} to {second + 1} s" for second in range(64)]
    # a stamp starts its line, as it does in a prompt: a space before it would split it into four tokens
    stamps = [f"<{second}.{half} seconds>" for second in range(64) for half in (0, 5)]
    return 2 * [" ".join(words), *words, *frame, *times, *stamps, INSTRUCTION, SHORT_SYSTEM]


def _absent() -> Policy:
    raise Vsr1Error("a policy that should be finished is missing; run the same command again")

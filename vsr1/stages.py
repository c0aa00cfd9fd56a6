"""The stages that all kinds of runs have in common: from videos and queries to a trained policy and its evaluation.

The rendered world (`vsr1.world_job`) and annotated data sets (`vsr1.dataset_job`) say where videos, queries and models come
from. Stages run in order and each leaves one finished artefact in the run folder; a stage whose artefact is there is not run
again, and one that was interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from vsr1.agent import rollout
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Sampling
from vsr1.config import JobConfig
from vsr1.errors import ConfigError, Vsr1Error
from vsr1.eval import calibration, metrics
from vsr1.eval.ablations import Ablations, Opened, baseline
from vsr1.eval.evaluate import Evaluation, evaluate
from vsr1.eval.exchange import write_results
from vsr1.eval.report import write_report
from vsr1.files import write_whole
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.records import Moment
from vsr1.train import parallel
from vsr1.train.checkpoint import publish
from vsr1.train.grpo import train_grpo
from vsr1.train.library import Shelf
from vsr1.train.loop import Keeper
from vsr1.train.monitor import Monitor, Terminal, clock
from vsr1.train.sft import Source, train_sft

Module = TypeVar("Module", Embedder, Policy)
Shelves = Literal["sft", "grpo", "validation", "test"]
POLICIES = ("sft", "grpo")  # the stages that leave one


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


class Job(ABC):
    """The stages of one run: what all kinds of runs do alike. A subclass knows the videos, the queries and the models."""

    stages: ClassVar[tuple[str, ...]]

    def __init__(self, config: JobConfig, monitor: Terminal, device: torch.device) -> None:
        self.config = config
        self.folder = config.run
        self.monitor = monitor
        self.workers = config.workers or parallel.cores()
        self.device = device
        self._started = time.monotonic()

    @property
    def keeper(self) -> Keeper:
        """Where checkpoints go; only a job that was given a log may train."""
        assert isinstance(self.monitor, Monitor)
        return Keeper(self.folder / "checkpoints", self.monitor, self.config.checkpoint_every)

    @abstractmethod
    def embedder(self) -> Embedder:
        """The frozen embedder."""

    @abstractmethod
    def start(self, embedder: Embedder) -> Policy:
        """The policy that stage 1 starts from."""

    @abstractmethod
    def load(self, path: Path, embedder: Embedder) -> Policy:
        """A policy that a stage of this run has written."""

    @abstractmethod
    def shelf(self, name: Shelves, embedder: Embedder, policy: Policy) -> Shelf:
        """The corpus that a stage searches: "sft", "grpo", "validation" or "test", with the videos as `policy` sees them."""

    @abstractmethod
    def moments(self, name: Shelves) -> list[Moment]:
        """The queries of "grpo", "validation" or "test"."""

    @abstractmethod
    def source(self, policy: Policy, embedder: Embedder, shelf: Shelf) -> Source:
        """Where the rows of stage 1 come from."""

    @abstractmethod
    def video_path(self, video_id: str) -> Path:
        """The file of a test video."""

    def meanings(self, embedder: Embedder) -> Mapping[str, Tensor] | None:
        """What the queries of stage 2 mean, where that is known (`vsr1.train.grpo.train_grpo`)."""
        return None

    def facts(self) -> dict[str, Any]:
        """What `eval.json` says about the data."""
        return {"split": "test"}

    def run(self) -> None:
        """All stages up to the configured one."""
        last = len(self.stages) - 1 if self.config.stage == "all" else self.stages.index(self.config.stage)
        began = time.monotonic()
        for number, stage in enumerate(self.stages[: last + 1], 1):
            self.monitor.say(f"[bold]\\[{number}/{last + 1}] {stage}[/bold]")
            self._started = time.monotonic()
            try:
                getattr(self, f"run_{stage}")()
            finally:
                if parallel.first():
                    self._spent(stage)
        parallel.wait()
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

    def model(self, name: str, load: Callable[[Path], Module], make: Callable[[], Module]) -> Module:
        """The finished model called `name`, loaded if its folder stands, else made and published."""
        final = self.folder / "models" / name
        if final.is_dir():
            return load(final).to(self.device).eval().requires_grad_(False)
        model = make().eval().requires_grad_(False)
        if parallel.first():
            self._publish(model, final)
        parallel.wait()
        return model

    def _publish(self, model: Embedder | Policy, final: Path) -> None:
        aside = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        publish(aside, final)

    def run_sft(self) -> None:
        """Stage 1 of the policy."""
        embedder = self.embedder()

        def make() -> Policy:
            policy = self.start(embedder)
            shelf = self.shelf("sft", embedder, policy)
            source = self.source(policy, embedder, shelf)
            train_sft(policy, embedder, source, shelf, self.config.sft, self.keeper)
            self._calibrate(policy, embedder)
            return policy

        self._policy("sft", embedder, make)

    def run_grpo(self) -> None:
        """Stage 2 of the policy."""
        embedder = self.embedder()

        def make() -> Policy:
            policy = self.policy("sft", embedder)
            train_grpo(
                policy,
                embedder,
                self.moments("grpo"),
                self.shelf("grpo", embedder, policy),
                self.config.grpo,
                self.config.seed,
                self.keeper,
                self._validation(policy, embedder),
                self.meanings(embedder),
            )
            self._calibrate(policy, embedder)
            return policy

        self._policy("grpo", embedder, make)

    def _calibrate(self, policy: Policy, embedder: Embedder) -> None:
        """Fit the policy's probabilities on held-out queries, so that they mean what they say."""
        if not parallel.first():
            return  # who publishes the policy needs it, nobody else
        moments = self.moments("validation")[: self.config.evaluation.calibration]
        shelf = self.shelf("validation", embedder, policy)
        sampling = Sampling(max_tokens=self.config.evaluation.max_tokens)
        loop = LoopSettings(turns=2, refinement="none", sampling=sampling, batch=128)
        speaker = self.config.evaluation.speaker()
        with self.monitor.phase("calibrate", len(moments)) as phase:
            policy.eval()
            found = rollout.run(policy, embedder, shelf, moments, settings=loop, speaker=speaker, progress=phase.update)
        scale, offset = calibration.fit(*calibration.pairs(found)) if found else (1.0, 0.0)
        policy.settings = dataclasses.replace(policy.settings, calibration=(scale, offset))

    def _validation(self, policy: Policy, embedder: Embedder) -> Callable[[], dict[str, float]] | None:
        """What stage 2 watches while it trains: the loop on held-out queries, greedy, as it will be evaluated."""
        settings = self.config.grpo
        moments = self.moments("validation")[: settings.validation_queries]
        if not moments:
            return None
        shelf = self.shelf("validation", embedder, policy)
        sampling = Sampling(max_tokens=self.config.evaluation.max_tokens)
        loop = LoopSettings(turns=settings.turns, accumulate=settings.accumulate, sampling=sampling, batch=128)
        speaker = self.config.evaluation.speaker()

        def validate() -> dict[str, float]:
            found = rollout.run(policy, embedder, shelf, moments, settings=loop, speaker=speaker)
            figures = {f"refine_gain_{turn}": gain for turn, (gain, _) in metrics.refine_gains(found).items()}
            figures |= {"vcmr": metrics.vcmr(found)["0.5"], "ver": metrics.verification(found)["ver"]}
            figures["R@1"] = metrics.retrieval(found)["R@1"]
            return {f"held_out_{name}": value for name, value in figures.items()}

        return validate

    def _policy(self, stage: str, embedder: Embedder, make: Callable[[], Policy]) -> Policy:
        return self.model(f"policy-{stage}", lambda path: self.load(path, embedder), make)

    def policy(self, stage: str, embedder: Embedder) -> Policy:
        """The finished policy of a stage, "sft" or "grpo"."""
        return self._policy(stage, embedder, _absent)

    def opened(self) -> Opened:
        """What the run was evaluated with, for whoever wants to know more of it."""
        embedder, settings = self.embedder(), self.config.evaluation
        last = self.policy(POLICIES[-1], embedder)
        return Opened(
            stages=POLICIES,
            policy=lambda stage: last if stage == POLICIES[-1] else self.policy(stage, embedder),
            base=lambda: self.start(embedder).eval().requires_grad_(False),
            embedder=embedder,
            shelf=self.shelf("test", embedder, last),
            moments=self.moments("test")[: settings.queries or None],
            settings=settings,
            seed=self.config.seed,
        )

    def run_eval(self) -> None:
        """Both policies on the test videos; `eval.json`, `trajectories.jsonl` and `report.html`."""
        if not parallel.first():
            return
        if not (self.folder / "eval.json").is_file():
            self._evaluate(self.embedder())
        if not (self.folder / "report.html").is_file():
            write_report(self.folder, self.video_path)
        self.monitor.say(f"report: {self.folder / 'report.html'}")

    def _evaluate(self, embedder: Embedder) -> None:
        moments = self.moments("test")[: self.config.evaluation.queries or None]
        found = {stage: self._evaluated(stage, embedder, moments) for stage in POLICIES}
        baselines = {"zero-shot": self._zero_shot(embedder, moments), "fine-tuned one-shot": found["sft"].baseline}
        self._write(found, baselines, len(moments))

    # Each of these two holds one policy, and lets it go: a GPU may have no room for two.
    def _evaluated(self, stage: str, embedder: Embedder, moments: Sequence[Moment]) -> Evaluation:
        policy, settings, seed = self.policy(stage, embedder), self.config.evaluation, self.config.seed
        shelf = self.shelf("test", embedder, policy)
        with self.monitor.phase(f"evaluate {stage}", len(moments)) as phase:
            return evaluate(policy, embedder, shelf, moments, settings, seed, progress=phase.update)

    def _zero_shot(self, embedder: Embedder, moments: Sequence[Moment]) -> dict[str, Any]:
        base, settings, seed = (
            self.start(embedder).eval().requires_grad_(False),
            self.config.evaluation,
            self.config.seed,
        )
        shelf = self.shelf("test", embedder, base)
        with self.monitor.phase("evaluate zero-shot", len(moments)) as phase:

            def tell(_: str, done: int, total: int) -> None:
                phase.update(done)

            return baseline(Ablations(base, embedder, shelf, moments, settings, seed, progress=tell))

    def _write(self, found: dict[str, Evaluation], baselines: dict[str, Any], queries: int) -> None:
        difference = metrics.difference(found["sft"].trajectories, found["grpo"].trajectories)
        both = [query for query in found["sft"].found if query in found["grpo"].found]
        now, before = ([found[stage].found[query] for query in both] for stage in ("grpo", "sft"))
        difference["R@1 excluded"] = metrics.paired(now, before)
        result = {
            "seed": self.config.seed,
            **self.facts(),
            "queries": queries,
            "corpus_size": found["grpo"].corpus_size,
            "stages_seconds": self._spent("eval"),
            **{stage: evaluation.figures for stage, evaluation in found.items()},
            "baselines": baselines,
            "difference": {name: interval.as_dict() for name, interval in difference.items()},
        }
        write_results(self.folder, found["grpo"].trajectories, result)


def _absent() -> Policy:
    raise Vsr1Error("a policy that should be finished is missing; run the same command again")

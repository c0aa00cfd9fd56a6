"""No stage of training holds the logits of its tokens: not in any operation, forward or backward, and not in its memory.

The stages run for real, one step each, on a tiny model whose vocabulary is so large that T x V (words learned from, times
vocabulary) would dwarf everything else. The step that `train` would have called is called, and differentiated, by the test.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.harness import peak_memory
from vsr1.data.rationale import describe
from vsr1.data.world import World
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.ops.linear_logp import LinearLogp
from vsr1.train import embedder as embedder_stage
from vsr1.train import grpo, sft
from vsr1.train.embedder import EmbedderTraining
from vsr1.train.grpo import GrpoTraining
from vsr1.train.library import Shelf
from vsr1.train.loop import Optimisation
from vsr1.train.sft import SftTraining
from vsr1.train.templated import Templates

VOCABULARY = 150_001
"""A matrix of the model is then over 32 MiB, which malloc returns to the system as soon as it is freed: no peak is blurred."""


def unlike(trajectory: Any, context: Any) -> float:
    """A reward of one's own in which any two trajectories differ, so that there is something to learn."""
    return random.Random(str([turn.token_ids for turn in trajectory.turns])).random()


class Step:
    """One step of a stage: `loss()` computes it as the stage does; `words` counts the tokens whose probability was asked for
    with a gradient, in the largest call."""

    def __init__(self, run: Callable[[], None], stage: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.words = 0
        self.numbers: dict[str, float] = {}
        self._run = run
        self._loss: list[Tensor] | None = None
        real = backbone.linear_logp

        def counted(hidden: Tensor, *rest: Any, **options: Any) -> LinearLogp:
            self.words = max(self.words, len(hidden))
            return real(hidden, *rest, **options)

        def instead(
            _name: str, _modules: Any, _groups: Any, step: Callable[[int], Any], settings: Any, *_: Any, **__: Any
        ):
            loss, self.numbers = step(settings.steps - 1)  # when all losses have joined
            self._loss = [loss] if isinstance(loss, Tensor) else list(loss)  # the stage freezes the model when it ends

        for module in (backbone, grpo):
            monkeypatch.setattr(module, "linear_logp", counted)
        monkeypatch.setattr(stage, "train", instead)

    def __call__(self) -> None:
        self._run()
        assert self._loss is not None
        for part in self._loss:
            part.backward()
        self._loss = None


@pytest.fixture
def step(stage: str, tiny_embedder: Embedder, world: World, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> Step:
    settings = Optimisation(steps=10, learning_rate=1e-3)
    keeper: Any = SimpleNamespace(monitor=Silent())
    torch.manual_seed(0)
    policy = copy.deepcopy(Policy.tiny(tiny_embedder))  # whose configuration would be the embedder's
    policy.model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    if stage == "embedder":
        wide = Embedder(policy.model.model, tiny_embedder.tokenizer, tiny_embedder.videos)
        training = EmbedderTraining(optimisation=settings, batch=12)
        several = lambda scene: " ; ".join([describe(scene)] * 3)  # noqa: E731 (words enough, for a world so small)
        monkeypatch.setattr(embedder_stage, "describe", several)
        run = lambda: embedder_stage.train_embedder(wide, world, training, 1, keeper)  # noqa: E731
        return Step(run, embedder_stage, monkeypatch)
    if stage == "sft":
        replies = SftTraining(optimisation=settings, batch=12, refine_rows=4, refine_from=0.5, contrast_from=0.65)
        source = Templates(policy, tiny_embedder, world, shelf, replies, 1)
        run = lambda: sft.train_sft(policy, tiny_embedder, source, shelf, replies, keeper)  # noqa: E731
        return Step(run, sft, monkeypatch)
    monkeypatch.setitem(sys.modules, "rewards_of_mine", SimpleNamespace(unlike=unlike))
    updates = GrpoTraining(
        optimisation=settings, queries=2, group=6, turns=1, max_tokens=40, rewards={"rewards_of_mine:unlike": 1.0}
    )
    moments = [query.moment for query in world.queries("train")]
    run = lambda: grpo.train_grpo(policy, tiny_embedder, moments, shelf, updates, 1, keeper)  # noqa: E731
    return Step(run, grpo, monkeypatch)


class Silent:
    """A monitor that nobody looks at."""

    def phase(self, *_: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def update(self, *_: Any, **__: Any) -> None: ...


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned, those inside our own operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "vsr1":
            with self:
                cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                made = function.redispatch(cpu, *args, **(kwargs or {}))
        else:
            made = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(one.numel() for one in tree_leaves(made) if isinstance(one, Tensor))])
        return made


def with_logits(hidden: Tensor, weight: Tensor, target: Tensor, *, temperature: float = 1.0) -> LinearLogp:
    """What must not be done."""
    logits = (hidden @ weight.T).float() / temperature
    return LinearLogp(logits.log_softmax(-1).gather(1, target[:, None])[:, 0], None)


@pytest.mark.parametrize("stage", ["embedder", "sft", "grpo"])
def test_no_operation_makes_the_logits_and_no_memory_holds_them(stage: str, step: Step) -> None:
    with Largest() as largest:
        used, _ = peak_memory(step)
    assert step.words > 300
    assert largest.elements < step.words * VOCABULARY / 4
    if used is not None:
        assert used * 2**20 < step.words * VOCABULARY * 4, "the logits in float32 alone"


@pytest.mark.parametrize("stage", ["sft"])
def test_logits_would_be_noticed(stage: str, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    words = []

    def noted(hidden: Tensor, *rest: Any, **options: Any) -> LinearLogp:
        words.append(len(hidden))
        return with_logits(hidden, *rest, **options)

    monkeypatch.setattr(backbone, "linear_logp", noted)
    with Largest() as largest:
        used, _ = peak_memory(step)
    assert largest.elements == max(words) * VOCABULARY
    if used is not None:
        assert used * 2**20 >= 2 * max(words) * VOCABULARY * 4, "the logits and their gradient in float32"


@pytest.mark.parametrize("stage", ["sft"])
def test_the_supervised_step_adds_up_its_three_losses(stage: str, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Tensor, "backward", lambda loss: seen.append(loss.item()))
    step()
    found, settings = step.numbers, SftTraining()
    total = found["say"] + settings.distillation_weight * found["distillation"]
    assert seen == [pytest.approx(total + settings.contrast_weight * found["contrast"], rel=1e-5)]

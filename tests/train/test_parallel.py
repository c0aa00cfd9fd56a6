"""Several processes that train together: they end where one with the whole batch ends, whatever happens to one of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vsr1.agent import generate, rollout
from vsr1.config import RunConfig
from vsr1.data.world import World
from vsr1.errors import ConfigError, Vsr1Error
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.train import grpo, loop, parallel
from vsr1.train.grpo import GrpoTraining
from vsr1.train.library import Shelf
from vsr1.train.loop import Interrupted, Keeper, Optimisation, StepResult
from vsr1.train.losses import sft_loss
from vsr1.train.monitor import Monitor, Silent
from vsr1.train.templated import meanings as meanings_of
from vsr1.world_job import WorldJob

STEPS = 6
SETTINGS = Optimisation(steps=STEPS, learning_rate=1e-2, warmup=2)
SECONDS = 120  # until processes that should have ended are killed

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def together(count: int, job: Callable[[], Any]) -> list[Any]:
    """What `job` returns, or the error it raises, in each of `count` processes that stand as torchrun starts them; None for
    one that just ends. Forked, so that nothing is loaded again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(count)]

    def one(number: int) -> None:
        torch.set_num_threads(1)
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        try:
            with parallel.group(torch.device("cpu")) as device:
                assert (device.type, parallel.rank(), parallel.size()) == ("cpu", number, count)
                found = job()
        except Exception as error:
            found = error
        ends[number][1].send_bytes(pickle.dumps(found))  # not `send`, which keeps tensors here, to be fetched
        ends[number][1].close()

    processes = [context.Process(target=one, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    found: list[Any] = []
    for reading, writing in ends:
        writing.close()
        try:
            found.append(pickle.loads(reading.recv_bytes()) if reading.poll(SECONDS) else TimeoutError())
        except EOFError:
            found.append(None)
    for process in processes:
        process.join(10)
        process.kill()
    return found


class Toy(nn.Module):
    """A regression. Only the first row of a step reaches `rare`; a step of no rows teaches nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7 + parallel.rank())  # begins differently in each process
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)
        self.rare = nn.Linear(6, 1)
        self.seen: list[int] = []

    def step(self, index: int) -> StepResult:
        self.seen.append(index)
        rows = (7, 7, 0, 1, 7, 7)[index]
        batch = torch.randn(rows, 6, generator=torch.Generator().manual_seed(index))
        own = parallel.share(range(rows))
        count = parallel.per_process(len(own))
        if not own:
            return None, {}
        hidden = self.body(batch[own]).tanh()
        loss = (self.head(hidden)[:, 0] - 1).square().sum() / count
        parts = [loss]
        if 0 in own:
            parts.append((self.rare(self.body(batch[:1])) - 2).square().mean() * parallel.size())
        return iter(parts), {"own": float(len(own))}


def train(folder: Path, step: Callable[[Toy, int], StepResult] = Toy.step, every: float = 1e9) -> list[Tensor]:
    toy = Toy()
    with Monitor(folder) if parallel.first() else Silent() as monitor:
        keeper = Keeper(folder / "checkpoints", monitor, every)
        groups = [{"params": list(toy.parameters())}]
        loop.train("toy", toy, groups, lambda index: step(toy, index), SETTINGS, keeper, log_every=1)
    return [weight.detach().clone() for weight in toy.parameters()]


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_close(ones: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_alone_nothing_is_different() -> None:
    with parallel.group(torch.device("cpu")) as device:
        assert (device.type, parallel.size(), parallel.first()) == ("cpu", 1, True)
    weight = nn.Parameter(torch.ones(2))
    assert not parallel.average_gradients([weight]) and weight.grad is None
    weight.grad = torch.full((2,), 3.0)
    assert parallel.average_gradients([weight]) and weight.grad.tolist() == [3.0, 3.0]
    assert parallel.share([1, 2, 3]) == [1, 2, 3] and parallel.per_process(5) == 5 and not parallel.anyone(False)
    assert parallel.mean({"a": 1.5}) == {"a": 1.5}
    parallel.wait()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"more processes than there are GPUs here \(1\)"):
        parallel.group(torch.device("cuda")).__enter__()


def test_three_processes_end_where_one_ends(tmp_path: Path) -> None:
    """With seven rows, with none, and with one, for which two of them have nothing to do."""
    whole = train(tmp_path / "whole")
    found = together(3, lambda: train(tmp_path / "shared"))
    for weights in found:
        assert_close(weights, whole)
        assert all(torch.equal(one, other) for one, other in zip(weights, found[0], strict=True))
    assert saved(tmp_path / "shared") == ["toy-step-6"]
    for ours, theirs in zip(log(tmp_path / "shared"), log(tmp_path / "whole"), strict=True):
        assert set(ours) == set(theirs)
        for name in {"loss", "gradient_norm"} & set(ours):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    assert [line.get("own") for line in log(tmp_path / "shared")] == [7 / 3, 7 / 3, None, 1.0, 7 / 3, 7 / 3]


def test_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    def dies(toy: Toy, index: int) -> StepResult:
        if index == 3:
            raise KeyError(index)
        return toy.step(index)

    errors = together(2, lambda: train(tmp_path / "shared", dies, 1e-9))
    assert [type(error) for error in errors] == [KeyError, KeyError]
    assert saved(tmp_path / "shared") == ["toy-step-3"]
    assert_close(train(tmp_path / "shared"), train(tmp_path / "whole"))


def test_all_begin_with_the_weights_of_the_first() -> None:
    def job() -> tuple[list[float], list[float]]:
        torch.manual_seed(parallel.rank())
        module = nn.Linear(2, 2).bfloat16()
        module.bias.requires_grad_(False)
        parallel.begin_alike(module)
        return module.weight.flatten().tolist(), module.bias.tolist()

    (weight, bias), (other, own) = together(2, job)
    assert weight == other and bias != own


def test_buckets_carry_every_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "BUCKET_BYTES", 64)
    shapes = [(3,), (40,), (2, 5), (4,), (4,), (4,), (4,), (4,)]

    def job() -> tuple[list[list[float] | None], list[int]]:
        dtypes = [torch.float32] * 4 + [torch.float64] + [torch.float32] * 3
        weights = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes, strict=True)]
        for number, weight in enumerate(weights[:-1]):
            if number != 2 or parallel.rank():
                weight.grad = torch.full_like(weight, number + 10.0 * parallel.rank())
        assert parallel.average_gradients(weights)
        sizes = [len(one) for one in parallel._buckets(weights)]
        return [None if one.grad is None else one.grad.unique().tolist() for one in weights], sizes

    for found, sizes in together(2, job):
        assert found == [[5.0], [6.0], [6.0], [8.0], [9.0], [10.0], [11.0], None]
        assert sizes == [1, 1, 2, 1, 3]


def test_means_count_what_is_there() -> None:
    def job() -> tuple[dict[str, float], dict[str, float], float, bool]:
        mine = {"both": float(parallel.rank())} | ({"one": 4.0} if parallel.rank() else {})
        told = parallel.mean(mine), parallel.mean(mine, absent=0.0)
        return *told, parallel.per_process(3 * parallel.rank()), parallel.anyone(parallel.rank() == 1)

    expected = ({"both": 0.5, "one": 4.0}, {"both": 0.5, "one": 2.0}, 1.5, True)
    assert together(2, job) == [expected, expected]


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    def dies(toy: Toy, index: int) -> StepResult:
        if index == 2 and parallel.rank() == 1:
            os._exit(9)
        return toy.step(index)

    began = time.monotonic()
    alive, dead = together(2, lambda: train(tmp_path / "shared", dies))
    assert dead is None
    assert isinstance(alive, Vsr1Error) and "process 0 of 2 waited for the others in vain" in str(alive)
    assert time.monotonic() - began < SECONDS / 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_all_stop_behind_the_same_step(tmp_path: Path, number: signal.Signals) -> None:
    """The signal arrives in one of them, twice."""

    def step(toy: Toy, index: int) -> StepResult:
        if index == 3 and parallel.rank() == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return toy.step(index)

    errors = together(2, lambda: train(tmp_path / "shared", step))
    assert [type(error) for error in errors] == [Interrupted, Interrupted]
    assert all("after step 4 of 6" in str(error) for error in errors)
    assert saved(tmp_path / "shared") == ["toy-step-4"]


def test_a_loss_that_is_not_finite_ends_all(tmp_path: Path) -> None:
    def step(toy: Toy, index: int) -> StepResult:
        parts, numbers = toy.step(index)
        bad = float("nan") if index == 1 and parallel.rank() == 1 else 1.0
        return (part * bad for part in parts or ()), numbers  # type: ignore[union-attr]

    errors = together(2, lambda: train(tmp_path / "shared", step))
    assert all(isinstance(error, Vsr1Error) and "step 1: the loss is nan" in str(error) for error in errors)


def test_parts_of_the_supervised_loss_add_up() -> None:
    logp, weight = torch.randn(1, 9) - 3, torch.rand(1, 9) + 0.1
    parts = [sft_loss(logp[:, a:b], weight[:, a:b], denominator=float(weight.sum()) / 2) for a, b in ((0, 4), (4, 9))]
    assert float(sum(parts) / 2) == pytest.approx(float(sft_loss(logp, weight)), rel=1e-5)


def test_one_that_makes_a_corpus_alone_keeps_the_others_waiting(
    world: World, tiny_embedder: Embedder, tiny_policy: Policy, tmp_path: Path
) -> None:
    """As it calibrates or evaluates: who waits until that is done goes on neither before nor never."""
    config = RunConfig(run=tmp_path, workers=1)
    scenes = [*world.scenes("train"), *world.scenes("validation")]
    # here, so that the forked processes find the features and share no decoder
    tiny_embedder.videos.encode_all([world.video_path(scene.video_id).absolute() for scene in scenes])

    def job() -> list[bool]:
        job = WorldJob(config, Silent(), torch.device("cpu"))
        job._world = world
        job.shelf("sft", tiny_embedder, tiny_policy)
        if parallel.first():
            job.shelf("validation", tiny_embedder, tiny_policy)
            time.sleep(0.5)
            (tmp_path / "done").touch()
        parallel.wait()
        return [(tmp_path / name).exists() for name in ("corpus/train", "done")]

    assert together(2, job) == [[True, True], [True, True]]


# The second stage


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch, tiny_policy: Policy) -> Iterator[Policy]:
    """A policy in float64 whose rollouts depend on the query alone, and in which every other reply refines."""
    run, speak = rollout.run, generate.draw

    def each(
        policy: Policy, embedder: Embedder, shelf: Shelf, queries: Any, *, settings: Any, first: Any, **rest: Any
    ) -> Any:
        found = []
        for query, start in zip(queries, first, strict=True):
            seed = zlib.crc32(query.query_id.encode())
            own = replace(settings, sampling=replace(settings.sampling, seed=seed))
            found += run(policy, embedder, shelf, [query], settings=own, first=[start], **rest)
        return found

    def refining(logits: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        tokens, _ = speak(logits, *options)
        tokens[::2] = tiny_policy.refine_id
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]

    monkeypatch.setattr(rollout, "run", each)
    monkeypatch.setattr(generate, "draw", refining)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_policy.double()
    torch.set_num_threads(threads)


def test_queries_are_shared_by_groups(
    deterministic: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, tmp_path: Path
) -> None:
    """Five queries on two processes: the updates and the figures are those of one process with all of them."""
    settings = GrpoTraining(
        optimisation=Optimisation(steps=2, learning_rate=1e-3, warmup=0, muon=0.0),
        queries=5,
        group=3,
        turns=2,
        max_tokens=6,
        latent_beta=0.1,
        validate_every=1,
    )
    moments = [query.moment for query in world.queries("train")]
    meanings = meanings_of(tiny_embedder, world.queries("train"))
    before = [weight.detach().clone() for weight in deterministic.parameters()]

    def job(folder: Path) -> tuple[list[Tensor], int]:
        looked: list[int] = []

        def validate() -> dict[str, float]:
            looked.append(1)
            return {"held_out": 0.5}

        with Monitor(folder) if parallel.first() else Silent() as monitor:
            keeper = Keeper(folder / "checkpoints", monitor, 1e9)
            grpo.train_grpo(deterministic, tiny_embedder, moments, shelf, settings, 1, keeper, validate, meanings)
        return [weight.detach().clone() for weight in deterministic.parameters()], len(looked)

    shared = together(2, lambda: job(tmp_path / "shared"))
    assert not any(isinstance(one, Exception) for one in shared), shared
    whole, _ = job(tmp_path / "whole")
    assert [looked for _, looked in shared] == [2, 0]
    for weights, _ in shared:
        assert_close(weights, whole)
    assert sum(float((one - other).abs().max()) > 1e-4 for one, other in zip(before, whole, strict=True)) > 20
    lines = log(tmp_path / "shared"), log(tmp_path / "whole")
    for ours, theirs in zip(*lines, strict=True):
        assert ours["held_out"] == 0.5
        for name in ("loss", "latent_loss", "latent_kl", "contrast", "distillation", "kl", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7), name


def test_a_query_of_a_video_outside_the_corpus_is_told_before_anything_is_learned(
    tiny_policy: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, tmp_path: Path
) -> None:
    moments = [query.moment for query in world.queries("train")]
    moments[-1] = replace(moments[-1], video_id="elsewhere")
    settings = GrpoTraining(optimisation=Optimisation(steps=0, learning_rate=1e-3))
    with Monitor(tmp_path) as monitor:
        keeper = Keeper(tmp_path / "checkpoints", monitor, 1e9)
        with pytest.raises(Vsr1Error, match="video 'elsewhere' is not in the corpus"):
            grpo.train_grpo(tiny_policy, tiny_embedder, moments, shelf, settings, 1, keeper)


def test_refinements_that_only_meanings_would_teach_are_left_out_without_any(
    deterministic: Policy, tiny_embedder: Embedder, world: World, shelf: Shelf, tmp_path: Path
) -> None:
    settings = GrpoTraining(
        optimisation=Optimisation(steps=1, learning_rate=1e-3),
        queries=2,
        group=2,
        turns=2,
        max_tokens=6,
        beta=0.0,
        latent_weight=0.0,
        contrast_weight=0.0,
        rewards={"time_format": 0.0},
    )
    moments = [query.moment for query in world.queries("train")]
    with Monitor(tmp_path) as monitor:
        keeper = Keeper(tmp_path / "checkpoints", monitor, 1e9)
        grpo.train_grpo(deterministic, tiny_embedder, moments, shelf, settings, 1, keeper)
    assert "loss" not in log(tmp_path)[0]

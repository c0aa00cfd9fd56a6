"""A recipe's plan: what every phase needs of a GPU's memory and time, whether it fits, and what to change where it does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vsr1.models.shape import ModelShape
from vsr1.train import cost, memory
from vsr1.train.cost import Gpu, Spent
from vsr1.train.memory import GIB, Item, Models
from vsr1.train.work import VideoTokens, Work

RANK = 32
"""Of the adapters that are proposed where all weights are too many."""
LEAST_ROWS = 8
LEAST_CACHE = 256 << 20
LEAST_TOKENS = 48
"""Of a pair of frames: about what the published stage 2 shows."""
GAIN = 0.01
"""A change is worth proposing if it saves this share of a phase."""


@dataclass(frozen=True)
class Plan:
    """items: bytes on each GPU, spent: seconds; memory and seconds: of each phase. changes: what makes it fit (nothing if it
    does); fitting: the recipe with these changes, None where they are not enough."""

    work: Work
    gpu: Gpu
    items: list[Item]
    spent: list[Spent]
    memory: dict[str, float]
    seconds: dict[str, float]
    changes: list[str]
    fitting: Work | None

    @property
    def peak(self) -> float:
        """Bytes of the phase that needs most."""
        return max(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu.memory * GIB

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def estimate(policy: ModelShape, embedder: ModelShape, work: Work, gpu: Gpu) -> Plan:
    """The plan of a recipe on GPUs of one kind."""
    models = Models(policy, embedder)
    items, spent = memory.phases(models, work), cost.all_phases(models, work, gpu)
    fitting, changes = _fitted(models, work, gpu)
    return Plan(work, gpu, items, spent, memory.totals(items), cost.totals(spent), changes, fitting)


def _candidates(work: Work) -> Iterator[tuple[str, Work]]:
    """Recipes that need less, the ones that change least of what is learned first. The same kind of change is one line."""
    if not work.checkpointing:
        yield "checkpointing", replace(work, checkpointing=True)
    yield "pack", replace(work, pack=work.pack // 2)
    yield "sft_pack", replace(work, sft_pack=work.sft_pack // 2)
    at_once = max(work.test_batch, *(work.most_prompts(turn) for turn in range(work.turns)))
    if work.decoded_rows > LEAST_ROWS:
        rows = 1 << max(0, math.ceil(math.log2(min(at_once, work.decoded_rows))) - 1)
        yield "decoded_rows", replace(work, decoded_rows=max(LEAST_ROWS, rows))
    if work.cache_bytes > LEAST_CACHE:
        yield "cache_bytes", replace(work, cache_bytes=work.cache_bytes // 2)
    if not work.lora_rank:
        yield "lora_rank", replace(work, lora_rank=RANK)
    if work.longest.of_pair > LEAST_TOKENS:
        yield "video", replace(work, video=_coarser(work.video), longest=_coarser(work.longest))


def _coarser(video: VideoTokens) -> VideoTokens:
    return VideoTokens(video.pairs, max(1, video.of_pair // 2))


_SAID: dict[str, Callable[[Work], str]] = {
    "checkpointing": lambda _: "checkpointing",
    "pack": lambda work: f"grpo.pack_tokens {work.pack}",
    "sft_pack": lambda work: f"sft.pack_tokens {work.sft_pack}",
    "decoded_rows": lambda work: f"{work.decoded_rows} replies at once",
    "lora_rank": lambda work: f"LoRA of rank {work.lora_rank}",
    "cache_bytes": lambda work: f"{work.cache_bytes >> 20} MiB of video features",
    "video": lambda work: f"frames of {work.longest.of_pair * 32 * 32:,} pixels",
}


def _fitted(models: Models, work: Work, gpu: Gpu) -> tuple[Work | None, list[str]]:
    """The recipe with as few changes as make every phase fit, and these changes in words."""
    changed: list[str] = []
    room = gpu.memory * GIB
    while True:
        needed = memory.totals(memory.phases(models, work))
        phase = max(needed, key=needed.__getitem__)
        if needed[phase] <= room:
            return work, [_SAID[name](work) for name in changed]
        weights = sum(size for _, size in memory.held(models, work))
        choices = list(_candidates(work))
        if weights > room / 2:  # then nothing else helps enough
            choices.sort(key=lambda one: one[0] != "lora_rank")
        enough = (1 - GAIN) * needed[phase]
        better = [one for one in choices if memory.totals(memory.phases(models, one[1]))[phase] < enough]
        if not better:
            return None, [_SAID[name](work) for name in changed]
        name, work = better[0]
        if name not in changed:
            changed.append(name)

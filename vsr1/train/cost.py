"""The seconds that a recipe takes, by phase: what it computes and moves over what a GPU can do, times what of that is reached.

A pass takes the longest of its products, of the memory it reads and of the time to launch it; videos are decoded beside the
GPU, so a phase takes as long as the slower of the two. Which efficiencies were measured and which are assumed stands with each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vsr1.data.benchmarks import Split
from vsr1.models.shape import TextShape
from vsr1.train.memory import FLOAT, Models
from vsr1.train.work import Work

PRODUCTS = 0.53
"""Of the peak, what products reach: measured in `linear_logp` on an H100 (8,192 x 151,936 x 2,048, forward and backward)."""
ATTENTION = 0.27
"""The same of attention: measured on an H100 (a group's forward and backward behind a prompt of 2,048)."""
BANDWIDTH = 0.90
"""Of the memory's bandwidth, what a sweep over it reaches: measured in `corpus_scan` on an H100."""
DECODING = 37.9e-3
"""Core seconds for each second of 480p H.264: measured with 16 files on the 16 cores beside an H100."""
LAUNCH = 1.0e-3
"""Seconds that one layer takes to be launched from Python, however little it computes; a backward pass takes as long. Assumed:
1.3 ms were measured on two slow cores, the computing of a tiny model included."""
LINKED = 0.7
"""Of the link between GPUs, what an all-reduce reaches: assumed."""


@dataclass(frozen=True)
class Gpu:
    """What the maker's data sheet says. memory: GiB that a program can have; flops: dense bfloat16, summed in float32;
    bandwidth of the memory and of the link to other GPUs (one way): bytes/s."""

    title: str
    memory: float
    flops: float
    bandwidth: float
    link: float


GPUS = {
    "3090-24": Gpu("RTX 3090 24 GB", 23.5, 71e12, 936e9, 32e9),
    "4090-24": Gpu("RTX 4090 24 GB", 23.5, 165e12, 1008e9, 32e9),
    "a6000-48": Gpu("RTX A6000 48 GB", 47.5, 155e12, 768e9, 32e9),
    "l40s-48": Gpu("L40S 48 GB", 44.5, 362e12, 864e9, 32e9),
    "a100-80": Gpu("A100 80 GB", 79.0, 312e12, 2039e9, 300e9),
    "h100-80": Gpu("H100 80 GB", 79.0, 989e12, 3350e9, 450e9),
}


POLICIES = 2
"""That are evaluated: those of both stages."""


@dataclass(frozen=True)
class Spent:
    """One thing that takes time in a phase; beside: it is done by processors while the GPU works."""

    phase: str
    name: str
    seconds: float
    beside: bool = False


@dataclass(frozen=True)
class Clock:
    """Seconds of single passes on one GPU."""

    models: Models
    work: Work
    gpu: Gpu

    def products(self, flops: float) -> float:
        return flops / (self.gpu.flops * PRODUCTS * (1.0 if self.work.half else 0.5))

    def moved(self, size: float) -> float:
        return size / (self.gpu.bandwidth * BANDWIDTH)

    def attended(self, text: TextShape, pairs: float) -> float:
        return 4 * pairs * text.queries * text.layers / (self.gpu.flops * ATTENTION)

    def read(self, text: TextShape, tokens: float, pairs: float, passes: float = 1.0) -> float:
        """One forward pass, or several over so many tokens together."""
        computed = self.products(text.flops(tokens, 0)) + self.attended(text, pairs)
        weights = passes * text.layers * text.matrices * self.work.element
        return max(computed, self.moved(weights), passes * text.layers * LAUNCH)

    def learned(self, text: TextShape, tokens: float, pairs: float, passes: float) -> float:
        """Forward and backward passes; of frozen weights beside adapters no gradient is computed."""
        rank, again = self.work.lora_rank, 1.0 if self.work.checkpointing else 0.0
        linear = self.products(text.flops(tokens, 0)) * (1 + again + (1 if rank else 2))
        adapters = self.products(2 * tokens * text.adapters(rank)) * (3 + again)
        attention = self.attended(text, pairs) * (1 + again + 2.5)
        return max(linear + adapters + attention, passes * text.layers * LAUNCH * (2 + again))

    def logps(self, tokens: float) -> float:
        """`linear_logp` with its gradients: logits twice, and the products with the weight and, where it learns, the states."""
        products = 3 if self.work.lora_rank else 4
        return products * self.products(self.models.policy.text.head_flops(tokens))

    def latents(self, rows: float, *, learned: bool, passes: float = 1.0) -> float:
        """Soft tokens of `rows` rows behind one another."""
        text, steps = self.models.policy.text, self.work.soft - 1
        pairs = rows * steps * self.work.row
        if learned:
            return self.learned(text, rows * steps, pairs, passes * steps)
        return self.read(text, rows * steps, pairs, passes * steps)

    def embedded(self, rows: float, *, learned: bool, passes: float = 1.0) -> float:
        """Queries with their soft tokens; learned: with the gradient of the soft tokens."""
        text, length = self.models.embedder.text, self.work.query + self.work.soft
        once = self.read(text, rows * length, rows * length**2 / 2, passes)
        return once * (2 if learned else 1)

    def swept(self, videos: int, queries: float, sweeps: float) -> float:
        """Sweeps over a corpus, with the products of so many queries."""
        size = videos * self.work.dimension
        return max(self.moved(sweeps * size * FLOAT), self.products(2 * queries * size))

    def seen(self, videos: float) -> float:
        """The vision tower over so many videos."""
        return self.products(self.models.policy.vision.flops(self.work.video.visual, self.work.video.of_pair) * videos)

    def decoded(self, videos: float, seconds: float) -> float:
        """Videos decoded on this GPU's share of the processors."""
        return videos * seconds * DECODING / max(1.0, self.work.cores / self.work.gpus)

    def updated(self, steps: float) -> float:
        """AdamW reads and writes weight, master, gradient, two moments; GPUs add their gradients up."""
        trained = self.models.trained(self.work.lora_rank) + self.models.head
        each = self.moved(trained * (8 * FLOAT + 2 * self.work.element))
        others = (self.work.gpus - 1) / self.work.gpus
        return steps * (each + 2 * others * trained * FLOAT / (self.gpu.link * LINKED))

    def spoken(self, replies: float, prompts: float) -> float:
        """Replies of a rollout's turn: token by token, all rows together, each step reading weights and caches. Rows that end
        make room for replies that wait."""
        text, work = self.models.policy.text, self.work
        rows = min(replies, work.decoded_rows)
        steps = max(work.longest_reply, replies / rows * work.reply) + work.soft
        cached = (min(prompts, rows) * (work.mean_prompt) + rows * work.reply) * text.cache_bytes(work.element)
        weights = (text.layers * text.matrices + text.table) * work.element
        computed = self.products(text.flops(rows, 0) + text.head_flops(rows))
        return steps * max(self.moved(weights + cached), computed, text.layers * LAUNCH)

    def prompted(self, prompts: float, passes: float) -> float:
        """Prompts that are read."""
        length = self.work.mean_prompt
        return self.read(self.models.policy.text, prompts * length, prompts * length**2 / 2, passes)


def index(clock: Clock) -> list[Spent]:
    """Both corpora: every video once through tower and embedder."""
    models, work = clock.models, clock.work
    videos = work.train.videos + work.test.videos
    length = work.video.tokens
    pairs = videos * length**2 / 2
    seconds = work.train.videos * work.train.seconds + work.test.videos * work.test.seconds
    return [
        Spent("index", "vision tower", clock.seen(videos)),
        Spent("index", "embedder", clock.read(models.embedder.text, videos * length, pairs, videos / 32)),
        Spent("index", "decoding videos", clock.decoded(1, seconds), beside=True),
    ]


def sft(clock: Clock) -> list[Spent]:
    """Stage 1: rows that are read with their replies and learned from."""
    models, work = clock.models, clock.work
    text = models.policy.text
    rows = work.sft_steps * math.ceil(work.sft_rows / work.gpus)
    fit = max(1, work.sft_pack // work.row)
    passes = work.sft_steps * math.ceil(math.ceil(work.sft_rows / work.gpus) / fit)
    refined = rows * work.sft_refined
    missed = _missed(clock, rows, work.train)
    return [
        Spent("sft", "vision tower", clock.seen(missed)),
        Spent("sft", "policy", clock.learned(text, rows * work.row, rows * work.row**2 / 2, passes)),
        Spent("sft", "words", clock.logps(rows * work.reply)),
        Spent("sft", "soft tokens", clock.latents(refined, learned=True, passes=passes)),
        Spent("sft", "embedder", clock.embedded(refined, learned=True, passes=passes)),
        Spent("sft", "corpus", clock.swept(work.train.videos, 3 * refined, 2.0 * passes)),
        Spent("sft", "optimizer", clock.updated(work.sft_steps)),
        Spent("sft", "decoding videos", clock.decoded(missed, work.train.seconds), beside=True),
    ]


def _missed(clock: Clock, shown: float, corpus: Split) -> float:
    size = clock.models.policy.vision.feature_bytes(clock.work.video.visual, clock.work.element)
    return clock.work.misses(shown, corpus.videos, size)


def grpo(clock: Clock) -> list[Spent]:
    """Stage 2: rollouts, then updates on what they left."""
    models, work = clock.models, clock.work
    text, turns = models.policy.text, range(work.turns)
    replies, prompts = sum(map(work.replies, turns)), sum(map(work.prompts, turns))
    length = work.mean_prompt
    shown = work.rollouts * prompts
    missed = _missed(clock, shown, work.train)
    if prompts * models.policy.vision.feature_bytes(work.video.visual, work.element) > work.cache_bytes:
        missed += work.updates * shown  # an update asks for the rollout's videos again, and they are gone
    steps = float(work.grpo_steps)
    tokens = prompts * length + replies * work.reply
    pairs = prompts * length**2 / 2 + replies * work.reply * (length + work.reply / 2)
    packs = math.ceil(tokens / work.pack)
    rolled = [work.rollouts * clock.spoken(work.replies(turn), work.prompts(turn)) for turn in turns]
    return [
        Spent("grpo", "vision tower", clock.seen(missed)),
        Spent("grpo", "rollout: prompts", work.rollouts * clock.prompted(prompts, work.turns)),
        Spent("grpo", "rollout: replies", sum(rolled)),
        Spent("grpo", "policy", steps * clock.learned(text, tokens, pairs, 2 * packs)),
        Spent("grpo", "reference", steps * clock.read(text, tokens, pairs, 2 * packs)),
        Spent("grpo", "words", steps * (clock.logps(replies * work.reply))),
        Spent("grpo", "soft tokens", steps * clock.latents(work.refined, learned=True, passes=packs)),
        Spent("grpo", "embedder", steps * clock.embedded(work.refined, learned=True, passes=packs)),
        Spent("grpo", "corpus", steps * clock.swept(work.train.videos, 4 * work.refined, work.turns + 2.0 * packs)),
        Spent("grpo", "optimizer", clock.updated(steps)),
        Spent("grpo", "decoding videos", clock.decoded(missed, work.train.seconds), beside=True),
    ]


def evaluation(clock: Clock) -> list[Spent]:
    """The loop over all test queries, one trajectory each, with the policies of both stages; on one GPU, however many train.
    The ablations, which share most verdicts, and the baseline are not counted."""
    work = clock.work
    queries = POLICIES * work.test.queries
    parts = math.ceil(queries / work.test_batch)
    loops = work.loops(work.test_turns)
    shown = queries * sum(loops)
    missed = _missed(clock, shown, work.test)
    rows = min(queries, work.test_batch)
    replies = sum(clock.spoken(rows * share, rows * share) for share in loops)
    turns = len(loops) * parts
    return [
        Spent("eval", "vision tower", clock.seen(missed)),
        Spent("eval", "prompts", clock.prompted(shown, turns)),
        Spent("eval", "replies", parts * replies),
        Spent("eval", "embedder", clock.embedded(shown, learned=False, passes=turns)),
        Spent("eval", "corpus", clock.swept(work.test.videos, 2 * shown, turns)),
        Spent("eval", "decoding videos", clock.decoded(missed, work.test.seconds), beside=True),
    ]


def all_phases(models: Models, work: Work, gpu: Gpu) -> list[Spent]:
    """Everything that takes time, phase by phase."""
    clock = Clock(models, work, gpu)
    return [*index(clock), *sft(clock), *grpo(clock), *evaluation(clock)]


def totals(spent: list[Spent]) -> dict[str, float]:
    """The seconds of each phase: the GPU's, or those of the decoding beside it if they are more."""
    sums: dict[str, list[float]] = {}
    for one in spent:
        sums.setdefault(one.phase, [0.0, 0.0])[one.beside] += one.seconds
    return {phase: max(both) for phase, both in sums.items()}

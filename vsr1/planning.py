"""`vsr1 plan`: the memory and the time that a recipe takes, computed before anything is loaded or downloaded.

Shapes come from `config.json` or are those of the published models; the recipe is a preset's. Nothing is run. `--write` puts the
table of all presets between its marks in a Markdown file: docs/recipes.md is made so.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vsr1.command import Parser, guarded, say
from vsr1.errors import ConfigError
from vsr1.files import write_whole

if TYPE_CHECKING:
    from vsr1.models.shape import ModelShape
    from vsr1.train.cost import Gpu
    from vsr1.train.estimate import Plan
    from vsr1.train.work import Work

PRESETS = ("charades", "didemo", "activitynet")
SIZES = ("2b", "4b")
MARKS = "<!-- plan -->", "<!-- /plan -->"
HARDWARE = (("4090-24", 1), ("l40s-48", 1), ("h100-80", 1), ("a6000-48", 4), ("h100-80", 8))
"""What the table of all presets is computed for."""
GIB = 1 << 30


def main(argv: Sequence[str]) -> int:
    """`vsr1 plan`."""
    return guarded(lambda: _plan(_parse(argv)), kept="nothing was written")


def work_of(preset: str, *, memory: int = 80, published: bool = False, **changed: Any) -> Work:
    """The numbers of a data set's recipe on GPUs of so many GB; `changed` fields of `Work` instead of its own."""
    from vsr1 import presets
    from vsr1.data.benchmarks import BENCHMARKS
    from vsr1.models.vision import VideoSettings
    from vsr1.train.work import VideoTokens, Work

    name, _, size = preset.partition("-")
    recipe = presets.dataset(name, size or "2b", memory=memory, published=published)
    data, frame = BENCHMARKS[recipe.dataset], (480, 640)
    settings = VideoSettings().limited(recipe.max_pixels)
    mean, longest = (VideoTokens.of(settings, seconds, frame) for seconds in (data.train.seconds, data.longest))
    sft, grpo, evaluation = recipe.sft, recipe.grpo, recipe.evaluation
    known = Work(
        data.train,
        data.test,
        mean,
        longest,
        frame,
        lora_rank=grpo.lora_rank,
        checkpointing=recipe.checkpointing,
        cache_bytes=recipe.feature_cache << 20,
        longest_reply=grpo.max_tokens,
        sft_steps=sft.optimisation.steps,
        sft_rows=sft.batch,
        sft_pack=sft.pack_tokens,
        sft_refined=1.0 if sft.refine == "all" else 1 - sft.matched,
        grpo_steps=grpo.optimisation.steps,
        grpo_queries=grpo.queries,
        group=grpo.group,
        turns=grpo.turns,
        updates=grpo.updates,
        pack=grpo.pack_tokens,
        decoded_rows=grpo.rows,
        read_pack=grpo.pack_tokens,
        test_turns=evaluation.turns,
    )
    return replace(known, **changed)


def _parse(argv: Sequence[str]) -> Namespace:
    from vsr1.train.cost import GPUS

    parser = Parser(prog="vsr1 plan", description="What a recipe needs of memory and time, computed from its numbers.")
    parser.add_argument("--preset", choices=PRESETS, default="charades")
    parser.add_argument("--size", choices=SIZES, default="2b", help="of the policy (2b)")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100-80", help="(h100-80)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of that kind; each holds all weights (1)")
    parser.add_argument("--cores", type=int, default=16, metavar="N", help="processors that decode videos (16)")
    parser.add_argument("--published", action="store_true", help="the recipe with the public code's hyper-parameters")
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="adapters (0: all weights) instead of what the recipe trains"
    )
    parser.add_argument(
        "--pack", type=int, metavar="TOKENS", help="most tokens of a pass, of both stages, instead of its own"
    )
    parser.add_argument("--rows", type=int, metavar="N", help="replies spoken at once, instead of its own")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--policy", type=Path, metavar="FOLDER", help="read the policy's shape from its config.json")
    parser.add_argument("--embedder", type=Path, metavar="FOLDER", help="the same of the embedder")
    parser.add_argument("--explain", action="store_true", help="every item, and all that is assumed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here too")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help=f"put the table of all presets between {' and '.join(MARKS)}"
    )
    arguments = parser.parse_args(list(argv))
    for name, least in (("gpus", 1), ("cores", 1), ("lora", 0), ("pack", 1), ("rows", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name} must be at least {least}, got {value}")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise ConfigError(f"'{arguments.json}' cannot be written: there is no folder '{arguments.json.parent}'")
    return arguments


def _shapes(arguments: Namespace) -> tuple[ModelShape, ModelShape]:
    from vsr1.models.shape import SHAPES, ModelShape

    given = ((arguments.policy, arguments.size), (arguments.embedder, "embedding-2b"))
    policy, embedder = (SHAPES[name] if path is None else ModelShape.from_folder(path) for path, name in given)
    return policy, embedder


def _plan(arguments: Namespace) -> None:
    from vsr1.train.cost import GPUS
    from vsr1.train.estimate import estimate

    if arguments.write is not None:
        _write(arguments.write)
        return
    policy, embedder = _shapes(arguments)
    gpu = GPUS[arguments.gpu]
    changed: dict[str, Any] = {"gpus": arguments.gpus, "cores": arguments.cores, "dimension": embedder.text.hidden}
    if arguments.no_checkpointing:
        changed["checkpointing"] = False
    if arguments.lora is not None:
        changed["lora_rank"] = arguments.lora
    if arguments.pack is not None:
        changed |= {"pack": arguments.pack, "sft_pack": arguments.pack, "read_pack": arguments.pack}
    if arguments.rows is not None:
        changed["decoded_rows"] = arguments.rows
    name = _preset(arguments.preset, arguments.size)
    work = work_of(name, memory=_room(gpu), published=arguments.published, **changed)
    asked = estimate(policy, embedder, work, gpu)
    fitting = None if asked.fitting is None else estimate(policy, embedder, asked.fitting, gpu)
    _tables(arguments, asked, fitting)
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(_json(asked, fitting), indent=1))
        print(f"written: {arguments.json}")


def _tables(arguments: Namespace, asked: Plan, fitting: Plan | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console, gpus = Console(width=100), f"{asked.work.gpus} x " if asked.work.gpus > 1 else ""
    changed = fitting if fitting is not None and asked.changes else None
    name = arguments.policy or f"Qwen3-VL {arguments.size.upper()}"
    print(f"{arguments.preset}, {name}, {_trained(asked.work)}, on {gpus}{asked.gpu.title}; computed, not measured\n")
    memory = Table(box=None, pad_edge=False)
    memory.add_column("memory, GiB on each GPU", no_wrap=True)
    time = Table(box=None, pad_edge=False)
    time.add_column("time", no_wrap=True)
    for table in (memory, time):
        table.add_column("as asked", justify="right")
        if changed is not None:
            table.add_column("changed", justify="right")
    plans = [asked, *([changed] if changed is not None else [])]
    for phase in asked.memory:
        memory.add_row(phase, *(f"{plan.memory[phase] / GIB:.1f}" for plan in plans))
        if arguments.explain:
            for row in _items(phase, plans):
                memory.add_row(*row)
    for phase in asked.seconds:
        time.add_row(phase, *(_duration(plan.seconds[phase]) for plan in plans))
        if arguments.explain:
            for row in _spent(phase, plans):
                time.add_row(*row)
    time.add_row("all", *(_duration(plan.total) for plan in plans))
    console.print(memory)
    console.print()
    console.print(time)
    say(["", _verdict(asked, fitting)])
    if arguments.explain:
        say(["", *_assumptions(asked.work)])


def _items(phase: str, plans: Sequence[Plan]) -> Iterator[list[str]]:
    tables = [{item.name: item.bytes for item in plan.items if item.phase == phase} for plan in plans]
    for name in dict.fromkeys(name for table in tables for name in table):
        yield [f"  {name}", *(f"{table.get(name, 0.0) / GIB:.2f}" for table in tables)]


def _spent(phase: str, plans: Sequence[Plan]) -> Iterator[list[str]]:
    tables = [
        {one.name + (" (beside)" if one.beside else ""): one.seconds for one in plan.spent if one.phase == phase}
        for plan in plans
    ]
    for name in tables[0]:
        yield [f"  {name}", *(_duration(table[name]) for table in tables)]


def _trained(work: Work) -> str:
    return f"LoRA of rank {work.lora_rank}" if work.lora_rank else "all weights"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _verdict(asked: Plan, fitting: Plan | None) -> str:
    """Whether it fits, and what to do."""
    needs = f"{asked.peak / GIB:.1f} GiB of {asked.gpu.memory:.1f}"
    if asked.fits:
        return f"it fits: {needs}"
    if fitting is None:
        return f"it does not fit ({needs}), nor would it with {', '.join(asked.changes)}: take larger GPUs"
    return f"it does not fit ({needs}); with {', '.join(asked.changes)} it does: {fitting.peak / GIB:.1f} GiB"


def _assumptions(work: Work) -> list[str]:
    from vsr1.train import cost
    from vsr1.train.memory import CONTEXT, FRAGMENTED

    return [
        "measured on an H100 (bench/results): products reach "
        f"{cost.PRODUCTS:.0%} of the peak, attention {cost.ATTENTION:.0%}, sweeps over memory {cost.BANDWIDTH:.0%}; "
        f"a core takes {cost.DECODING * 1000:.1f} ms for a second of 480p H.264; the workspace of linear_logp",
        f"assumed: {cost.LAUNCH * 1000:.1f} ms to launch a layer from Python, forward; the same efficiencies on other GPUs; "
        f"{cost.LINKED:.0%} of the link between GPUs",
        f"assumed: {CONTEXT / GIB:.0f} GiB for CUDA, {FRAGMENTED:.0%} lost in the allocator; AdamW for all that learns",
        f"assumed: replies of {work.reply} tokens ({work.longest_reply} at most), prompts of {work.prompt} and the video's "
        f"{work.video.tokens} ({work.longest.tokens} at most), frames of {work.frame[0]} x {work.frame[1]}",
        f"assumed: {work.goes_on:.0%} of the loops go on after a turn; from the second turn on {work.shared:.0f} replies "
        "share a prompt; nothing is lost to padding; checkpoints and held-out looks take no time",
    ]


def _json(asked: Plan, fitting: Plan | None) -> dict[str, Any]:
    values = asdict(asked) | {"peak": asked.peak, "fits": asked.fits, "total": asked.total}
    values["fitting"] = None
    if fitting is not None:
        values["fitting"] = {"work": asdict(fitting.work), "memory": fitting.memory, "seconds": fitting.seconds}
    return values


def _preset(name: str, size: str) -> str:
    return name if size == SIZES[0] else f"{name}-{size}"


def _room(gpu: Gpu) -> int:
    """The GB of memory that recipes are made for, of this GPU."""
    from vsr1.presets import MEMORY

    return max(memory for memory in MEMORY if memory <= 1.1 * gpu.memory)


def markdown() -> str:
    """The table of all presets and sizes on some hardware: what trains, and what the recipe needs."""
    from vsr1.models.shape import SHAPES
    from vsr1.train.cost import GPUS
    from vsr1.train.estimate import estimate

    lines = [
        "| preset | GPUs | trains | GiB | index | SFT | GRPO | evaluation | to make it fit |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for preset, size, (name, gpus) in ((p, s, h) for p in PRESETS for s in SIZES for h in HARDWARE):
        gpu, recipe = GPUS[name], _preset(preset, size)
        work = work_of(recipe, memory=_room(gpu), gpus=gpus, cores=16 * gpus)
        plan = estimate(SHAPES[size], SHAPES["embedding-2b"], work, gpu)
        hardware = f"{gpus} x {gpu.title}" if gpus > 1 else gpu.title
        times = " | ".join(_duration(plan.seconds[phase]) for phase in ("index", "sft", "grpo", "eval"))
        changes = "" if plan.fits else ", ".join(plan.changes) + ("" if plan.fitting else ": not enough")
        lines.append(f"| `{recipe}` | {hardware} | {_trained(work)} | {plan.peak / GIB:.1f} | {times} | {changes} |")
    return "\n".join(lines)


def _write(path: Path) -> None:
    begin, end = MARKS
    try:
        whole = path.read_text()
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error}") from error
    if begin not in whole or end not in whole:
        raise ConfigError(f"'{path}' has no place for the table: {begin} and {end}")
    write_whole(path, f"{whole.split(begin)[0]}{begin}\n{markdown()}\n{end}{whole.split(end)[1]}")
    print(f"written: {path}")

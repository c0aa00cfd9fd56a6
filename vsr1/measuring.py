"""`vsr1 eval ROOT --policy P`: what a policy is worth on a data set, without any training: a released checkpoint, or one's own.

The policy goes through the loop on the test queries; the folder that is written is one of results, as `vsr1 eval` and
the report read them. `--compat public` sets the loop as the public code evaluates: a rejected video may be shown again, and
replies may have 1,024 tokens.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vsr1.command import Parser, guarded, no_bars
from vsr1.errors import ConfigError

GIVEN = "given"  # the name of the only stage in `eval.json`
PUBLIC_TOKENS = 1024


def main(argv: Sequence[str]) -> int:
    """`vsr1 eval ROOT --policy P`."""
    return guarded(lambda: _measure(_parse(argv)), kept="nothing was written")


def _parse(argv: Sequence[str]) -> Namespace:
    parser = Parser(prog="vsr1 eval", description="What a policy is worth on a data set, without any training.")
    parser.add_argument("root", type=Path, help="where the data set lies (docs/datasets.md)")
    parser.add_argument("--policy", required=True, help="a model folder, or a repository of the Hub")
    parser.add_argument(
        "--embedder", help="the one that made the vectors below ROOT (the policy's own query_embedder/)"
    )
    parser.add_argument("--preset", default="charades", help="whose splits: charades, didemo, activitynet (charades)")
    parser.add_argument("--run", type=Path, required=True, metavar="FOLDER", help="where results go; must be new")
    parser.add_argument("--protocol-from", default="", metavar="FILE", help="an SFT file, for its system turn")
    parser.add_argument("--compat", choices=("public",), help="loop and length of replies as in the public evaluation")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="of the loop (3)")
    parser.add_argument("--queries", type=int, default=0, metavar="N", help="the first N (0: all)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of a reply (512)")
    parser.add_argument(
        "--memory", type=int, default=80, metavar="GB", help="of the GPU: replies and prompts at once (80)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap resamples (0)")
    arguments = parser.parse_args(list(argv))
    for name, least in (("turns", 1), ("queries", 0), ("max_tokens", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.run.exists():
        raise ConfigError(f"'{arguments.run}' exists; choose another --run or delete it")
    return arguments


def _measure(arguments: Namespace) -> None:
    from rich.console import Console

    from vsr1 import config as configuration
    from vsr1 import presets
    from vsr1.agent import rollout
    from vsr1.agent.rollout import LoopSettings
    from vsr1.agent.speech import Sampling
    from vsr1.data.layout import dataset
    from vsr1.dataset_job import DatasetJob, need
    from vsr1.eval.report import write_report
    from vsr1.stages import device_of
    from vsr1.train.monitor import Terminal

    no_bars()
    recipe = presets.dataset(dataset(arguments.preset).name, "2b", memory=arguments.memory)
    recipe.root, recipe.run, recipe.policy = arguments.root, arguments.run, arguments.policy
    recipe.embedder = arguments.embedder or arguments.policy
    recipe.protocol_from, recipe.dtype, recipe.device = arguments.protocol_from, arguments.dtype, arguments.device
    configuration.check(recipe)
    need(recipe, training=False)
    public = arguments.compat == "public"
    most = arguments.max_tokens or (PUBLIC_TOKENS if public else recipe.evaluation.max_tokens)
    loop = LoopSettings(
        turns=arguments.turns, exclude=not public, fall_back=True, batch=128, sampling=Sampling(max_tokens=most)
    )
    device = device_of(recipe.device)
    terminal = Terminal(Console())
    job = DatasetJob(recipe, terminal, device)
    moments = job.moments("test")[: arguments.queries or None]
    embedder, policy = job.embedder(), job.given()
    shelf = job.shelf("test", embedder, policy)
    terminal.say(f"{len(moments)} queries, {len(shelf.video_ids)} videos")
    with terminal.phase("evaluate", len(moments)) as phase:
        speaker = recipe.evaluation.speaker()
        found = rollout.run(policy, embedder, shelf, moments, settings=loop, speaker=speaker, progress=phase.update)
    head = {
        **job.facts(),
        "compat": arguments.compat,
        "loop": asdict(loop),
        "queries": len(moments),
        "corpus_size": len(shelf.video_ids),
    }
    _write(arguments, found, head)
    write_report(arguments.run, job.video_path)
    print(f"report: {arguments.run / 'report.html'}")


def _write(arguments: Namespace, found: Sequence[Any], head: dict[str, Any]) -> None:
    from vsr1.eval import calibration, exchange, metrics, outcomes, public

    table = outcomes.of(found)
    figures = metrics.summary(table, arguments.turns, seed=arguments.seed)
    figures["public"] = public.result(table, arguments.turns)
    figures["calibration"] = calibration.errors(found)
    arguments.run.mkdir(parents=True)
    exchange.write_results(arguments.run, found, {**head, GIVEN: figures})

"""The house rules that a reader relies on: floors, file sizes, and a cheap `import vsr1`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vsr1"
KERNELS = ROOT / "kernels"
LONGEST = 500

FLOORS = {
    "records": 0,
    "errors": 0,
    "files": 0,
    "kernels": 0,
    "ops": 1,
    "corpus": 2,
    "video": 2,
    "models": 3,
    "agent": 4,
    "data": 4,
    "ingest": 4,
    "train": 5,
    "eval": 5,
}
# The top floor is one room: the modules people start, and what they share.
COMMANDS = {
    "cli",
    "command",
    "indexing",
    "evaluating",
    "ablating",
    "measuring",
    "datasets",
    "planning",
    "importing",
    "building",
}
RUNS = {"config", "presets", "stages", "job", "world_job", "dataset_job", "engine"}
TOP = COMMANDS | RUNS | {"serve", "doctor", "__main__", "__init__"}


def floor_and_room(module: str) -> tuple[int, str]:
    """Floor and room of a dotted name below `vsr1`; `""` is the package itself."""
    parts = module.split(".") if module else ["__init__"]
    if parts[0] in TOP or parts[-1] == "__main__":
        return 6, "top"
    if parts[0] in FLOORS:
        return FLOORS[parts[0]], parts[0]
    if parts[0].startswith("_"):
        return 0, parts[0]  # a compiled extension
    if len(parts) == 1 and not (PACKAGE / parts[0]).exists() and not (PACKAGE / f"{parts[0]}.py").exists():
        return 6, "top"  # a public name of the package, such as Engine, which only the top can serve
    raise LookupError(f"vsr1.{module} is on no floor: add it to FLOORS or TOP")


def imported_names(source: str, package: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, in functions and under TYPE_CHECKING too; relative ones made absolute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from vsr1 import ops` names a room, `from vsr1.ops import x` is in one already
            found += [(node.lineno, f"{base}.{alias.name}" if base == "vsr1" else base) for alias in node.names]
    return found


def broken_rules(module: str, source: str, is_package: bool) -> list[str]:
    """What a module below `vsr1` imports against the floors, one sentence each."""
    floor, room = floor_and_room(module)
    dotted = f"vsr1.{module}" if module else "vsr1"
    package = dotted if is_package else dotted.rpartition(".")[0]
    broken = []
    for line, name in imported_names(source, package):
        if name.split(".")[0] != "vsr1" or name == "vsr1.__version__":
            continue
        target_floor, target_room = floor_and_room(name.removeprefix("vsr1").removeprefix("."))
        if target_room != room and target_floor >= floor:
            broken.append(f"{dotted}:{line} (floor {floor}) imports {name} (floor {target_floor})")
    return broken


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def test_every_module_imports_only_from_floors_below() -> None:
    broken = [
        rule for name, path in modules() for rule in broken_rules(name, path.read_text(), path.stem == "__init__")
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("ops.patches", "from vsr1.errors import Vsr1Error", 0),
        ("ops.patches", "from vsr1.kernels import patches", 0),
        ("ops.patches", "from vsr1.corpus import Corpus", 1),
        ("corpus.store", "def late():\n    from vsr1.video import decode", 1),
        ("corpus.store", "from vsr1.corpus.segments import Segment\nfrom .catalogue import connect", 0),
        ("train.sft", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vsr1.eval.metrics", 1),
        ("eval.report", "from vsr1 import video, train", 1),
        ("eval.report", "from ..train import sft", 1),
        ("eval.report", "from vsr1 import __version__", 0),
        ("eval.report", "from vsr1 import Engine", 1),
        ("eval.report", "from vsr1.config import Config", 1),
        ("eval.__main__", "from vsr1.config import Config\nfrom vsr1.train import sft", 0),
        ("serve.http", "from vsr1.engine import Engine\nimport torch", 0),
        ("records", "from vsr1 import errors", 1),
    ],
)
def test_the_floor_rule_itself(module: str, source: str, count: int) -> None:
    assert len(broken_rules(module, source, is_package=False)) == count


def test_kernels_import_triton_torch_and_each_other_only() -> None:
    allowed = {"__future__", "triton", "torch", *sys.stdlib_module_names}
    broken = [
        f"{path.name}:{line} imports {name or '(relative)'}"
        for path in sorted(KERNELS.rglob("*.py"))
        for line, name in imported_names(path.read_text(), "")
        if name.split(".")[0] not in allowed and not name.startswith("vsr1.kernels.")
    ]
    assert not broken, "\n".join(broken)


def test_no_file_is_too_long() -> None:
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp"}
    long = [
        f"{path.relative_to(ROOT)}: {count} lines"
        for folder in ("vsr1", "kernels", "csrc", "bench", "tests")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in kinds and (count := len(path.read_text().splitlines())) > LONGEST
    ]
    assert not long, "\n".join(long)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "triton", "transformers", "numpy")
    code = f"import sys, vsr1; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

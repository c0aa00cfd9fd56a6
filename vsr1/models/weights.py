"""Tensors on disk: which files of a folder hold them, under which names and in which shapes, and how they are read.

A folder holds its weights in one file or in several with an index, as safetensors or as torch's own format: the four ways
transformers writes. All headers are read before any tensor, so that a folder is refused whole and at once; then tensors come
one at a time, each in memory of its own, so that loading needs the model and its largest tensor, and no file stays open
behind a model.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vsr1.errors import CheckpointError

Shape = tuple[int, ...]

# In the order transformers prefers them; an index stands beside the files it names.
_PLACES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class Stored:
    """One tensor on disk, and its name there."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype


def find(folder: Path) -> dict[str, Stored]:
    """Every tensor of the model in `folder`, by name; nothing is read but headers.

    CheckpointError if there are no weights, and, each with all names, if files or tensors that the index names are missing, or
    files cannot be read (a broken download, most often).
    """
    place = next((folder / name for name in _PLACES if (folder / name).is_file()), None)
    if place is None:
        raise CheckpointError(f"'{folder}' holds no weights: none of {', '.join(_PLACES)} is there")
    indexed: Mapping[str, str] = {}
    files = [place]
    if place.suffix == ".json":
        try:
            indexed = json.loads(place.read_text())["weight_map"]
            files = [folder / name for name in sorted(set(indexed.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{place}' is no index of weights ({error!r}): download it again") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of the {len(files)} files its index names: {', '.join(missing)}; "
                "download them again"
            )
    tensors = headers(files)
    if missing := sorted(indexed.keys() - tensors.keys()):
        raise CheckpointError(f"the files of '{folder}' lack what '{place.name}' names: {listed(missing)}")
    return tensors


def headers(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of these files. CheckpointError names every file that cannot be read, and every tensor of another kind."""
    tensors: dict[str, Stored] = {}
    broken: list[str] = []
    strange: dict[Path, list[str]] = {}
    for file in files:
        try:
            found = _safetensors_header(file) if file.suffix == ".safetensors" else _bin_header(file)
        except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            broken.append(
                f"{file} ({file.stat().st_size} bytes: {str(error).splitlines()[0] if str(error) else error!r})"
            )
            continue
        for name, (shape, dtype) in found.items():
            if dtype is None:
                strange.setdefault(file, []).append(name)
            else:
                tensors[name] = Stored(file, name, shape, dtype)
    if broken:
        raise CheckpointError(f"cannot read {'; '.join(broken)}: cut off or damaged? Download again")
    if strange:
        said = "; ".join(f"{file}: {listed(names)}" for file, names in strange.items())
        raise CheckpointError(
            f"tensors that are not floating-point: {said}; quantized weights are not read: give the model they were made from"
        )
    return tensors


def _safetensors_header(file: Path) -> dict[str, tuple[Shape, torch.dtype | None]]:
    with safe_open(file, "pt") as opened:
        names = opened.keys()
        slices = {name: opened.get_slice(name) for name in names}
        return {name: (tuple(part.get_shape()), _DTYPES.get(part.get_dtype())) for name, part in slices.items()}


def _bin_header(file: Path) -> dict[str, tuple[Shape, torch.dtype | None]]:
    found = _load_bin(file)
    return {
        name: (tuple(tensor.shape), tensor.dtype if tensor.is_floating_point() else None)
        for name, tensor in found.items()
    }


def _load_bin(file: Path) -> dict[str, Tensor]:
    """torch's format: tensors stay on disk where its zip form allows, and no code in the file is run."""
    found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("not a plain dictionary of tensors")
    return found


def read(tensors: Mapping[str, Stored], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in memory of its own, as `dtype` or as it is stored."""
    for name, tensor in _stored(tensors):
        yield name, torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)


def _stored(tensors: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for name, stored in tensors.items():
        by_file.setdefault(stored.file, []).append((name, stored.name))
    for file, names in by_file.items():
        if file.suffix == ".safetensors":
            for name, there in names:
                # opened anew for each: pages of the file that were read count as memory for as long as it is open
                with safe_open(file, "pt") as opened:
                    yield name, opened.get_tensor(there)
        else:
            found = _load_bin(file)
            yield from ((name, found[there]) for name, there in names)


def compare(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], owner: str, hint: Callable[[str], str] = lambda name: ""
) -> None:
    """CheckpointError if `found` lacks tensors, has others, or has some in other shapes; it lists all of them.

    owner: what the tensors are of, as a message begins; hint(name): what to add about a tensor of another shape.
    """
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing ({len(missing)}): {listed(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        problems.append(f"unknown ({len(unknown)}): {listed(unknown)}")
    wrong = [name for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    if wrong:
        groups: dict[str, list[str]] = {}
        for name in wrong:
            groups.setdefault(f" is {found[name]}, not {expected[name]}{hint(name)}", []).append(name)
        shapes = "; ".join(f"{listed(names)}{difference}" for difference, names in groups.items())
        problems.append(f"of another shape ({len(wrong)}): {shapes}")
    if problems:
        raise CheckpointError(f"{owner}: " + "\n  ".join(["the weights do not fit", *problems]))


def listed(names: Iterable[str]) -> str:
    """All of the names, those that differ in their first number only as one: `layers.{0-27}.mlp.up_proj.weight`."""
    numbers: dict[tuple[str, str], list[int]] = {}
    plain: dict[str, None] = {}
    for name in names:
        if match := re.fullmatch(r"(.*?\.)(\d+)(\..*)", name):
            numbers.setdefault((match[1], match[3]), []).append(int(match[2]))
        else:
            plain[name] = None
    return ", ".join([*plain, *(f"{before}{_ranges(found)}{after}" for (before, after), found in numbers.items())])


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return "{" + ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans) + "}"

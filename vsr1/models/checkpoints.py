"""Model folders: the house's own layout and the published one (VideoSearch-R1), read and written.

The published layout keeps the refine modules among the model's weights and the frozen embedder in `query_embedder/`. Ours keeps
them in `refine.safetensors`, which the index beside `model.safetensors` does not name, so that transformers and vLLM find a
plain Qwen3-VL; `vsr1.json` says what the policy was trained with. Either is recognised by what it holds. A folder is checked
whole, names and shapes, before a tensor is read: what does not fit is refused, with all that does not.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from vsr1.errors import CheckpointError
from vsr1.models import weights
from vsr1.models.refine import RefineHead
from vsr1.models.vision import VideoSettings
from vsr1.models.weights import Shape, Stored

Layout = Literal["vsr1", "public"]

REFINE_FILE, SETTINGS_FILE, EMBEDDER_FOLDER = "refine.safetensors", "vsr1.json", "query_embedder"
INDEX_FILE, HEAD_FILE = "model.safetensors.index.json", "head.safetensors"

# What the published recipe sampled and showed: 1 frame a second, at most 64, of 128 to 256 squares of 28 pixels.
PUBLIC_VIDEO = VideoSettings(fps=1.0, max_frames=64, min_pixels=128 * 28 * 28, max_pixels=256 * 28 * 28)
# First soft token before the last norm; a gate lies in every file, but the recipes train and evaluate without it.
PUBLIC_POLICY = {"first_latent": "unnormed", "gate": False}

# The published code puts soft tokens this many tokens before the end of the embedder's sequence.
PUBLIC_EMBEDDER = {"soft_tail": 6}

_SIZES = {2048: "2B", 2560: "4B", 4096: "8B", 5120: "32B"}
_REFINE = re.compile(r"(refine_projector|refine_gate|refine_(?:latent|append)_input_projector|query_embedder_head)\..+")
_DOWNLOADED = ["*.json", "*.safetensors", "*.bin", "*.txt", "*.jinja"]
_NOT_DOWNLOADED = ["_vllm_compat/*", "checkpoint-*", "*optimizer*", "*training_args*"]


@dataclass(frozen=True)
class Contents:
    """What a folder holds. model: the Qwen3-VL's tensors by the names of `canonical`; refine: those of the refine modules by
    their public names; saved: what `vsr1.json` says; public: the refine modules lie among the model's weights."""

    folder: Path
    config: Any
    model: dict[str, Stored]
    refine: dict[str, Stored]
    saved: dict[str, Any]
    public: bool

    @property
    def width(self) -> int:
        return int(self.config.text_config.hidden_size)


def locate(path: str | Path) -> Path:
    """The folder `path`, or the local copy of the Hub repository of that name. CheckpointError if there is neither."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(path), allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED))
    except (HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"'{path}' is no folder, and no model that the Hub gives ({reason})") from error


def canonical(name: str) -> str:
    """A tensor's name within a `Qwen3VLModel`, from any that transformers has written; the output matrix is `lm_head.weight`."""
    if match := re.fullmatch(r"(?:model\.)?((?:visual|language_model)\..+)", name):
        return match[1]
    if match := re.fullmatch(r"model\.((?:layers|embed_tokens|norm)\..+)", name):
        return f"language_model.{match[1]}"
    return name


def named(width: int) -> str:
    """A width as people know it: `2048 (as Qwen3-VL 2B)`."""
    return f"{width} (as Qwen3-VL {_SIZES[width]})" if width in _SIZES else str(width)


def examine(path: str | Path) -> Contents:
    """Read everything of a folder but its tensors. CheckpointError names what is missing or broken."""
    folder = locate(path)
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(_adapter(folder))
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' holds no model: config.json is not there")
    saved = _json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    kind = _json(folder / "config.json").get("model_type")
    if kind != "qwen3_vl":
        raise CheckpointError(f"'{folder}' holds a model of type '{kind}'; only Qwen3-VL (qwen3_vl) is known here")
    config = AutoConfig.from_pretrained(str(folder))
    found = weights.find(folder)
    if (folder / EMBEDDER_FOLDER).is_dir():
        # an embedder that was trained along lies in both places
        found = {name: stored for name, stored in found.items() if not name.startswith("query_embedder_model.")}
    refine = {name: stored for name, stored in found.items() if _REFINE.fullmatch(name)}
    model: dict[str, Stored] = {}
    twice = []
    for name in found:
        if name not in refine:
            twice += [name] if canonical(name) in model else []
            model[canonical(name)] = found[name]
    if twice:
        raise CheckpointError(f"'{folder}' holds tensors under two names each: {weights.listed(sorted(twice))}")
    public = bool(refine)
    if (folder / REFINE_FILE).is_file():
        if public:
            raise CheckpointError(
                f"'{folder}' holds the refine modules in {REFINE_FILE} and among the weights: remove one of the two"
            )
        refine = weights.headers([folder / REFINE_FILE])
    return Contents(folder, config, model, refine, saved, public)


def examine_embedder(path: str | Path) -> tuple[Contents, dict[str, Stored]]:
    """As `examine`, for an embedder's folder or a policy's that holds one in `query_embedder/`; and its head's tensors."""
    folder = locate(path)
    head: dict[str, Stored] = {}
    inner, saved = folder, {}
    if (folder / EMBEDDER_FOLDER).is_dir():
        inner, outer = folder / EMBEDDER_FOLDER, examine(folder)
        saved = PUBLIC_EMBEDDER if outer.public else {}
        refine = outer.refine
        head = {part: refine[name] for name in refine if (part := name.removeprefix("query_embedder_head.")) != name}
    contents = examine(inner)
    contents = replace(contents, saved=saved | contents.saved)
    if contents.refine:
        raise CheckpointError(
            f"'{folder}' holds a policy and no {EMBEDDER_FOLDER}/: give the folder of its embedder, Qwen3-VL-Embedding for one"
        )
    if (inner / HEAD_FILE).is_file():
        head = weights.headers([inner / HEAD_FILE])
    return contents, head


def _json(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"'{file}' is no JSON ({error}): download it again") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"'{file}' holds {type(said).__name__}, not an object")
    return said


def _adapter(folder: Path) -> str:
    base = _json(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f"'{folder}' holds adapters (LoRA) of '{base}', not a model: merge them first, "
        f"PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained('{base}'), '{folder}')"
        ".merge_and_unload().save_pretrained('merged'), and give that folder with the tokenizer of this one"
    )


def load_model(contents: Contents, kind: Any, dtype: torch.dtype | None = None) -> Any:
    """The folder's model as `kind`, a Qwen3VLForConditionalGeneration or a Qwen3VLModel (which has no output matrix).

    dtype: of all its weights; by default that in which the token embeddings are stored. Needs memory for the weights and the
    largest of them once more. CheckpointError lists every tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        skeleton = kind(contents.config).state_dict()
    names = {canonical(name): name for name in skeleton}
    expected = {name: tuple(skeleton[full].shape) for name, full in names.items()}
    found = dict(contents.model)
    if "lm_head.weight" not in expected:
        found.pop("lm_head.weight", None)
    elif contents.config.tie_word_embeddings:
        _check_tied(contents)
        found.pop("lm_head.weight", None)
        del expected["lm_head.weight"]
    table = found.get("language_model.embed_tokens.weight")
    owner = f"'{contents.folder}'"
    if table is not None and table.shape[-1] != contents.width:
        owner += f" is of width {named(table.shape[-1])}, but its config.json says {named(contents.width)}"
    weights.compare({name: stored.shape for name, stored in found.items()}, expected, owner)
    assert table is not None
    dtype = dtype or table.dtype
    state = {names[name]: tensor for name, tensor in weights.read(found, dtype)}
    model = kind.from_pretrained(None, config=contents.config, state_dict=state, dtype=dtype).eval()
    if getattr(model, "generation_config", None) is not None and (contents.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(contents.folder))
    return model


def _check_tied(contents: Contents) -> None:
    pair = [contents.model.get(name) for name in ("lm_head.weight", "language_model.embed_tokens.weight")]
    both = {str(number): stored for number, stored in enumerate(pair) if stored is not None}
    if len(both) == 2 and not torch.equal(*(tensor for _, tensor in weights.read(both))):
        raise CheckpointError(
            f"'{contents.folder}' holds an output matrix (lm_head.weight) that is not its embeddings, but its config.json says "
            "tie_word_embeddings: true; set that to false if the matrix was trained"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer. CheckpointError if it holds none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"'{folder}' holds no tokenizer: neither tokenizer.json nor vocab.json is there")
    return AutoTokenizer.from_pretrained(str(folder))


def refine_sizes(contents: Contents) -> dict[str, int]:
    """Width of the soft tokens and of the embedder's input, as far as the refine modules' shapes say."""
    sizes = {"soft_size": "refine_projector.0.weight", "embedder_size": "refine_append_input_projector.1.weight"}
    return {name: contents.refine[tensor].shape[0] for name, tensor in sizes.items() if tensor in contents.refine}


def load_head(
    contents: Contents, soft_size: int, embedder_size: int, gate: bool
) -> tuple[RefineHead, dict[str, Tensor]]:
    """The refine head of a folder, in the precision it is stored in, and the tensors that belong to it but are not used: a gate
    where `gate` is False, the embedder's head. CheckpointError as `load_model`."""
    with torch.device("meta"):
        head = RefineHead(contents.width, soft_size, embedder_size, gate=gate)
    expected = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    unused = () if gate else ("refine_gate.",)
    kept = {name for name in contents.refine if name.startswith(("query_embedder_head.", *unused))}
    used = {name: stored for name, stored in contents.refine.items() if name not in kept}
    found = {name: stored.shape for name, stored in used.items()}
    owner = f"refine modules of '{contents.folder}' for a policy of width {named(contents.width)}"
    weights.compare(found, expected, owner, lambda name: _policy_width(name, found[name]))
    head.load_state_dict(dict(weights.read(used)), assign=True)
    return head, dict(weights.read({name: contents.refine[name] for name in kept}))


def _policy_width(name: str, shape: Shape) -> str:
    """For tensors of the refine modules that read or write the policy's hidden state: of which width it was."""
    axis = {"refine_projector.0.weight": 1, "refine_gate.weight": 1, "refine_latent_input_projector.1.weight": 0}.get(
        name
    )
    return f", made for a policy of width {named(shape[axis])}" if axis is not None and len(shape) == 2 else ""


def load_embedder_head(stored: Mapping[str, Stored], width: int, owner: str) -> nn.Module | None:
    """The map from an embedder's width to that of its vectors, if there is one. CheckpointError as `load_model`."""
    if not stored:
        return None
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    size = shapes["weight"][0] if "weight" in shapes else width
    expected: dict[str, Shape] = {"weight": (size, width)} | ({"bias": (size,)} if "bias" in shapes else {})
    weights.compare(shapes, expected, f"head of {owner} of width {named(width)}")
    with torch.device("meta"):
        head = nn.Linear(width, size, bias="bias" in expected)
    head.load_state_dict(dict(weights.read(stored)), assign=True)
    return head


def settings_from(kind: type[Any], said: Mapping[str, Any], folder: Path) -> Any:
    """A settings dataclass from what a `vsr1.json` says of it. CheckpointError lists the keys it does not know."""
    unknown = sorted(said.keys() - {field.name for field in fields(kind)})
    if unknown:
        raise CheckpointError(
            f"'{folder / SETTINGS_FILE}' sets {', '.join(unknown)}, which {kind.__name__} does not know: "
            "was it written by a newer version?"
        )
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()})


def _clear(folder: Path) -> None:
    """Make the folder, and remove the weights of an earlier save, which might be read for the new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("model.safetensors*", "model-*-of-*.safetensors", "pytorch_model*", REFINE_FILE, HEAD_FILE):
        for file in folder.glob(pattern):
            file.unlink()


def save_plain(model: Any, tokenizer: PreTrainedTokenizerBase, video: VideoSettings, folder: Path) -> None:
    """Write what transformers and vLLM load: model, index, tokenizer, and how images and videos are cut."""
    _clear(folder)
    model.save_pretrained(folder)
    files = sorted(folder.glob("model-*-of-*.safetensors")) or [folder / "model.safetensors"]
    tensors = weights.headers(files)
    _write_index(folder, tensors)
    tokenizer.save_pretrained(folder)
    _save_processors(model.config.vision_config, video, folder)


def _write_index(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """vLLM reads every safetensors file of a folder, unless an index says which are the model's."""
    size = sum(torch.Size(stored.shape).numel() * stored.dtype.itemsize for stored in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: stored.file.name for name, stored in tensors.items()},
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))


def save_public(
    model: Any,
    extra: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    video: VideoSettings,
    folder: Path,
    shard_size: int | str = "5GB",
) -> None:
    """Write the published layout: a Qwen3VLForConditionalGeneration's tensors, with `extra` among them.

    A `Qwen3VLModel` is written as one, without an output matrix.
    """
    _clear(folder)
    inner = model if not hasattr(model, "lm_head") else model.model
    state = {f"model.{name}": tensor.detach() for name, tensor in inner.state_dict().items()}
    config = copy.deepcopy(model.config)
    if inner is not model and not config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.detach()
    save_torch_state_dict(state | dict(extra), folder, max_shard_size=shard_size)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.dtype = inner.dtype
    config.save_pretrained(folder)
    # the published code runs on transformers 4, which knows the rotary settings under other names
    said = json.loads((folder / "config.json").read_text())
    rope = dict(said["text_config"]["rope_parameters"])
    said["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(said, indent=2))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _save_processors(config.vision_config, video, folder)


def save_settings(folder: Path, **said: Any) -> None:
    """Write `vsr1.json`: the settings of the parts, by name."""
    (folder / SETTINGS_FILE).write_text(json.dumps(said, indent=1))


def save_refine(head: nn.Module, kept: Mapping[str, Tensor], folder: Path) -> None:
    """Write the refine modules, and the tensors kept with them, into a file of their own."""
    state = {name: tensor.contiguous() for name, tensor in (head.state_dict() | dict(kept)).items()}
    save_file(state, folder / REFINE_FILE, {"format": "pt"})


def _save_processors(vision: Any, video: VideoSettings, folder: Path) -> None:
    images = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "size": {"shortest_edge": video.min_pixels, "longest_edge": video.max_pixels},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    for name, kind in (("preprocessor", "image_processor_type"), ("video_preprocessor", "video_processor_type")):
        processor = "Qwen2VLImageProcessor" if name == "preprocessor" else "Qwen3VLVideoProcessor"
        (folder / f"{name}_config.json").write_text(json.dumps({kind: processor} | images, indent=1))

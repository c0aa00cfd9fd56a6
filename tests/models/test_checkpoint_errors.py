"""Model folders that are refused: each error names the folder, everything that is wrong with it, and the way out."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.models import public_layout
from tests.models.public_layout import Public
from tests.models.test_policy import without_refine
from vsr1.errors import CheckpointError
from vsr1.models import checkpoints, weights
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy

State = dict[str, Tensor]
PROJECTOR = "refine_latent_input_projector.1.weight"
MATRIX = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("published") / "policy"
    return folder, public_layout.write(folder, tokenizer)


@pytest.fixture
def folder(source: tuple[Path, State], tmp_path: Path) -> Path:
    return Path(shutil.copytree(source[0], tmp_path / "published"))


def change(state: State, **tensors: Tensor | None) -> State:
    """The tensors with some replaced, or left out where None; `__` in a name stands for a dot."""
    changed: dict[str, Tensor | None] = state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in changed.items() if tensor is not None}


def edit(file: Path, **said: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | said))


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        pytest.param(
            lambda state: {
                name: tensor
                for name, tensor in state.items()
                if "mlp.up_proj" not in name and not name.startswith("model.visual.merger.norm")
            },
            [
                "missing (4): visual.merger.norm.bias, visual.merger.norm.weight, "
                "language_model.layers.{0-1}.mlp.up_proj.weight",
            ],
            id="missing",
        ),
        pytest.param(
            lambda state: change(state, model__language_model__layers__9__x=torch.ones(1), stray=torch.ones(2)),
            ["unknown (2): stray, language_model.layers.9.x"],
            id="unknown",
        ),
        pytest.param(
            lambda state: (
                change(state, stray=torch.ones(1))
                | {MATRIX: torch.ones(3, 96), "model.visual.pos_embed.weight": torch.ones(2)}
            ),
            [
                "unknown (1): stray",
                "of another shape (2): language_model.layers.1.mlp.up_proj.weight is (3, 96), not (80, 96); "
                "visual.pos_embed.weight is (2,), not (64, 32)",
            ],
            id="shapes",
        ),
        pytest.param(
            lambda state: change(
                state,
                refine_projector__3__bias=None,
                refine_append_input_projector__0__weight=None,
                refine_projector__9__x=torch.ones(1),
            ),
            [
                "refine modules of",
                "missing (2): refine_append_input_projector.0.weight, refine_projector.3.bias",
                "unknown (1): refine_projector.9.x",
            ],
            id="refine-modules",
        ),
        pytest.param(
            lambda state: state | {PROJECTOR: torch.ones(64, 64), PROJECTOR.replace("weight", "bias"): torch.ones(64)},
            [
                "for a policy of width 96",
                f"{PROJECTOR} is (64, 64), not (96, 64), made for a policy of width 64",
                "refine_latent_input_projector.1.bias is (64,), not (96,)",
            ],
            id="refine-modules-of-another-width",
        ),
        pytest.param(
            lambda state: change(state, visual__pos_embed__weight=state["model.visual.pos_embed.weight"].clone()),
            ["two names each: visual.pos_embed.weight"],
            id="twice",
        ),
        pytest.param(
            lambda state: change(state, a=torch.ones(1, dtype=torch.int8), b=torch.ones(1, dtype=torch.int8)),
            ["model.safetensors: a, b;", "quantized"],
            id="quantized",
        ),
        pytest.param(
            lambda state: change(
                state, lm_head__weight=torch.ones_like(state["model.language_model.embed_tokens.weight"])
            ),
            ["lm_head.weight", "tie_word_embeddings: true"],
            id="tied-to-other-values",
        ),
    ],
)
def test_weights_that_do_not_fit(
    source: tuple[Path, State], folder: Path, broken: Callable[[State], State], words: list[str]
) -> None:
    public_layout.save(folder, broken(source[1]))
    with pytest.raises(CheckpointError) as caught:
        Policy.from_pretrained(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value


def test_a_tied_matrix_that_is_written_again_is_the_embeddings(source: tuple[Path, State], folder: Path) -> None:
    table = source[1]["model.language_model.embed_tokens.weight"]
    public_layout.save(folder, change(source[1], lm_head__weight=table.clone()))
    assert torch.equal(Policy.from_pretrained(folder).model.lm_head.weight, table)


def test_an_embedder_trained_along_lies_in_its_own_folder(source: tuple[Path, State], folder: Path) -> None:
    public_layout.save(folder, change(source[1], query_embedder_model__model__x=torch.ones(1)))
    assert Policy.from_pretrained(folder).kept.keys() == {"refine_gate.weight", "refine_gate.bias"}
    shutil.rmtree(folder / "query_embedder")
    with pytest.raises(CheckpointError, match=r"unknown \(1\): query_embedder_model.model.x"):
        Policy.from_pretrained(folder)


def test_widths_are_named_as_the_models_people_know(source: tuple[Path, State], folder: Path) -> None:
    assert [checkpoints.named(width) for width in (2048, 2560, 96)] == [
        "2048 (as Qwen3-VL 2B)",
        "2560 (as Qwen3-VL 4B)",
        "96",
    ]
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = config["vision_config"]["out_hidden_size"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    plain = {name: tensor for name, tensor in source[1].items() if not name.startswith("refine_")}
    public_layout.save(folder, plain)
    with pytest.raises(CheckpointError) as caught:
        Policy.from_pretrained(folder)
    assert "is of width 96, but its config.json says 2048 (as Qwen3-VL 2B)" in str(caught.value)
    assert "language_model.layers.{0-1}.mlp.up_proj.weight is (80, 96), not (80, 2048)" in str(caught.value)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_missing_and_broken_files_are_all_named(source: tuple[Path, State], folder: Path, kind: str) -> None:
    public_layout.save(folder, source[1], Public(files=4, kind=kind))  # type: ignore[arg-type]
    (folder / "model.safetensors").unlink()
    files = sorted(folder.glob(f"*-of-*.{kind}"))
    whole = [file.read_bytes() for file in files]
    for file, content in zip(files[1:3], whole[1:3], strict=True):
        file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cut off or damaged") as caught:
        Policy.from_pretrained(folder)
    assert [file.name in str(caught.value) for file in files] == [False, True, True, False]
    for file in files[1:3]:
        file.unlink()
    with pytest.raises(CheckpointError, match="lacks 2 of the 4 files") as caught:
        Policy.from_pretrained(folder)
    assert [file.name in str(caught.value) for file in files] == [False, True, True, False]
    for file, content in zip(files, whole, strict=True):
        file.write_bytes(content)
    index = next(folder.glob("*.index.json"))
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"lost": files[0].name, "gone": files[1].name})
    with pytest.raises(CheckpointError, match=f"lack what '{index.name}' names: gone, lost"):
        Policy.from_pretrained(folder)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="no index of weights"):
        Policy.from_pretrained(folder)


class Harm:
    """Would write a file when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        return open, (str(self.file), "w")


def test_a_bin_file_runs_no_code(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Harm(tmp_path / "harm")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Policy.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": 1}))
    with warnings.catch_warnings(action="ignore"), pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Policy.from_pretrained(folder)  # torch warns of the protocol before it finds what it may not load
    torch.save({"state": {"x": torch.ones(1)}}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain dictionary of tensors"):
        Policy.from_pretrained(folder)
    assert not (tmp_path / "harm").exists()


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct"}')


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(_adapter, ["LoRA", "'Qwen/Qwen3-VL-2B-Instruct'", "merge_and_unload"], id="adapter"),
        pytest.param(
            lambda f: (f / "model.safetensors").unlink(), ["no weights", "pytorch_model.bin"], id="no-weights"
        ),
        pytest.param(lambda f: (f / "config.json").unlink(), ["config.json is not there"], id="no-config"),
        pytest.param(lambda f: (f / "config.json").write_text("[1]"), ["config.json", "list"], id="config-of-no-use"),
        pytest.param(lambda f: edit(f / "config.json", model_type="qwen2_5_vl"), ["'qwen2_5_vl'"], id="another-family"),
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer"], id="no-tokenizer"),
        pytest.param(
            lambda f: (f / "vsr1.json").write_text('{"policy": {"soft_tokens": 4, "b": 1, "a": 1}}'),
            ["vsr1.json", "sets a, b", "PolicySettings"],
            id="unknown-settings",
        ),
        pytest.param(
            lambda f: shutil.copy(f / "model.safetensors", f / "refine.safetensors"), ["remove one"], id="both-layouts"
        ),
    ],
)
def test_folders_that_are_no_policy(folder: Path, spoil: Callable[[Path], object], words: list[str]) -> None:
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        Policy.from_pretrained(folder)
    assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value


def test_refine_modules_without_their_token(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    without_refine(tokenizer).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="does not know <REFINE>"):
        Policy.from_pretrained(folder)


def test_a_policy_without_its_embedder_is_no_embedder(folder: Path) -> None:
    shutil.rmtree(folder / "query_embedder")
    with pytest.raises(CheckpointError, match="holds a policy and no query_embedder/"):
        Embedder.from_pretrained(folder)


def test_a_head_of_another_embedder(folder: Path, source: tuple[Path, State]) -> None:
    head = {"query_embedder_head.weight": torch.ones(64, 48), "query_embedder_head.scale": torch.ones(1)}
    public_layout.save(folder, source[1] | head)
    with pytest.raises(CheckpointError, match=r"unknown \(1\): scale\n.*weight is \(64, 48\), not \(64, 64\)"):
        Embedder.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder/here", "somebody/nothing"])
def test_a_name_that_nothing_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"'{name}' is no folder"):
        Policy.from_pretrained(name)


def test_names_are_listed_in_short() -> None:
    names = [f"a.{number}.b" for number in (0, 1, 2, 5, 7, 8)] + ["c", "a.3.d", "e.0.f.1.g", "e.1.f.1.g"]
    assert weights.listed(names) == "c, a.{0-2,5,7-8}.b, a.3.d, e.{0-1}.f.1.g"

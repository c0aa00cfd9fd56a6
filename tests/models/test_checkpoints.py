"""Model folders in the published layout and in ours: loaded, told apart, written again without a changed bit, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from tests import fixtures
from tests.models import public_layout
from tests.models.public_layout import Public
from vsr1.agent import protocol
from vsr1.errors import CheckpointError
from vsr1.models import backbone, checkpoints
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.tokenizer import END_OF_TEXT, IM_END, IM_START, REFINE, SPECIAL_TOKENS, train_tokenizer
from vsr1.models.vision import VideoSettings

VIDEO = VideoSettings(1.0, 8, 4096, 4096)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One to which `assistant` is one token, as to Qwen's: five tokens follow the text of an embedder's input."""
    return train_tokenizer([*fixtures.TEXTS, "assistant", "a red circle"] * 2)


@pytest.fixture(scope="module")
def source(tokenizer, tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    """A published folder of one file, to be copied before it is changed; and its tensors."""
    folder = tmp_path_factory.mktemp("published") / "policy"
    return folder, public_layout.write(folder, tokenizer, Public(embedder=48))


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source[0], tmp_path / "published"))


@torch.no_grad()
def answers(policy: Policy, frames) -> list[Tensor]:
    """What a policy makes of a video: next-token logits, the first soft token and what it writes into both models' inputs."""
    (video,) = policy.videos.encode_frames([frames(4)])
    row = protocol.prompt(policy.tokenizer, "a small red circle", video, system="Is it there?")
    hidden, _ = backbone.run(policy.model.model, [row])
    soft = policy.head.refine_projector(hidden[0, -1].to(policy.head.dtype))
    return [policy.logits(hidden[0, -1]), soft, policy.head.policy_inputs(soft), policy.head.soft_tokens(soft)]


@torch.no_grad()
def vectors(embedder: Embedder, frames) -> Tensor:
    features = embedder.videos.encode_frames([frames(4)])
    soft = torch.linspace(-1, 1, 3 * embedder.model.config.text_config.hidden_size).view(1, 3, -1)
    return torch.cat(
        [embedder.embed_texts(["a circle"]), embedder.embed_texts(["a circle"], soft), embedder.embed_videos(features)]
    )


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of the model's safetensors files, read by safetensors alone."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def refine_state(policy: Policy) -> dict[str, Tensor]:
    return dict(policy.head.state_dict()) | policy.kept


@pytest.mark.parametrize(
    "public",
    [
        pytest.param(Public(), id="one-bf16-tied"),
        pytest.param(Public(files=3, dtype=torch.float32, gate=False), id="shards-fp32-no-gate"),
        pytest.param(Public(kind="bin", prefixes="old", tied=False, width=64), id="bin-old-names-untied-2B"),
        pytest.param(Public(kind="bin", files=2, embedder=None), id="bin-shards-no-embedder"),
        pytest.param(Public(files=2, prefixes="old", tied=False, embedder=48), id="shards-old-names-embedder-head"),
    ],
)
def test_a_published_folder_loads_bit_for_bit(tokenizer, tmp_path, public):
    state = public_layout.write(tmp_path / "public", tokenizer, public)
    policy = Policy.from_pretrained(tmp_path / "public")
    loaded = {checkpoints.canonical(name): tensor for name, tensor in policy.model.state_dict().items()}
    if public.tied:
        assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight
        del loaded["lm_head.weight"]
    model = {checkpoints.canonical(n): tensor for n, tensor in state.items() if not n.startswith(("refine_", "query_"))}
    refine = {name: tensor for name, tensor in state.items() if name.startswith(("refine_", "query_"))}
    assert same(loaded, model) and same(refine_state(policy), refine)
    assert all(parameter.requires_grad for parameter in policy.parameters()) and not policy.training
    settings = policy.settings
    assert (settings.soft_size, settings.embedder_size) == (public.soft, public.embedder or public.soft)
    assert settings.first_latent == "unnormed" and not settings.gate and settings.soft_tokens == 8
    assert policy.videos.settings == VideoSettings(1.0, 64, 128 * 28 * 28, 256 * 28 * 28)


def test_answers_are_those_of_the_written_model_through_both_layouts(source, frames, tmp_path):
    folder, _ = source
    first = Policy.from_pretrained(folder, video=VIDEO)
    stock = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    (video,) = first.videos.encode_frames([frames(4)])
    row = protocol.prompt(first.tokenizer, "a small red circle", video, system="Is it there?")
    ids = torch.tensor([row.token_ids])
    kinds = (ids == stock.config.video_token_id).long() * 2
    pixels, grid = first.videos.frames_to_rows(frames(4).pixels)
    with torch.no_grad():
        expected = stock(
            input_ids=ids, pixel_values_videos=pixels.bfloat16(), video_grid_thw=grid, mm_token_type_ids=kinds
        ).logits[0, -1]
    wanted = answers(first, frames)
    torch.testing.assert_close(wanted[0], expected.float(), atol=0.02, rtol=0.02)  # bfloat16, another order of sums
    first.save_pretrained(tmp_path / "ours")
    second = Policy.from_pretrained(tmp_path / "ours")
    second.save_pretrained(tmp_path / "public", layout="public")
    third = Policy.from_pretrained(tmp_path / "public")
    for policy in (second, third):
        assert policy.settings == first.settings and policy.videos.settings == VIDEO
        assert all(torch.equal(one, other) for one, other in zip(answers(policy, frames), wanted, strict=True))


@pytest.mark.parametrize("shard_size", ["5GB", 60_000])
def test_public_to_ours_to_public_changes_no_bit(source, tmp_path, shard_size):
    folder, state = source
    ours, back = tmp_path / "ours", tmp_path / "back"
    embedder = Embedder.from_pretrained(folder)
    Policy.from_pretrained(folder).save_pretrained(ours, embedder=embedder)
    embedder = Embedder.from_pretrained(ours)
    Policy.from_pretrained(ours).save_pretrained(back, layout="public", embedder=embedder, shard_size=shard_size)
    assert (len(list(back.glob("model-*-of-*"))) > 1) == (shard_size != "5GB")
    assert same(stored(back), state) and same(stored(back / "query_embedder"), stored(folder / "query_embedder"))
    assert not (back / "refine.safetensors").exists()
    for inner in (".", "query_embedder"):
        one, other = (json.loads((place / inner / "config.json").read_text()) for place in (folder, back))
        for old in ("rope_scaling", "rope_theta"):  # the names transformers 4 knows
            assert one["text_config"][old] == other["text_config"][old]
        assert one["architectures"] == other["architectures"] and one["dtype"] == other["dtype"] == "bfloat16"


def test_transformers_finds_a_plain_model_in_what_we_save(source, tmp_path, caplog, recwarn):
    policy = Policy.from_pretrained(source[0])
    policy.save_pretrained(tmp_path, embedder=Embedder.from_pretrained(source[0]))
    recwarn.clear()
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not any(report.values()) and not caplog.records and not list(recwarn)
    assert same(stock.state_dict(), policy.model.state_dict())
    # vLLM reads every safetensors file at the top of the folder, but for those that an index leaves out
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(tmp_path).keys()
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"model.safetensors", "refine.safetensors"}
    assert set(index["weight_map"].values()) == {"model.safetensors"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path).values())


def test_saving_again_leaves_nothing_of_before(source, tmp_path):
    policy = Policy.from_pretrained(source[0])
    policy.save_pretrained(tmp_path, layout="public", shard_size=60_000)
    policy.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"model.safetensors", "refine.safetensors"}
    policy.save_pretrained(tmp_path, layout="public")
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert Policy.from_pretrained(tmp_path).settings == policy.settings


def test_a_loaded_model_does_not_hang_on_its_files(copy):
    policy, kept = Policy.from_pretrained(copy), {}
    kept = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    file = copy / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(b"\0" * file.stat().st_size)
    assert same(dict(policy.state_dict()), kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_models_and_the_head_keeps_its_own(source, dtype):
    policy = Policy.from_pretrained(source[0], dtype=dtype)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {dtype}
    assert policy.head.dtype == torch.float32
    embedder = Embedder.from_pretrained(source[0], dtype=dtype)
    assert {parameter.dtype for parameter in embedder.model.parameters()} == {dtype}
    expected = source[1]["model.language_model.norm.weight"].to(dtype)
    assert torch.equal(policy.model.model.language_model.norm.weight, expected)


def test_a_gate_is_used_only_where_asked_for(source, copy, frames, tmp_path):
    folder, state = source
    assert Policy.from_pretrained(folder).head.refine_gate is None
    policy = Policy.from_pretrained(folder, settings={"gate": True, "system": "Is it there?"})
    assert (
        policy.settings.gate and policy.settings.system == "Is it there?" and policy.settings.first_latent == "unnormed"
    )
    assert torch.equal(policy.head.refine_gate.weight, state["refine_gate.weight"])
    assert policy.kept.keys() == {"query_embedder_head.weight", "query_embedder_head.bias"}
    policy.save_pretrained(tmp_path / "back", layout="public")
    assert same(stored(tmp_path / "back"), state) and Policy.from_pretrained(tmp_path / "back").settings.gate
    without = {name: tensor for name, tensor in state.items() if not name.startswith("refine_gate.")}
    public_layout.save(copy, without)
    assert not Policy.from_pretrained(copy).settings.gate
    with pytest.raises(CheckpointError, match=r"missing \(2\): refine_gate.bias, refine_gate.weight"):
        Policy.from_pretrained(copy, settings={"gate": True})


def test_the_embedder_of_a_published_policy(source, frames, tmp_path):
    folder, state = source
    embedder = Embedder.from_pretrained(folder, settings=VIDEO)
    assert embedder.dimension == 64 and embedder.model.config.text_config.hidden_size == 48
    assert torch.equal(embedder.query_embedder_head.weight, state["query_embedder_head.weight"])
    row, ids = embedder.text_row("a red circle", 2), embedder.text_row("a red circle").token_ids
    assert embedder.soft_tail == 6 and row.token_ids[row.soft_start + 2 :] == ids[-6:]  # of which 5 follow the text
    inner = Embedder.from_pretrained(folder / "query_embedder")
    row = inner.text_row("a red circle", 2)
    assert inner.soft_tail == 0 and row.token_ids[row.soft_start + 2 :] == ids[-5:]
    assert inner.dimension == 48 and isinstance(inner.query_embedder_head, torch.nn.Identity)
    wanted = vectors(embedder, frames)
    Policy.from_pretrained(folder).save_pretrained(tmp_path / "ours", embedder=embedder)
    again = Embedder.from_pretrained(tmp_path / "ours")
    assert torch.equal(vectors(again, frames), wanted) and again.identity == embedder.identity
    assert again.videos.settings == VIDEO and again.soft_tail == 6


@pytest.mark.parametrize("ending", [(), (END_OF_TEXT,)])
def test_an_embedding_checkpoint_is_read_at_the_last_token_its_tokenizer_writes(tokenizer, tmp_path, ending):
    ending_ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ending]
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    if ending:
        backend.post_processor = TemplateProcessing(single=["$A", *ending], special_tokens=ending_ids)
    own = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[*SPECIAL_TOKENS[1:], REFINE],
    )
    public = Public(dtype=torch.float32)
    torch.manual_seed(0)
    state = public_layout.write_model(tmp_path / "e", own, public_layout.small_config(own, 64), public)
    public_layout.save(tmp_path / "e", state, public)
    embedder = Embedder.from_pretrained(tmp_path / "e")
    stock = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "e").eval()
    system, user = f"{IM_START}system\n{embedder.instruction}{IM_END}\n", f"{IM_START}user\na red circle{IM_END}\n"
    ids = own(f"{system}{user}{IM_START}assistant\n", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == list(embedder.text_row("a red circle").token_ids)
    assert (int(ids[0, -1]) == own.pad_token_id) == bool(ending)
    embedder.soft_tail = 6  # what the published code assumes follows the text: true if the tokenizer ends with a token
    row = embedder.text_row("a red circle", 2)
    assert row.soft_start == ids.shape[1] - 6 and (own.decode(row.token_ids[: row.soft_start])[-1] == "e") == bool(
        ending
    )
    with torch.no_grad():
        hidden = stock.model(input_ids=ids).last_hidden_state[:, -1]
        expected = torch.nn.functional.normalize(hidden, dim=-1)
        torch.testing.assert_close(embedder.embed_texts(["a red circle"]), expected, atol=1e-5, rtol=1e-4)


def test_a_name_is_looked_up_on_the_hub(source, monkeypatch):
    asked = []

    def snapshot(name: str, **options: object) -> str:
        asked.append(name)
        return str(source[0])

    monkeypatch.setattr(checkpoints, "snapshot_download", snapshot)
    assert Policy.from_pretrained("somebody/charades-stage2").head is not None
    assert asked == ["somebody/charades-stage2"]

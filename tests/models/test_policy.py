"""Policy and embedder on disk: back with equal outputs, also for transformers alone, and started from plain checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from vsr1.agent import protocol
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import SYSTEM, Policy, PolicySettings
from vsr1.models.tiny import TinyConfig, model_config
from vsr1.models.tokenizer import IM_END, IM_START, REFINE, SPECIAL_TOKENS, token_id
from vsr1.models.vision import VideoSettings

TEXTS = ["a small red circle", "a circle that was never seen before"]


@torch.no_grad()
def logits(policy, files):
    """What a policy says next about a video file: next-token logits and the first soft token."""
    (video,) = policy.videos.encode(files[:1])
    row = protocol.prompt(policy.tokenizer, TEXTS[0], video, system=policy.settings.system)
    hidden, _ = backbone.run(policy.model.model, [row])
    return policy.logits(hidden[0, -1]), policy.head.refine_projector(hidden[0, -1])


@torch.no_grad()
def vectors(embedder, files):
    soft = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 64)
    return torch.cat([
        embedder.embed_texts(TEXTS),
        embedder.embed_texts(TEXTS, soft),
        embedder.embed_videos(embedder.videos.encode(files[:2])),
    ])  # fmt: skip


def test_policy_comes_back_from_disk(policy, files, tmp_path):
    with torch.no_grad():
        for parameter in policy.head.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again.settings == policy.settings and again.videos.settings == policy.videos.settings
    assert (again.refine_id, again.eos_id) == (policy.refine_id, policy.eos_id)
    for ours, theirs in zip(logits(policy, files), logits(again, files), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not again.training


def test_policy_can_share_a_tower(policy, embedder, files, tmp_path):
    policy.save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path, videos=embedder.videos)
    assert again.videos is embedder.videos and again.model.model.visual is embedder.model.visual
    torch.testing.assert_close(logits(again, files), logits(policy, files))


def test_tiny_policy_starts_from_the_embedder(policy, embedder):
    assert policy.model.model.visual is embedder.model.visual
    ours, theirs = (model.language_model.state_dict() for model in (policy.model.model, embedder.model))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert policy.model.get_input_embeddings().weight is not embedder.model.get_input_embeddings().weight
    assert policy.model.lm_head.weight is policy.model.get_input_embeddings().weight


def test_transformers_loads_the_policy_folder_alone(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    stock, report = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours, theirs = policy.model.state_dict(), stock.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()


def test_embedder_comes_back_from_disk(embedder, files, tmp_path):
    embedder.save_pretrained(tmp_path)
    again = Embedder.from_pretrained(tmp_path)
    assert again.identity == embedder.identity and again.dimension == embedder.dimension == 64
    assert not again.training
    assert again.instruction == embedder.instruction and again.videos.settings == embedder.videos.settings
    torch.testing.assert_close(vectors(again, files), vectors(embedder, files))


@pytest.mark.parametrize("bias", [True, False])
def test_embedder_head_comes_back_and_sets_the_dimension(embedder, files, tmp_path, bias):
    head = torch.nn.Linear(64, 24, bias=bias)
    small = Embedder(embedder.model, embedder.tokenizer, embedder.videos, head=head, instruction="Find it.")
    small.save_pretrained(tmp_path)
    again = Embedder.from_pretrained(tmp_path)
    assert again.dimension == small.dimension == 24 and again.instruction == "Find it."
    assert again.identity == small.identity != embedder.identity
    torch.testing.assert_close(vectors(again, files), vectors(small, files))


def test_transformers_loads_the_embedder_folder_alone(embedder, tmp_path):
    embedder.save_pretrained(tmp_path)
    stock, report = Qwen3VLModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    row = embedder.text_row(TEXTS[0])
    with torch.no_grad():
        hidden = stock(input_ids=torch.tensor([row.token_ids])).last_hidden_state[:, -1]
        torch.testing.assert_close(embedder.pool(hidden), embedder.embed_texts(TEXTS[:1]), atol=1e-5, rtol=1e-4)


def test_vectors_are_unit_vectors_and_texts_do_not_depend_on_their_neighbours(embedder, files):
    found = vectors(embedder, files)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(6))
    with torch.no_grad():
        torch.testing.assert_close(embedder.embed_texts(TEXTS[:1]), found[:1], atol=1e-5, rtol=1e-4)
    assert embedder.embed_texts([]).shape == (0, 64)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_embedder_is_the_same_one_in_any_precision(embedder, tmp_path, stored):
    embedder.model.to(stored)
    embedder.save_pretrained(tmp_path / "embedder")
    half, full = (Embedder.from_pretrained(tmp_path / "embedder", dtype=d) for d in (torch.bfloat16, torch.float32))
    assert half.identity == full.identity == Embedder.from_pretrained(tmp_path / "embedder").identity
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in full.videos.visual.parameters()} == {torch.float32}


def test_identity_names_weights_and_template(embedder, tokenizer):
    before = embedder.identity
    assert embedder.identity == before
    for name, parameter in embedder.named_parameters():
        kept = parameter.data.clone()
        parameter.data = parameter.data + 1e-3
        assert embedder.identity != before, f"{name} does not count"
        parameter.data = kept
    assert embedder.identity == before
    other = Embedder(embedder.model, tokenizer, embedder.videos, instruction="Represent it otherwise.")
    assert other.identity != before


def without_refine(tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer of a released checkpoint: all of ours but `<REFINE>`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != REFINE]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token=IM_END,
        pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )


@pytest.mark.parametrize("spare_rows", [0, 64])
def test_a_plain_checkpoint_gets_the_refine_token(tokenizer, tmp_path, spare_rows):
    """Released checkpoints have more embedding rows than tokens; without spare rows the table grows."""
    plain = without_refine(tokenizer)
    assert plain.convert_tokens_to_ids(REFINE) is None
    tiny = TinyConfig(hidden=64, layers=2, feed_forward=96, vision_hidden=32)
    config = model_config(plain, tiny)
    config.text_config.vocab_size = rows = len(plain) + spare_rows
    Qwen3VLForConditionalGeneration(config).save_pretrained(tmp_path / "plain")
    plain.save_pretrained(tmp_path / "plain")

    settings, video = PolicySettings(soft_tokens=3, soft_size=32, embedder_size=48), VideoSettings(1.0, 8, 4096, 4096)
    policy = Policy.from_pretrained(tmp_path / "plain", settings=settings, video=video)
    assert policy.refine_id == len(plain) == token_id(policy.tokenizer, REFINE)
    assert policy.model.get_input_embeddings().num_embeddings == max(rows, len(plain) + 1)
    ids = policy.tokenizer(f"<answer>matched</answer>{REFINE}{IM_END}")["input_ids"]
    assert ids[-2:] == [policy.refine_id, token_id(plain, IM_END)]
    pieces = plain(REFINE, add_special_tokens=False)["input_ids"]
    for table in (policy.model.get_input_embeddings().weight, policy.model.get_output_embeddings().weight):
        torch.testing.assert_close(table[policy.refine_id], table[pieces].mean(0))
    assert {IM_START, IM_END, REFINE} <= set(policy.tokenizer.all_special_tokens)
    assert policy.settings == settings and policy.videos.settings == video and settings.system == SYSTEM
    assert policy.head.soft_tokens(torch.zeros(3, 32)).shape == (3, 48)

    policy.save_pretrained(tmp_path / "ours")
    again = Policy.from_pretrained(tmp_path / "ours")
    assert again.refine_id == policy.refine_id and again.settings == settings
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(again.logits(hidden), policy.logits(hidden))


def test_a_gate_is_kept(embedder, tmp_path):
    policy = Policy.tiny(embedder)
    settings = PolicySettings(2, 64, 64, gate=True)
    Policy(policy.model, policy.tokenizer, policy.videos, settings).save_pretrained(tmp_path)
    again = Policy.from_pretrained(tmp_path)
    assert again.settings.gate and again.head.refine_gate is not None

"""The plan's numbers beside what transformers, autograd and torch's own counter say of real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLForConditionalGeneration

from tests.train.planned import TEXT, configuration, kept, shape_of, small
from vsr1.agent.generate import soft_tokens
from vsr1.errors import ConfigError
from vsr1.models import backbone
from vsr1.models.refine import RefineHead
from vsr1.models.shape import SHAPES, ModelShape, head_parameters
from vsr1.train import cost, lora, memory
from vsr1.train.memory import activations, training_state
from vsr1.train.optimizer import optimizers
from vsr1.train.sft import trainable

RESULTS = Path(__file__).parents[2] / "bench" / "results"
GPU, CPU = "NVIDIA-H100-80GB-HBM3", "AMD-EPYC-2-cores-avx2"


def measured(op: str, case: str, machine: str = GPU, figure: str = "ms") -> float:
    """Milliseconds (or another figure) of a case in the committed results."""
    results = json.loads((RESULTS / f"{machine}.json").read_text())
    (found,) = (one for one in results[op]["measurements"] if one["case"] == case)
    return found[figure]


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["2b", "4b"])
def test_parameters_of_published_models_are_those_of_transformers(name: str) -> None:
    shape = SHAPES[name]
    config = configuration(shape)
    with torch.device("meta"):
        model: Any = Qwen3VLForConditionalGeneration(config)
    assert ModelShape.from_config(config.to_dict()) == shape
    assert shape.vision.parameters == count(model.model.visual)
    assert shape.text.parameters == count(model.model.language_model)
    assert shape.parameters == count(model)


@pytest.mark.parametrize("size", ["tiny", "mid"])
@pytest.mark.parametrize("gate", [False, True])
def test_parameters_of_small_models(size: str, gate: bool) -> None:
    policy, embedder, _ = small(size)
    shape = shape_of(policy.model)
    assert shape.parameters == count(policy.model)
    width = embedder.dimension
    head = RefineHead(shape.text.hidden, 96, width, gate=gate)
    assert head_parameters(shape.text.hidden, 96, width, gate=gate) == count(head)


def test_an_output_matrix_of_its_own_is_counted() -> None:
    config = small("tiny")[0].model.config.to_dict()
    untied = config | {"tie_word_embeddings": False}
    table = ModelShape.from_config(config).text.table
    assert ModelShape.from_config(untied).parameters == ModelShape.from_config(config).parameters + table


def test_a_folder_without_a_fitting_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelShape.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 8}, "vision_config": {}}))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        ModelShape.from_folder(tmp_path)


@pytest.mark.parametrize("rank", [0, 4])
def test_bytes_of_training_are_exact(rank: int) -> None:
    """Weights, gradients and AdamW's state of a float32 policy, and how many parameters learn."""
    policy, embedder, _ = small("tiny")
    models = memory.Models(shape_of(policy.model), shape_of(embedder.model), policy.settings.soft_size)
    if rank:
        lora.adapt(policy, rank)
    groups = trainable(policy, 1e-3, adapters=bool(rank))
    weights = [weight for group in groups for weight in group["params"]]
    (optimizer,) = optimizers(policy, groups, lr=1e-3, muon=0.0, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    moments = [one for state in optimizer.state.values() for one in state.values() if one.ndim]
    learning = models.trained(rank) + models.head
    planned = training_state(learning, 4)
    assert learning == sum(weight.numel() for weight in weights)
    assert planned["gradients"] == sum(weight.grad.nbytes for weight in weights if weight.grad is not None)
    assert planned["optimizer state"] == sum(one.nbytes for one in moments)
    assert planned["float32 weights"] == 0
    assert training_state(learning, 2)["float32 weights"] == 4 * learning
    base = models.policy.parameters * 4 + models.head * 4 + (models.trained(rank) * 4 if rank else 0)
    assert base == sum(one.nbytes for one in policy.parameters())


@pytest.mark.parametrize("size", ["tiny", "mid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(size: str, dtype: torch.dtype) -> None:
    policy, _, prompt = small(size)
    policy.model.to(dtype).requires_grad_(True)
    found = kept(lambda: backbone.run(policy.model.model, [prompt], keep_cache=True), policy)
    planned = activations(shape_of(policy.model).text, len(prompt), dtype.itemsize, "all")
    assert planned == pytest.approx(found, rel=0.005)


def test_activations_beside_adapters() -> None:
    policy, _, prompt = small("mid")
    policy.model.to(torch.bfloat16)
    lora.adapt(policy, 8)
    trainable(policy, 1e-3, adapters=True)
    found = kept(lambda: backbone.run(policy.model.model, [prompt], keep_cache=True), policy)
    planned = activations(shape_of(policy.model).text, len(prompt), 2, "adapters", 8)
    assert planned == pytest.approx(found, rel=0.05)


def test_activations_of_the_frozen_embedder_that_reads_soft_tokens() -> None:
    _, embedder, _ = small("mid")
    embedder.to(torch.bfloat16)
    texts = ["a small red circle"] * 4
    soft = torch.randn(4, 8, embedder.dimension, dtype=torch.bfloat16, requires_grad=True)
    length = len(embedder.text_row(texts[0], 8))
    found = kept(lambda: embedder.embed_texts(texts, soft), embedder)
    planned = activations(shape_of(embedder.model).text, 4 * length, 2, "nothing")
    assert planned == pytest.approx(found, rel=0.05)


def test_soft_tokens_keep_a_copy_of_their_cache_for_every_step() -> None:
    policy, _, prompt = small("mid")
    policy.model.to(torch.bfloat16).requires_grad_(True)
    hidden, state = backbone.run(policy.model.model, [prompt], keep_cache=True)
    assert state is not None
    found = kept(lambda: soft_tokens(policy, hidden[:, -1], state), policy)
    text = shape_of(policy.model).text
    steps = policy.settings.soft_tokens - 1
    planned = memory.copied_bytes(text, 1, len(prompt), steps, 2) + activations(text, steps, 2, "all")
    assert planned == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize(("size", "prompt"), [("tiny", 162), ("mid", 410)])
def test_items_of_a_step_add_up_to_the_peak_that_was_measured(size: str, prompt: int) -> None:
    """The benchmark's step on a CPU in float32: eight replies of 81 tokens with soft tokens, their losses and the reference."""
    policy, embedder, _ = small(size)
    text = shape_of(policy.model).text
    tokens, steps = prompt + 8 * 81, policy.settings.soft_tokens - 1
    case = f"training step, {size}, prompt {prompt}, G = 8 x 81 tokens + 8 latents"
    planned = [
        activations(text, tokens, 4, "all"),
        memory.copied_bytes(text, 8, 81, steps, 4),
        activations(text, 8 * steps, 4, "all"),
        activations(text, 8 * len(embedder.text_row(TEXT, 8)), 4, "nothing"),
        training_state(count(policy.model.model.language_model) + count(policy.head), 4)["gradients"],
        tokens * text.cache_bytes(4),
        tokens * memory.layer_activations(text, 4, "nothing"),
    ]
    assert sum(planned) == pytest.approx(measured("rollout", case, CPU, "mib") * 2**20, rel=0.1)


@pytest.mark.parametrize("size", ["tiny", "mid"])
def test_operations_are_those_that_torch_counts(size: str) -> None:
    """Forward and backward of a row, attention over all pairs as the plain kernel computes it."""
    policy, _, prompt = small(size)
    policy.model.requires_grad_(True)
    text, length = shape_of(policy.model).text, len(prompt)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden, _ = backbone.run(policy.model.model, [prompt])
        forward = counter.get_total_flops()
        hidden.sum().backward()
    assert text.flops(length, length**2) == pytest.approx(forward, rel=0.02)
    assert 3 * text.flops(length, length**2) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("size", ["tiny", "mid"])
def test_operations_of_the_vision_tower(size: str) -> None:
    policy, _, prompt = small(size)
    video, vision = prompt.video, shape_of(policy.model).vision
    assert video is not None
    pairs, height, width = video.grid
    patches = pairs * height * width * vision.merge**2
    grid = torch.tensor([[pairs, height * vision.merge, width * vision.merge]])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        policy.videos.visual(torch.zeros(patches, vision.pixels), grid_thw=grid)
    planned = vision.flops(pairs * height * width, height * width)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_adapters() -> None:
    policy, _, prompt = small("tiny")
    text, length = shape_of(policy.model).text, len(prompt)
    lora.adapt(policy, 4)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone.run(policy.model.model, [prompt])
    assert text.flops(length, length**2, rank=4) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_what_is_called_measured_stands_in_the_results() -> None:
    gpu = cost.GPUS["h100-80"]
    rows, words, width = 8192, 151936, 2048
    seconds = measured("linear_logp", "bf16 T = 8,192, V = 151,936, H = 2,048") / 1000
    assert 4 * 2 * rows * words * width / seconds / gpu.flops == pytest.approx(cost.PRODUCTS, rel=0.1)
    seconds = measured("prefix", "group forward+backward, prefix 2,048, G = 8 x 256 tokens") / 1000
    pairs = 2048**2 / 2 + 8 * 256 * (2048 + 256 / 2)
    assert 3.5 * 4 * 16 * 128 * pairs / seconds / gpu.flops == pytest.approx(cost.ATTENTION, rel=0.1)
    seconds = measured("corpus_scan", "bf16 1,000,000 x 2048, top-10, B = 1") / 1000
    assert 1e6 * 2048 * 2 / seconds / gpu.bandwidth == pytest.approx(cost.BANDWIDTH, rel=0.1)
    results = json.loads((RESULTS / f"{GPU}.json").read_text())
    (films,) = results["decode"]["measurements"]
    assert films["peers"]["PyAV, 16 cores"] / 1000 * 16 / (16 * 60) == pytest.approx(cost.DECODING, rel=0.1)
    frozen = "bf16 T = 8,192, V = 151,936, H = 2,048, frozen head"
    assert measured("linear_logp", frozen, figure="mib") * 2**20 == pytest.approx(memory.LOGP_WORKSPACE, rel=0.1)
    tiny = "rollout, tiny, prompt 162, G = 8 x 81 tokens + 8 latents"
    step = measured("rollout", tiny, CPU) / 1000 / 89 / 3
    assert step == pytest.approx(1.3e-3, rel=0.2)

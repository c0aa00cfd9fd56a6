"""Activation checkpointing with cache, shared prompts and soft tokens: the same losses and gradients, and less is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train.test_packed import SETTINGS, packed, policy, rolled  # noqa: F401
from vsr1.models import backbone
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.train import grpo, lora
from vsr1.train.grpo import Rolled
from vsr1.train.library import Shelf
from vsr1.train.sft import trainable


def update(policy: Policy, embedder: Embedder, shelf: Shelf, rolled: Rolled, checkpointing: bool) -> Any:  # noqa: F811
    """Loss, gradients and log of one packed update with all of its losses."""
    policy.checkpointing = checkpointing
    settings = replace(SETTINGS, contrast_weight=0.7, distillation_weight=0.6)
    return packed(policy, grpo.frozen_copy(policy), embedder, shelf, rolled, settings)[:3]


def assert_same(ones: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """But for the order of sums: float64, but transformers' norms round to float32 inside."""
    assert set(ones) == set(others)
    scale = max(float(one.abs().max()) for one in others.values())
    for name, one in others.items():
        torch.testing.assert_close(ones[name], one, atol=1e-8 * scale, rtol=1e-6, msg=name)


@pytest.mark.parametrize("first_latent", ["normed", "unnormed"])
def test_a_packed_update_is_the_same(
    policy: Policy,  # noqa: F811
    tiny_embedder: Embedder,
    shelf: Shelf,
    rolled: Rolled,  # noqa: F811
    first_latent: Any,
) -> None:
    policy.settings = replace(policy.settings, first_latent=first_latent)
    trainable(policy, 1e-3)
    loss, gradients, numbers = update(policy, tiny_embedder, shelf, rolled, False)
    again, same, log = update(policy, tiny_embedder, shelf, rolled, True)
    assert again == pytest.approx(loss, rel=1e-12) and log == pytest.approx(numbers, rel=1e-9, abs=1e-12)
    assert any(name.startswith("head.") for name in same)
    assert_same(same, gradients)
    assert all("forward" in vars(layer) for layer in policy.model.model.language_model.layers)
    policy.checkpointing = False
    assert not any("forward" in vars(layer) for layer in policy.model.model.language_model.layers)


def test_adapters_learn_the_same(policy: Policy, tiny_embedder: Embedder, shelf: Shelf, rolled: Rolled) -> None:  # noqa: F811
    """Nothing that enters the first layer asks for a gradient then."""
    pytest.importorskip("peft")
    tuner = lora.adapt(policy, 2)
    trainable(policy, 1e-3, adapters=True)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    found = []
    for checkpointing in (False, True):
        policy.checkpointing = checkpointing
        found.append(packed(policy, lora.without(policy, tuner), tiny_embedder, shelf, rolled, SETTINGS))
    (loss, gradients, *_), (again, same, *_) = found
    assert again == pytest.approx(loss, rel=1e-12)
    assert_same(same, gradients)
    assert sum("lora_" in name and bool(one.any()) for name, one in same.items()) > 20


def test_less_is_kept(policy: Policy, shelf: Shelf, rolled: Rolled) -> None:  # noqa: F811
    """Bytes that stay until the backward pass of a pack: what autograd saves, and the keys and values."""
    (one,) = grpo.pack(rolled, policy, shelf, SETTINGS)
    trainable(policy, 1e-3)
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}

    def kept(checkpointing: bool) -> int:
        policy.checkpointing = checkpointing
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            alive = read(policy, one)  # held until all is counted, so that no storage is used twice
        for tensor in alive:
            keep(tensor)
        return sum(storages.values())

    assert kept(True) < 0.3 * kept(False)


def read(policy: Policy, one: grpo.Pack) -> list[Tensor]:  # noqa: F811
    """What stays of a pack's prompts, replies and a soft token."""
    model = policy.model.model
    prompts, state = backbone.run(model, list(one.prompts.values()), keep_cache=True)
    assert state is not None
    state = state.branch(torch.tensor(one.owner))
    hidden, last = backbone.feed_tokens(model, state, [reply.turn.token_ids for reply in one.replies])
    after = backbone.advance(model, state, last)
    assert state.prefix is not None
    own = [part for layer in state.layers() for part in layer]
    return [prompts, hidden, last, after, *own, *state.prefix.keys, *state.prefix.values]

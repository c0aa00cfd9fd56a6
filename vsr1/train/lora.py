"""Low-rank adapters on the policy's language model, by the library peft: little to train, nothing to copy.

The model keeps its place and its class; its projections are wrapped. The base is the reference of the KL, and when training
ends the adapters are added to the weights, so that what is saved is a plain model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vsr1.errors import ConfigError
from vsr1.models.policy import Policy
from vsr1.train.reference import Reference

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapt(policy: Policy, rank: int) -> Any:
    """Put adapters of `rank` into every projection of the language model; returns peft's tuner. ConfigError without
    peft."""
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise ConfigError("low-rank adapters need the library peft: pip install 'vsr1[lora]'") from error
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS)
    return LoraModel(policy.model.model.language_model, config, "default")


def without(policy: Policy, tuner: Any) -> Reference:
    """The policy without its adapters, while the context is open."""

    @contextmanager
    def base() -> Iterator[Policy]:
        tuner.disable_adapter_layers()
        try:
            yield policy
        finally:
            tuner.enable_adapter_layers()

    return base


def merge(policy: Policy, tuner: Any) -> None:
    """Add the adapters to the weights they stand beside, and take them out."""
    policy.model.model.language_model = tuner.merge_and_unload()

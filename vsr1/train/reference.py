"""What the KL of stage 2 is measured from: a copy of the policy that stays as it is.

Where adapters are trained, the model without them serves instead (`vsr1.train.lora.without`), and nothing is copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from vsr1.models.policy import Policy

Reference = Callable[[], AbstractContextManager[Policy]]
"""The policy that the KL is measured from; it stands as long as the context is open."""


def frozen_copy(policy: Policy) -> Reference:
    """A second policy with the same weights that never learns; the vision tower stays shared."""
    model = copy.deepcopy(policy.model)
    model.model.visual = policy.videos.visual
    twin = Policy(model, policy.tokenizer, policy.videos, policy.settings, copy.deepcopy(policy.head))
    twin.eval().requires_grad_(False)
    return lambda: nullcontext(twin)

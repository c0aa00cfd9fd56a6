"""The README's lines on training elsewhere run, and mean what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_trains() -> None:
    section = README.read_text(encoding="utf-8").split("\n## Training elsewhere\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 5, 16, generator=generator, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5, 5, 3])[:, None]
    names: dict[str, Any] = {
        "torch": torch,
        "hidden": hidden,
        "head": torch.nn.Linear(16, 40, bias=False),
        "tokens": torch.randint(40, (8, 5), generator=generator),
        "mask": mask,
        "rewards": torch.arange(8.0),
        "old_logp": torch.full((8, 5), -3.7),
    }
    exec(compile(code, "README.md", "exec"), names)
    plain = (hidden @ names["head"].weight.T / 0.9).log_softmax(-1).gather(2, names["tokens"][..., None])[..., 0]
    torch.testing.assert_close(names["logp"][mask], plain[mask])
    assert hidden.grad is not None
    learned = (hidden.grad != 0).any(-1)  # not what is masked out, and not all of the rest: some ratios are clipped
    assert learned.any()
    assert not (learned & ~mask).any()

"""The README's lines on decoding elsewhere run, and mean what they say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_decodes(
    write_numbered: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = README.read_text(encoding="utf-8").split("\n## Decoding elsewhere\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    good = write_numbered("good.mp4", list(range(0, 4000, 40)), side=64)
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    names: dict[str, Any] = {"path": good, "paths": [broken, good]}
    exec(compile(code, "README.md", "exec"), names)
    assert names["film"].pixels.shape == (64, 64, 64, 3)
    frames, height, width = names["grid"][0].tolist()
    assert frames == 32 and names["rows"].shape == (frames * height * width, 3 * 2 * 16 * 16)
    assert [failure.path for failure in names["loader"].report.failures] == [broken]
    assert f"{good} torch.Size([4, 64, 64, 3])" in capsys.readouterr().out

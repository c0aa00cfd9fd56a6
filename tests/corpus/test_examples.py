"""The examples under docs/examples run, and the README shows nothing that does not."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.corpus.shared import D
from vsr1.corpus import Corpus

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
TEXTS = ["a red circle", "a blue square", "nothing else"]


def embed(text: str) -> list[float]:
    """A vector for each known text, a list of numbers as embedding services return it."""
    return torch.eye(D)[TEXTS.index(text)].tolist()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A corpus whose third and second video are a red circle, one more so."""
    with Corpus.create(tmp_path / "corpus", D, "e") as corpus:
        vectors = torch.zeros(4, D)
        vectors[2, 0], vectors[1, 0], vectors[0, 1] = 1.0, 0.5, 1.0
        corpus.add(["v0", "v1", "v2", "v3"], vectors)
    return str(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["raw_arrays", "flat_ip"])
def test_scripts_run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_langchain_finds_videos(folder: str) -> None:
    pytest.importorskip("langchain_core")
    retriever = runpy.run_path(str(EXAMPLES / "langchain_retriever.py"))["retriever"](folder, embed, k=2)
    found = retriever.invoke("a red circle")
    assert [(one.id, one.page_content, one.metadata) for one in found] == [
        ("v2", "v2", {"score": 1.0}),
        ("v1", "v1", {"score": 0.5}),
    ]
    assert [one.id for one in retriever.batch(["a blue square", "a red circle"])[0]] == ["v0", "v1"]


def test_llama_index_finds_videos(folder: str) -> None:
    pytest.importorskip("llama_index.core")
    retriever = runpy.run_path(str(EXAMPLES / "llama_index_retriever.py"))["retriever"](folder, embed, k=2)
    found: list[Any] = retriever.retrieve("a red circle")
    assert [(one.node.node_id, one.text, one.score) for one in found] == [("v2", "v2", 1.0), ("v1", "v1", 0.5)]


def test_the_readme_shows_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines, with the three things it takes for granted: a FAISS index, its ids, an embedder."""
    faiss = pytest.importorskip("faiss")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Embedding elsewhere\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    vectors = torch.nn.functional.normalize(torch.randn(5, D), dim=1)
    index = faiss.IndexFlatIP(D)
    index.add(vectors.numpy())
    faiss.write_index(index, "old.faiss")
    names: dict[str, Any] = {"vectors": vectors.numpy(), "queries": vectors[:2], "video_ids": [*"abcde"]}
    exec(compile(code, "README.md", "exec"), names)
    assert names["found"].ids[:, 0].tolist() == [0, 1]
    assert names["ids"][:, 0].tolist() == [0, 1]
    assert names["corpus"].video_ids == [*"abcde"]
    for name in re.findall(r"docs/examples/(\w+\.py)", section):
        assert (EXAMPLES / name).is_file()

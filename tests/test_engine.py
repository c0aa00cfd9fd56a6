"""The engine opened from folders, and the example of the README."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests import fixtures
from vsr1 import Engine, Trajectory
from vsr1.corpus import Corpus
from vsr1.errors import ConfigError, CorpusError

# pytest finds fixtures by their names in the module
tokenizer, embedder, policy = fixtures.tokenizer, fixtures.embedder, fixtures.policy
files, moments, make_corpus = fixtures.files, fixtures.moments, fixtures.make_corpus

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def run_folder(policy, embedder, make_corpus, files, tmp_path) -> Path:
    """What `vsr1 train` leaves behind, as far as an engine reads it."""
    folder = tmp_path / "runs" / "tiny"
    make_corpus(files)
    (folder / "corpus").mkdir(parents=True)
    shutil.move(tmp_path / "corpus", folder / "corpus" / "test")
    policy.save_pretrained(folder / "models" / "policy-grpo")
    embedder.save_pretrained(folder / "models" / "embedder")
    (folder / "config.yaml").write_text("run: runs/tiny\n")
    return folder


def parts(folder: Path) -> dict[str, Path]:
    models = folder / "models"
    return {"corpus": folder / "corpus" / "test", "policy": models / "policy-grpo", "embedder": models / "embedder"}


def test_folders_open_and_answer(run_folder, embedder, moments):
    engine = Engine.open(**parts(run_folder))
    assert engine.embedder.identity == embedder.identity and len(engine.corpus) == 6
    found = engine.ask(moments[3].text, turns=2)
    assert isinstance(found, Trajectory) and found.moment.text == moments[3].text
    assert len(found.turns) == 2 and found.turns[0].video_id == "v3"
    assert found.turns[0].rank is None and found.final_rank is None  # nobody said which video is right
    assert [turn.video_id for turn in Engine.open_run(run_folder).ask(moments[3].text, turns=2).turns] == [
        turn.video_id for turn in found.turns
    ]


def test_a_corpus_of_another_embedder_is_refused(run_folder, embedder, tmp_path):
    Corpus.create(tmp_path / "foreign", embedder.dimension, "someone else's")
    with pytest.raises(CorpusError) as caught:
        Engine.open(**parts(run_folder) | {"corpus": tmp_path / "foreign"})
    assert "someone else's" in str(caught.value) and embedder.identity in str(caught.value)


@pytest.mark.parametrize("missing", ["policy", "embedder"])
def test_a_missing_model_is_named(run_folder, tmp_path, missing):
    gone = tmp_path / "gone"
    with pytest.raises(ConfigError, match=f"{missing} folder '{gone}'"):
        Engine.open(**parts(run_folder) | {missing: gone})


def test_a_missing_corpus_is_named(run_folder, tmp_path):
    with pytest.raises(CorpusError, match=str(tmp_path / "gone")):
        Engine.open(**parts(run_folder) | {"corpus": tmp_path / "gone"})


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="is no run folder"):
        Engine.open_run(tmp_path)


def test_the_readme_example_runs(run_folder, monkeypatch, capsys):
    section = README.read_text(encoding="utf-8").split("\n## Use it\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(run_folder.parents[1])
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") >= 2

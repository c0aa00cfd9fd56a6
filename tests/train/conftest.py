"""A small rendered world, tiny random models and a corpus of its videos, shared by the tests of this room."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vsr1.corpus import Corpus
from vsr1.data.world import World, WorldConfig, build
from vsr1.models.embedder import Embedder
from vsr1.models.policy import Policy
from vsr1.models.tiny import TinyConfig
from vsr1.models.tokenizer import train_tokenizer
from vsr1.train.library import Shelf
from vsr1.world_job import tokenizer_texts


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    config = WorldConfig(train_videos=16, validation_videos=1, test_videos=4, pixels=32, workers=1)
    return build(tmp_path_factory.mktemp("run") / "world", config, seed=3)


@pytest.fixture(scope="module")
def tiny_embedder() -> Embedder:
    torch.manual_seed(0)
    config = TinyConfig(hidden=64, layers=2, feed_forward=96, vision_hidden=32)
    return Embedder.tiny(train_tokenizer(tokenizer_texts()), config).eval().requires_grad_(False)


@pytest.fixture
def tiny_policy(tiny_embedder: Embedder) -> Policy:
    torch.manual_seed(0)
    return Policy.tiny(tiny_embedder, soft_tokens=8).eval()


@pytest.fixture(scope="module")
def shelf(world: World, tiny_embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    scenes = world.scenes("train")
    paths = [world.video_path(scene.video_id) for scene in scenes]
    corpus = Corpus.create(tmp_path_factory.mktemp("shelf") / "corpus", tiny_embedder.dimension, tiny_embedder.identity)
    features: Any = tiny_embedder.videos.encode(paths)
    corpus.add([scene.video_id for scene in scenes], tiny_embedder.embed_videos(features), paths=paths)
    return Shelf(corpus, tiny_embedder.videos)

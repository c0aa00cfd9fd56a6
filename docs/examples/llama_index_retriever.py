"""A corpus as a LlamaIndex retriever."""

from collections.abc import Callable
from typing import Any

import torch
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from vsr1.corpus import Corpus


class VideoRetriever(BaseRetriever):
    """Finds the k best videos; `embed` turns a text into the vector (D,) of the corpus' embedder."""

    def __init__(self, corpus: Corpus, embed: Callable[[str], Any], k: int = 4) -> None:
        super().__init__()
        self.corpus, self.embed, self.k = corpus, embed, k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        ids, scores = self.corpus.search(torch.as_tensor(self.embed(query_bundle.query_str))[None], self.k)
        return [
            NodeWithScore(node=TextNode(id_=video_id, text=video_id), score=score)
            for video_id, score in zip(ids[0], scores[0].tolist(), strict=False)
        ]


def retriever(folder: str, embed: Callable[[str], Any], k: int = 4) -> VideoRetriever:
    """A retriever over the corpus in `folder`: `retriever(folder, embed).retrieve("a red circle")`."""
    return VideoRetriever(Corpus.open(folder), embed, k)

"""A corpus as a LangChain retriever."""

from collections.abc import Callable
from typing import Any

import torch
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever

from vsr1.corpus import Corpus


class VideoRetriever(BaseRetriever):
    """Finds the k best videos; `embed` turns a text into the vector (D,) of the corpus' embedder."""

    corpus: Any
    embed: Callable[[str], Any]
    k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        ids, scores = self.corpus.search(torch.as_tensor(self.embed(query))[None], self.k)
        return [
            Document(id=video_id, page_content=video_id, metadata={"score": score})
            for video_id, score in zip(ids[0], scores[0].tolist(), strict=False)
        ]


def retriever(folder: str, embed: Callable[[str], Any], k: int = 4) -> VideoRetriever:
    """A retriever over the corpus in `folder`: `retriever(folder, embed).invoke("a red circle")`."""
    return VideoRetriever(corpus=Corpus.open(folder), embed=embed, k=k)

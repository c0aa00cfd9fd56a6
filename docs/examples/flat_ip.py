"""A program that uses faiss.IndexFlatIP changes one line."""

import numpy as np

from vsr1.corpus.faiss_like import FlatIP

vectors = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)

index = FlatIP(64)  # was: index = faiss.IndexFlatIP(64); dtype="bfloat16" takes half the memory
index.add(vectors)
scores, ids = index.search(vectors[:2], 5)
assert ids[:, 0].tolist() == [0, 1]

"""Vectors you already have: one exact sweep, and nothing is copied."""

import numpy as np
import torch

from vsr1.ops.corpus_scan import scan

vectors = np.random.default_rng(0).standard_normal((1000, 64), dtype=np.float32)  # also a memory map, of any size
queries = torch.from_numpy(vectors[[3, 77]])

found = scan(queries, vectors, k=5)  # numpy, torch, cupy, or anything with __dlpack__
assert found.ids[:, 0].tolist() == [3, 77]

# The rank of a known answer and the whole softmax come out of the same sweep.
found = scan(queries, torch.from_numpy(vectors).bfloat16(), k=5, positive=torch.tensor([3, 4]), temperature=0.05)
print(found.scores, found.rank, found.lse, sep="\n")

"""From folders of video files to a corpus that can be searched: `add` finds, decodes, embeds and commits.

    report = vsr1.ingest.add("corpus", ["videos"], Embedder.from_pretrained("runs/tiny/models/embedder"))
    print(report)

Files are listed (`listing`), compared with what the corpus knows of them (`plan`), and those that are new or changed are
decoded in parallel, ahead of the model that embeds them (`decoding`). Every batch is one commit of the corpus, so a kill
at any moment loses at most a batch, and the same call goes on.
"""

from __future__ import annotations

from vsr1.ingest.listing import EXTENSIONS, Failure
from vsr1.ingest.report import FAILURES, IngestReport
from vsr1.ingest.work import add

__all__ = ["EXTENSIONS", "FAILURES", "Failure", "IngestReport", "add"]

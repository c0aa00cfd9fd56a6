"""`python -m vsr1.train`: the main job."""

from __future__ import annotations

import sys

from vsr1.cli import train

if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))

"""Evaluation: trajectories become figures with intervals (`metrics`), runs become `eval.json` and a report page."""

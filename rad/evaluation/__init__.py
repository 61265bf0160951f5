"""Evaluation: benchmark documents, lm-eval's model class, scorers and efficiency probes.

`build` writes the documents once per study (no torch), `harness` scores one model on them,
`probe` gives the cheap accuracy along a distillation curve, `efficiency` measures cache and speed.
"""

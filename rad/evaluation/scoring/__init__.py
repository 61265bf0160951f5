"""Scorers of single responses: pure Python, no torch, no lm-eval, and no model text executed.

The task YAMLs name the functions `<kind>_results(document, responses)`, which return metrics.
"""

"""Multiple choice by log-likelihood: (log-likelihood in nats, whether it is greedy) per choice.

The same numbers as lm-eval's own: `acc` takes the most likely choice, `acc_norm` the most likely
per character of the choice, `mass` (TruthfulQA mc2) the probability of all true choices together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Likelihood = tuple[float, bool]


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def choice_results(document: Mapping[str, Any], results: Sequence[Likelihood]) -> dict[str, float]:
    """lm-eval `process_results` of a choice task: `acc` and `acc_norm`."""
    gold, values = document["gold"], [value for value, _ in results]
    lengths = [max(1, len(choice)) for choice in document["choices"]]
    normed = [value / size for value, size in zip(values, lengths, strict=True)]
    return {"acc": float(_best(values) == gold), "acc_norm": float(_best(normed) == gold)}


def mass_results(document: Mapping[str, Any], results: Sequence[Likelihood]) -> dict[str, float]:
    """lm-eval `process_results` of TruthfulQA mc2: `acc` is the share of the true choices."""
    values = [value for value, _ in results]
    top = max(values)
    masses = [math.exp(value - top) for value in values]
    true = sum(mass for mass, label in zip(masses, document["labels"], strict=True) if label == 1)
    return {"acc": true / sum(masses)}


def lambada_results(document: Mapping[str, Any], results: Sequence[Likelihood]) -> dict[str, Any]:
    """lm-eval `process_results` of LAMBADA: the last word is the greedy one; its perplexity."""
    value, greedy = results[0]
    return {"acc": float(greedy), "perplexity": (value, 1)}

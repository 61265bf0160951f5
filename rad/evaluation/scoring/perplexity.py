"""Running text: log-likelihoods per token, word and byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Weighted = tuple[float, int]


def perplexity_scores(document: Mapping[str, Any], loglikelihood: float) -> dict[str, Any]:
    """`token_nll` in nats per token, and (log-likelihood, count) pairs for `corpus_perplexity`."""
    return {
        "token_nll": -loglikelihood / document["tokens"],
        "perplexity": (loglikelihood, document["tokens"]),
        "word_perplexity": (loglikelihood, document["words"]),
        "byte_perplexity": (loglikelihood, document["bytes"]),
    }


def corpus_perplexity(items: Iterable[Weighted]) -> float:
    """exp of the mean negative log-likelihood per unit over all documents."""
    pairs = list(items)
    mean = -sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)
    return math.exp(mean) if mean < 700 else math.inf


def perplexity_results(document: Mapping[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """lm-eval `process_results` of running text."""
    return perplexity_scores(document, results[0])

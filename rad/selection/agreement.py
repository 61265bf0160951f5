"""How far selectors agree: shared heads of their placements, rank correlation of their scores.

Try it: `agreement({"rad": Placement.load(a), "uniform": Placement.load(b)})["jaccard"]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rad.placement import Placement


def jaccard(first: Placement, second: Placement) -> float:
    """Shared over all kept (layer, head) pairs; 1 when both keep nothing."""
    mine, other = set(first.softmax), set(second.softmax)
    union = mine | other
    return len(mine & other) / len(union) if union else 1.0


def layer_scores(placement: Placement) -> list[float] | None:
    """One number per layer, larger is kept; a layer of scored heads counts as its best head."""
    scores = placement.scores
    if scores is None:
        return None
    sign = 1.0 if scores.higher_is_kept else -1.0
    if scores.kind == "layer":
        return [sign * float(value) for value in scores.values]  # type: ignore[arg-type]
    return [max(sign * float(value) for value in row) for row in scores.values]  # type: ignore[union-attr]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing their mean rank; None when one side is constant.

    Raises `ValueError` when the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"cannot correlate {len(first)} with {len(second)} values")
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else None


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    _, group, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[group.reshape(-1)]
    return mean


def agreement(placements: Mapping[str, Placement]) -> dict[str, Any]:
    """Pairwise `jaccard` of kept pairs and `spearman` of layer scores, as nested dictionaries.

    `spearman` is None where a selector has no scores. `kept_by` counts for every layer how many
    placements keep at least one of its heads. Raises `ValueError` for bases of different shape.
    """
    shapes = {(p.layers, p.heads) for p in placements.values()}
    if len(shapes) > 1:
        raise ValueError(f"placements of bases of different shape: {sorted(shapes)}")
    scores = {name: layer_scores(placement) for name, placement in placements.items()}
    overlap = {
        a: {b: jaccard(first, second) for b, second in placements.items()}
        for a, first in placements.items()
    }
    correlation: dict[str, dict[str, float | None]] = {}
    for a, first in scores.items():
        correlation[a] = {}
        for b, second in scores.items():
            known = first is not None and second is not None
            correlation[a][b] = spearman(first, second) if known else None  # type: ignore[arg-type]
    layers = shapes.pop()[0] if shapes else 0
    return {
        "jaccard": overlap,
        "spearman": correlation,
        "kept_by": [
            sum(layer in placement.kept_layers() for placement in placements.values())
            for layer in range(layers)
        ],
    }

"""Search over subsets of fixed size: Bayesian optimisation with an own Gaussian process (no torch).

RAD proposes points of the box [0, 1]^L and discretises them by top-k (RAD, appendix D). Every
point of the box is worth exactly what its top-k set is worth, so the surrogate here is put on the
sets themselves, as 0/1 vectors: a linear kernel (layers add up) plus a kernel of the Hamming
distance (pairs interact). Candidates are the one-swap neighbours of the best sets found, and
top-k sets of random points of the box; the next evaluation maximises expected improvement. When
there are no more sets than evaluations, all are evaluated.

Try it: `search(lambda chosen: -sum(chosen), 8, 3, evaluations=30)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Subset = tuple[int, ...]
Objective = Callable[[Subset], float]
Array = NDArray[np.float64]

RANDOM_CANDIDATES = 256  # random sets offered to the acquisition at every step
NEIGHBOURHOODS = 3  # sets, best first, whose one-swap neighbours are offered


def top_k(point: Array, size: int) -> Subset:
    """Indices of the `size` largest coordinates, ascending; ties go to the lower index."""
    order = np.argsort(-point, kind="stable")[:size]
    return tuple(sorted(int(index) for index in order))


def neighbours(chosen: Subset, items: int) -> list[Subset]:
    """All sets that differ from `chosen` in one exchanged element."""
    outside = [index for index in range(items) if index not in chosen]
    return [
        tuple(sorted({*chosen, new} - {old})) for old, new in itertools.product(chosen, outside)
    ]


@dataclass
class SearchResult:
    """The best set and everything that was evaluated, in order."""

    best: Subset
    value: float
    history: list[tuple[Subset, float]]
    exhaustive: bool
    random: list[float] = field(default_factory=list)  # values of sets drawn at random

    def random_mean(self) -> float | None:
        """Mean objective of a random set: of all sets when exhaustive, else of those drawn."""
        values = [value for _, value in self.history] if self.exhaustive else self.random
        return float(np.mean(values)) if values else None

    def top(self, count: int) -> list[tuple[Subset, float]]:
        """The `count` best sets; ties go to the earlier one."""
        return sorted(self.history, key=lambda pair: -pair[1])[:count]


class SubsetProcess:
    """Gaussian process on 0/1 vectors of equally large sets.

    Kernel: w linear + (1 - w) exp(-hamming / (2 length)), plus noise. Weight, length and noise are
    those of a small grid with the largest marginal likelihood; targets are standardised.
    """

    weights = (0.0, 0.3, 0.6, 0.9)
    lengths = (1.0, 2.0, 4.0, 8.0)
    noises = (1e-3, 1e-2, 1e-1)

    def __init__(self, points: Array, targets: Array) -> None:
        self._points = points
        self._mean = float(targets.mean())
        self._scale = float(targets.std()) or 1.0
        self._targets = (targets - self._mean) / self._scale
        best = -math.inf
        for weight, length in itertools.product(self.weights, self.lengths):
            kernel = self._kernel(points, points, weight, length)
            for noise in self.noises:
                factor = np.linalg.cholesky(kernel + noise * np.eye(len(points)))
                solved = np.linalg.solve(factor, self._targets)
                likelihood = -0.5 * float(solved @ solved) - float(np.log(np.diag(factor)).sum())
                if likelihood > best:
                    best = likelihood
                    self._chosen = (weight, length)
                    self._factor, self._solved = factor, solved

    @staticmethod
    def _kernel(left: Array, right: Array, weight: float, length: float) -> Array:
        size = left[0].sum() or 1.0
        share = left[0].mean()
        # Centred, so that sets sharing as much as chance has them share are uncorrelated.
        linear = (left - share) @ (right - share).T / (size * (1 - share) or 1.0)
        hamming = 2 * (size - left @ right.T)
        result: Array = weight * linear + (1 - weight) * np.exp(-hamming / (2 * length))
        return result

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation (n,), in the units of the targets."""
        weight, length = self._chosen
        across = self._kernel(self._points, points, weight, length)
        own = self._kernel(points[:1], points[:1], weight, length)[0, 0]
        projected = np.linalg.solve(self._factor, across)
        mean = projected.T @ self._solved
        variance = np.maximum(own - (projected**2).sum(0), 1e-12)
        return mean * self._scale + self._mean, np.sqrt(variance) * self._scale


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """Expected excess over `best` of normal variables."""
    score = (mean - best) / deviation
    density = np.exp(-0.5 * score**2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in score])
    result: Array = (mean - best) * below + deviation * density
    return result


def search(
    objective: Objective,
    items: int,
    size: int,
    *,
    evaluations: int,
    initial: int = 8,
    seed: int = 0,
    first: Iterable[Sequence[int]] = (),
    progress: Callable[[str], None] | None = None,
) -> SearchResult:
    """The set of `size` of `items` indices with the largest objective among `evaluations` tried.

    `first` sets are tried before the `initial` random ones. No set is evaluated twice. The result
    is a function of the arguments. Raises `ValueError` when `size` is not in 0..`items`.
    """
    if not 0 <= size <= items:
        raise ValueError(f"cannot choose {size} of {items}")
    if evaluations < 1:
        raise ValueError("a search needs at least one evaluation")
    values: dict[Subset, float] = {}
    drawn: list[float] = []
    rng = np.random.default_rng(seed)
    exhaustive = math.comb(items, size) <= evaluations
    budget = math.comb(items, size) if exhaustive else evaluations

    def evaluate(chosen: Subset) -> float:
        value = values[chosen] = float(objective(chosen))
        if progress is not None:
            progress(f"set {len(values)}/{budget}: best {max(values.values()):.4f}")
        return value

    if exhaustive:
        for chosen in itertools.combinations(range(items), size):
            evaluate(chosen)
    else:
        for given in first:
            chosen = tuple(sorted(given))
            if chosen not in values and len(values) < budget:
                evaluate(chosen)
        while len(drawn) < initial and len(values) < budget:
            chosen = top_k(rng.random(items), size)
            if chosen not in values:
                drawn.append(evaluate(chosen))
        while len(values) < budget:
            evaluate(_propose(values, items, size, rng))
    history = list(values.items())
    best, value = max(history, key=lambda pair: pair[1])
    return SearchResult(best, value, history, exhaustive, drawn)


def _propose(
    values: dict[Subset, float], items: int, size: int, rng: np.random.Generator
) -> Subset:
    """The set not yet evaluated with the largest expected improvement."""
    best = sorted(values, key=lambda chosen: -values[chosen])[:NEIGHBOURHOODS]
    offered = [other for chosen in best for other in neighbours(chosen, items)]
    offered += [top_k(point, size) for point in rng.random((RANDOM_CANDIDATES, items))]
    # A dict keeps the order, so that ties do not depend on hashing.
    candidates = [chosen for chosen in dict.fromkeys(offered) if chosen not in values]
    if not candidates:  # the space is nearly used up and was missed by every draw
        return next(
            chosen for chosen in itertools.combinations(range(items), size) if chosen not in values
        )
    process = SubsetProcess(_indicators(values, items), np.array(list(values.values())))
    mean, deviation = process.predict(_indicators(candidates, items))
    gain = expected_improvement(mean, deviation, max(values.values()))
    return candidates[int(np.argmax(gain))]


def _indicators(sets: Iterable[Subset], items: int) -> Array:
    members = np.array(list(sets), dtype=np.intp)
    rows = np.zeros((len(members), items))
    np.put_along_axis(rows, members, 1.0, axis=1)
    return rows

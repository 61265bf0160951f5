"""A Gaussian process on sets, as 0/1 vectors, and expected improvement (numpy only).

Legend: n sets, L items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Subset = tuple[int, ...]
Array = NDArray[np.float64]
Kernel = tuple[float, float, float]  # weight, length, noise


def indicators(sets: Iterable[Subset], items: int) -> Array:
    """The sets as rows of 0 and 1, (n, L)."""
    chosen = list(sets)
    rows = np.zeros((len(chosen), items))
    for row, members in zip(rows, chosen, strict=True):
        row[list(members)] = 1.0
    return rows


class SubsetProcess:
    """Gaussian process on 0/1 vectors.

    Kernel: w linear + (1 - w) exp(-hamming / (2 length)), plus noise: layers add up, and sets that
    share layers resemble each other. Weight, length and noise are those of a small grid with the
    largest marginal likelihood unless `kernel` gives them; targets are standardised.
    """

    weights = (0.0, 0.3, 0.6, 0.9)
    lengths = (1.0, 2.0, 4.0, 8.0)
    noises = (1e-3, 1e-2, 1e-1)

    def __init__(self, points: Array, targets: Array, kernel: Kernel | None = None) -> None:
        self._points = points
        self._mean = float(targets.mean())
        self._scale = float(targets.std()) or 1.0
        standard = (targets - self._mean) / self._scale
        # Centred at the mean share, so that sets sharing as much as chance has them share are
        # uncorrelated; the norm makes a set of that share have variance 1.
        self._share = float(points.mean())
        self._norm = points.shape[1] * self._share * (1 - self._share) or 1.0
        linear, distance = self._parts(points, points)
        grid = [kernel] if kernel else itertools.product(self.weights, self.lengths, self.noises)
        best = -math.inf
        for weight, length, noise in grid:
            covariance = self._mix(linear, distance, weight, length) + noise * np.eye(len(points))
            factor = np.linalg.cholesky(covariance)
            solved = np.linalg.solve(factor, standard)
            likelihood = -0.5 * float(solved @ solved) - float(np.log(np.diag(factor)).sum())
            if likelihood > best:
                best = likelihood
                self.kernel = (weight, length, noise)
                self._factor, self._solved = factor, solved

    def _parts(self, left: Array, right: Array) -> tuple[Array, Array]:
        """Linear kernel and Hamming distance of every pair."""
        linear = (left - self._share) @ (right - self._share).T / self._norm
        common = left @ right.T
        return linear, left.sum(1)[:, None] + right.sum(1)[None] - 2 * common

    @staticmethod
    def _mix(linear: Array, distance: Array, weight: float, length: float) -> Array:
        result: Array = weight * linear + (1 - weight) * np.exp(-distance / (2 * length))
        return result

    def predict(self, points: Array) -> tuple[Array, Array]:
        """Posterior mean and standard deviation (n,), in the units of the targets."""
        weight, length, _ = self.kernel
        across = self._mix(*self._parts(self._points, points), weight, length)
        own = weight * ((points - self._share) ** 2).sum(1) / self._norm + (1 - weight)
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

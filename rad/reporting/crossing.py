"""How many tokens a curve needs to reach another curve's final value. numpy only, no I/O.

A position is in tokens; `START` says that the first logged point has the value already, `NEVER`
that no logged point has it. Neither is a number of tokens: nothing is extrapolated. A ratio is
baseline tokens over own tokens, so 2 means half the tokens.

The rule is the same for both curves: the *first* time the value is reached, the baseline's too.

Legend: P logged points, D documents, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rad.reporting.statistics import LEVEL, Array, resampled_counts

START, NEVER = 0.0, math.inf


@dataclass(frozen=True)
class Curve:
    """Values of a quantity at logged points, tokens ascending; `documents` (P, D) where kept."""

    tokens: Array  # (P,)
    values: Array  # (P,)
    documents: Array | None = None


@dataclass(frozen=True)
class Span:
    """A position or a ratio with the ends of its interval; the ends may be `START` or `NEVER`."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Reached:
    """When a curve reached the baseline's final value, and what its interval is made of."""

    target: float
    tokens: Span
    baseline: float  # position of the baseline itself
    ratio: Span | None  # None where either side has no number of tokens
    interval: str  # `points`, `seeds` or `documents`

    @property
    def counts(self) -> bool:
        """Whether the value is reached at a number of tokens."""
        return START < self.tokens.value < NEVER


def positions(
    tokens: Array, values: Array, targets: Array, *, falling: bool = False, log: bool = False
) -> Array:
    """Where curves first reach their target: `values` (S,P), `targets` (S,) -> (S,).

    Between logged points values are interpolated linearly against tokens, or their logarithms
    with `log` (linearly where one is not positive).
    """
    met = values <= targets[:, None] if falling else values >= targets[:, None]
    first = met.argmax(axis=1)
    rows = np.arange(len(values))
    after = np.maximum(first, 1) if values.shape[1] > 1 else first
    left, right, goal = values[rows, after - 1], values[rows, after], targets
    if log:
        positive = (left > 0) & (right > 0) & (goal > 0)
        ends = (np.where(positive, part, 1.0) for part in (left, right, goal))
        left, right, goal = (
            np.where(positive, np.log(end), part)
            for end, part in zip(ends, (left, right, goal), strict=True)
        )
    # where the crossing is at the start, or nowhere, the step may be zero: the result is not used
    step = np.where(left == right, 1.0, left - right)
    start = tokens[after - 1]
    found = start + (left - goal) / step * (tokens[after] - start)
    return np.where(first > 0, found, np.where(met[:, 0], START, NEVER))


def position(curve: Curve, target: float, *, falling: bool = False, log: bool = False) -> float:
    """Where one curve first reaches `target`."""
    goal = np.array([target])
    return float(positions(curve.tokens, curve.values[None], goal, falling=falling, log=log)[0])


def bracket(curve: Curve, target: float, *, falling: bool = False) -> tuple[float, float]:
    """The logged points between which the curve first reaches `target`."""
    met = curve.values <= target if falling else curve.values >= target
    if not met.any():
        return NEVER, NEVER
    first = int(met.argmax())
    if first == 0:
        return START, START
    return float(curve.tokens[first - 1]), float(curve.tokens[first])


def ratio(baseline: float, own: float) -> float:
    """Baseline tokens over own tokens; 0 for an own `NEVER`, infinite for an own `START`."""
    if own == baseline:
        return 1.0  # also when neither had to train
    if own == START:
        return math.inf
    return baseline / own


def _rounded(values: Array) -> Array:
    """Without the last digits, in which two means of the same numbers may differ."""
    return np.round(values, 12)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Mean of seeds at the token counts that all of them logged."""
    if len(curves) == 1:
        return curves[0]
    shared = sorted(set.intersection(*(set(curve.tokens.tolist()) for curve in curves)))
    rows = [np.searchsorted(curve.tokens, shared) for curve in curves]
    # strict on purpose: every curve has its own rows of the shared points
    values = [curve.values[row] for curve, row in zip(curves, rows, strict=True)]
    documents: list[Array] = []
    for curve, row in zip(curves, rows, strict=True):
        if curve.documents is not None:
            documents.append(curve.documents[row])
    complete = len(documents) == len(curves) and len({each.shape for each in documents}) == 1
    return Curve(
        np.asarray(shared, dtype=np.float64),
        _rounded(np.mean(values, axis=0)),
        np.mean(documents, axis=0) if complete else None,
    )


def reached(
    own: Sequence[Curve],
    baseline: Sequence[Curve],
    pairs: Sequence[tuple[Curve, Curve]] = (),
    *,
    falling: bool = False,
    log: bool = False,
) -> Reached | None:
    """When the mean of `own` reaches the final value of the mean of `baseline`.

    The interval is, in this order: 95 % of a bootstrap over documents, the same documents for both
    curves, where every curve has them; the range over `pairs`, the seeds that both sides have,
    where there are several; else the logged points around the crossing. None where a side has no
    points.
    """
    if not own or not baseline:
        return None
    mine, other = mean_curve(own), mean_curve(baseline)
    if not len(mine.tokens) or not len(other.tokens):
        return None
    target = float(other.values[-1])
    at = position(mine, target, falling=falling, log=log)
    reference = position(other, target, falling=falling, log=log)
    same = mine.documents is not None and other.documents is not None
    if same and mine.documents.shape[1] == other.documents.shape[1]:  # type: ignore[union-attr]
        kind, ends = "documents", _document_ends(mine, other, falling, log)
    elif len(pairs) > 1:
        kind, ends = "seeds", _seed_ends(pairs, falling, log)
    else:
        kind = "points"
        low, high = bracket(mine, target, falling=falling)
        earliest, latest = bracket(other, target, falling=falling)
        ends = ((low, high), (ratio(earliest, high), ratio(latest, low)))
    between = None
    if START < at < NEVER and START < reference < NEVER:
        between = _span(ratio(reference, at), ends[1])
    return Reached(target, _span(at, ends[0]), reference, between, kind)


Ends = tuple[tuple[float, float], tuple[float, float]]  # of the position, of the ratio


def _span(value: float, ends: tuple[float, float]) -> Span:
    # the mean of seeds can cross a little outside of what the seeds do one by one
    return Span(value, min(value, ends[0]), max(value, ends[1]))


def _seed_ends(pairs: Sequence[tuple[Curve, Curve]], falling: bool, log: bool) -> Ends:
    """Smallest and largest over seeds, each against the baseline of its own seed."""
    found, ratios = [], []
    for mine, other in pairs:
        target = float(other.values[-1])
        found.append(position(mine, target, falling=falling, log=log))
        ratios.append(ratio(position(other, target, falling=falling, log=log), found[-1]))
    return (min(found), max(found)), (min(ratios), max(ratios))


def _document_ends(own: Curve, baseline: Curve, falling: bool, log: bool) -> Ends:
    """Percentiles of a bootstrap over the documents of the probe, paired between the curves."""
    assert own.documents is not None and baseline.documents is not None
    count = own.documents.shape[1]
    draws = resampled_counts(count)  # (S, D), whole numbers: equal answers give equal sums
    mine = _rounded(draws @ own.documents.T / count)  # (S, P)
    other = _rounded(draws @ baseline.documents.T / count)
    targets = other[:, -1]
    at = positions(own.tokens, mine, targets, falling=falling, log=log)
    reference = positions(baseline.tokens, other, targets, falling=falling, log=log)
    pairs = zip(reference.tolist(), at.tolist(), strict=True)
    return _quantiles(at), _quantiles(np.array([ratio(first, second) for first, second in pairs]))


def _quantiles(samples: Array) -> tuple[float, float]:
    # an observed sample, never a mean of two: infinity cannot be averaged
    ends = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = np.quantile(samples, ends, method="inverted_cdf")
    return float(low), float(high)

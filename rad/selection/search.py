"""Search over sets of layers: Bayesian optimisation, greedy, exhaustive, random (no torch).

RAD proposes points of the box [0, 1]^L and makes a set of each: the k largest coordinates when the
number of skips is given (top-k), those above one half when it is free (threshold) (RAD, section 3.1
and appendix D). Every point of the box is worth exactly what its set is worth, so the surrogate is
put on the sets themselves (`rad.selection.surrogate`). Candidates are the neighbours of the best
sets found and the sets of random points of the box; the next evaluation maximises expected
improvement.

Try it: `search(lambda chosen: -sum(chosen), 8, 3, evaluations=30)`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rad.selection.base import SelectionError
from rad.selection.surrogate import (
    Array,
    Kernel,
    Subset,
    SubsetProcess,
    expected_improvement,
    indicators,
)

Objective = Callable[[Subset], float]

RANDOM_CANDIDATES = 256  # random sets offered to the acquisition at every step
NEIGHBOURHOODS = 3  # sets, best first, whose neighbours are offered
ALWAYS_FITTED = 100  # up to so many sets the kernel is fitted anew at every step,
FITTED_EVERY = 25  # beyond at every so many: 48 factorisations are too many of a large matrix


def top_k(point: Array, size: int) -> Subset:
    """Indices of the `size` largest coordinates, ascending; ties go to the lower index."""
    order = np.argsort(-point, kind="stable")[:size]
    return tuple(sorted(int(index) for index in order))


def threshold(point: Array) -> Subset:
    """Indices of the coordinates above one half."""
    return tuple(int(index) for index in np.flatnonzero(point > 0.5))


def neighbours(chosen: Subset, items: int, *, free: bool = False) -> list[Subset]:
    """All sets that differ from `chosen` in one exchanged or, if `free`, one single element."""
    outside = [index for index in range(items) if index not in chosen]
    swapped = [
        tuple(sorted({*chosen, new} - {old})) for old, new in itertools.product(chosen, outside)
    ]
    if not free:
        return swapped
    return swapped + [tuple(sorted({*chosen} ^ {index})) for index in range(items)]


@dataclass
class SearchResult:
    """The best set and everything that was evaluated, in order."""

    best: Subset
    value: float
    history: list[tuple[Subset, float]]
    exhaustive: bool
    random: list[float] = field(default_factory=list)  # values of sets drawn at random
    method: str = "bayesian"

    def random_mean(self) -> float | None:
        """Mean objective of a random set: of all sets when exhaustive, else of those drawn."""
        values = [value for _, value in self.history] if self.exhaustive else self.random
        return float(np.mean(values)) if values else None

    def top(self, count: int) -> list[tuple[Subset, float]]:
        """The `count` best sets of the size asked for; ties go to the earlier one."""
        same = [pair for pair in self.history if self.exhaustive or self._allowed(pair[0])]
        return sorted(same, key=lambda pair: -pair[1])[:count]

    def ties(self) -> int:
        """Other sets found that are worth exactly as much; the one evaluated first is taken."""
        return sum(
            value == self.value and chosen != self.best and self._allowed(chosen)
            for chosen, value in self.history
        )

    def _allowed(self, chosen: Subset) -> bool:
        # greedy search passes through smaller sets on its way
        return self.method != "greedy" or len(chosen) == len(self.best)


class _Space:
    """The sets that may be chosen, and what is known of their values."""

    def __init__(
        self,
        objective: Objective,
        items: int,
        size: int | None,
        budget: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.items, self.size, self.budget = items, size, budget
        self.values: dict[Subset, float] = {}
        self._objective, self._progress = objective, progress
        self.count = 2**items if size is None else math.comb(items, size)

    def evaluate(self, chosen: Subset) -> float:
        value = float(self._objective(chosen))
        if not math.isfinite(value):
            raise SelectionError(
                f"the objective of skipping layers {list(chosen)} is {value}, not a finite number: "
                "look at the base's weights and the calibration corpus"
            )
        self.values[chosen] = value
        if self._progress is not None:
            best = max(self.values.values())
            self._progress(f"set {len(self.values)}/{self.budget}: best {best:.4f}")
        return value

    def of(self, point: Array) -> Subset:
        return threshold(point) if self.size is None else top_k(point, self.size)

    def every(self) -> Iterator[Subset]:
        """All sets, so that neighbours in the order share their first elements."""
        sizes = range(self.items + 1) if self.size is None else [self.size]
        for size in sizes:
            yield from itertools.combinations(range(self.items), size)

    def full(self) -> bool:
        return len(self.values) >= self.budget


def search(
    objective: Objective,
    items: int,
    size: int | None,
    *,
    evaluations: int,
    method: str = "auto",
    initial: int = 8,
    seed: int = 0,
    first: Iterable[Sequence[int]] = (),
    known: Mapping[Subset, float] | None = None,
    progress: Callable[[str], None] | None = None,
) -> SearchResult:
    """The set of `size` of `items` indices (None: of any size) with the largest objective.

    `method`: `bayesian`, `greedy` (one index at a time, `evaluations` does not bound it),
    `exhaustive`, `random`, or `auto`: exhaustive when there are no more sets than `evaluations`,
    else bayesian. `first` sets are tried before the `initial` random ones; `known` values of sets
    of any size inform the surrogate only. No set is evaluated twice. The result is a function of
    the arguments. Raises `SelectionError` when `size` is not in 0..`items`, when the sets are too
    many to try them all, and when a value is not finite.
    """
    if size is not None and not 0 <= size <= items:
        raise SelectionError(f"cannot choose {size} of {items} layers: expected 0 to {items}")
    if evaluations < 1:
        raise SelectionError("a search needs at least one evaluation")
    space = _Space(objective, items, size, evaluations, progress)
    if method == "auto":
        method = "exhaustive" if space.count <= evaluations else "bayesian"
    if method not in ("bayesian", "greedy", "exhaustive", "random"):
        raise SelectionError(f"unknown search {method!r}; known: bayesian, greedy, exhaustive")
    if method == "exhaustive" and space.count > evaluations:
        raise SelectionError(
            f"exhaustive search would try {space.count} sets, evaluations allows {evaluations}; "
            "raise evaluations or use search: bayesian"
        )
    space.budget = min(space.count, evaluations)
    drawn: list[float] = []
    if method == "exhaustive":
        for chosen in space.every():
            space.evaluate(chosen)
    elif method == "greedy":
        _greedy(space)
    else:
        rng = np.random.default_rng(seed)
        for given in first if method == "bayesian" else ():
            chosen = tuple(sorted(given))
            if chosen not in space.values and not space.full():
                space.evaluate(chosen)
        wanted = initial if method == "bayesian" else space.budget
        while len(drawn) < wanted and not space.full():
            chosen = space.of(rng.random(items))
            if chosen not in space.values:
                drawn.append(space.evaluate(chosen))
        _bayesian(space, rng, known or {})
    history = list(space.values.items())
    allowed = [pair for pair in history if size is None or len(pair[0]) == size]
    best, value = max(allowed, key=lambda pair: pair[1])
    return SearchResult(best, value, history, method == "exhaustive", drawn, method)


def _greedy(space: _Space) -> None:
    """Add the index that leaves the largest value, ties to the earlier one; O(L^2) evaluations."""
    chosen: Subset = ()
    last = space.items if space.size is None else space.size
    space.budget = sum(space.items - taken for taken in range(last)) + (not space.size)
    if not space.size:
        space.evaluate(chosen)
    while len(chosen) < last:
        grown = [
            tuple(sorted({*chosen, index})) for index in range(space.items) if index not in chosen
        ]
        chosen = max(grown, key=space.evaluate)


def _bayesian(space: _Space, rng: np.random.Generator, known: Mapping[Subset, float]) -> None:
    """Fill the budget, each time with the set that promises the largest improvement."""
    kernel: Kernel | None = None
    while not space.full():
        offered = _candidates(space, rng)
        informed = {**known, **space.values}
        if len(informed) > ALWAYS_FITTED and len(informed) % FITTED_EVERY:
            fixed = kernel
        else:
            fixed = None
        points = indicators(informed, space.items)
        process = SubsetProcess(points, np.array(list(informed.values())), fixed)
        kernel = process.kernel
        mean, deviation = process.predict(indicators(offered, space.items))
        best = max(space.values.values(), default=max(informed.values()))
        space.evaluate(offered[int(np.argmax(expected_improvement(mean, deviation, best)))])


def _candidates(space: _Space, rng: np.random.Generator) -> list[Subset]:
    """Sets not yet evaluated: around the best ones, and of random points of the box."""
    best = sorted(space.values, key=lambda chosen: -space.values[chosen])[:NEIGHBOURHOODS]
    free = space.size is None
    offered = [other for chosen in best for other in neighbours(chosen, space.items, free=free)]
    offered += [space.of(point) for point in rng.random((RANDOM_CANDIDATES, space.items))]
    # A dict keeps the order, so that ties do not depend on hashing.
    new = [chosen for chosen in dict.fromkeys(offered) if chosen not in space.values]
    # Empty only when the space is nearly used up and was missed by every draw.
    return new or [next(chosen for chosen in space.every() if chosen not in space.values)]

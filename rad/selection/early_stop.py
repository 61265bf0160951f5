"""When the K best candidates have stopped changing, more training does not change the placement.

KL-guided selection names a rolling Jaccard index and a "(K-1)-layer backbone" without numbers; the
numbers here are our defaults: stop when the top K of two successive checks differ by at most one
layer, three times in a row, with 15 % of the budget spent.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rad.selection.base import ranked


class StableTopK:
    """Whether a set of `count` candidates has been stable for `checks` checks in a row."""

    def __init__(self, count: int, *, checks: int = 3, share: float = 0.15) -> None:
        self.count, self.checks, self.share = count, checks, share
        # one layer of K exchanged gives (K-1)/(K+1); of a single one there is nothing left
        self.least = (count - 1) / (count + 1) if count > 1 else 1.0
        self.calm = 0
        self.history: list[list[int]] = []

    def update(self, chosen: Collection[int], spent: float) -> bool:
        """Add a check after the share `spent` of the budget; True when training can stop."""
        before = self.history[-1] if self.history else None
        self.history.append(sorted(chosen))
        if before is not None:
            union = set(before) | set(chosen)
            same = len(set(before) & set(chosen)) >= self.least * len(union) - 1e-9
            self.calm = self.calm + 1 if same else 0
        return self.calm >= self.checks and spent >= self.share


def top(losses: Sequence[float], layers: Sequence[int], count: int, highest: bool) -> list[int]:
    """The `count` of `layers` with the lowest (or highest) loss; ties: the earlier one."""
    order = ranked(losses, highest, "kl_guided")
    return [layers[index] for index in order[:count]]

"""Whether the intact base fits a probe: not at chance, not at its ceiling, and with how many pairs.

At chance a head has nothing to lose; at the ceiling an accuracy hides what a head contributes. The
selector therefore tunes the number of pairs until the intact base is right in 60-95 % of the
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rad.selection.base import SelectionError
from rad.selection.probes import ProbeTooLong
from rad.settings import RetrievalAwareSettings

LOWEST, HIGHEST = 0.60, 0.95
LADDER = (4, 8, 16, 32, 64, 100)
CEILING = 0.99
REMEDY = {
    "dictionary": "set pairs to fewer, or use probe nano, copy or repeat when the base never saw "
    "dictionaries",
    "nano": "lower tokens, or use probe copy or repeat when the base is not a nano model",
    "copy": "use probe repeat, which repeats text of the corpus",
    "repeat": "raise tokens, or use a base that copies",
}
HARDER = {
    "dictionary": "raise pairs, or leave it at auto",
    "nano": "raise tokens",
    "copy": "raise tokens",
    "repeat": "raise tokens",
}


def tune_pairs(accuracy_of: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The number of pairs that brings the accuracy to 60-95 %, or nearest, and all that were tried.

    `accuracy_of` raises `ProbeTooLong` for more pairs than the base has positions for; that is
    passed on when not even the fewest fit.
    """
    tried: dict[int, float] = {}
    easy, hard = 1, None
    for pairs in LADDER:
        try:
            tried[pairs] = accuracy_of(pairs)
        except ProbeTooLong:
            if not tried:
                raise
            break
        if tried[pairs] <= HIGHEST:
            hard = pairs
            break
        easy = pairs
    while hard is not None and tried[hard] < LOWEST and hard - easy > 1:
        middle = (easy + hard) // 2
        tried[middle] = accuracy_of(middle)
        if tried[middle] > HIGHEST:
            easy = middle
        else:
            hard = middle
    return min(tried, key=lambda pairs: (_distance(tried[pairs]), pairs)), tried


def _distance(accuracy: float) -> float:
    return max(LOWEST - accuracy, accuracy - HIGHEST, 0.0)


def check_chance(
    settings: RetrievalAwareSettings,
    accuracy: float,
    chance: float,
    rows: int,
    tried: Mapping[int, float] | None = None,
) -> str | None:
    """A warning when `accuracy` is not two standard errors above `chance`, else None.

    `tried`: accuracies by number of pairs, when that was tuned.

    Raises `SelectionError` with the same line when the settings want an error.
    """
    error = (chance * (1 - chance) / rows) ** 0.5
    if accuracy > chance + 2 * error:
        return None
    with_pairs = f" with {settings.pairs} pairs (tried: {sorted(tried)})" if tried else ""
    text = (
        f"probe {settings.probe}{with_pairs}: the intact base is right in {accuracy:.3f} of the "
        f"answers, chance is {chance:.3f} (standard error {error:.3f}): a ranking of heads would "
        f"be noise; {REMEDY[settings.probe]}"
    )
    if settings.unfit_probe == "error":
        raise SelectionError(text)
    return text


def check_ceiling(
    settings: RetrievalAwareSettings, accuracy: float, tied_at_the_cut: int
) -> str | None:
    """A warning when the intact base makes no mistakes, else None.

    Raises `SelectionError` when heads are ranked by accuracy and it does not separate the kept from
    the others.
    """
    if accuracy < CEILING:
        return None
    text = f"probe {settings.probe}: the intact base is right in {accuracy:.3f} of the answers"
    if settings.score == "margin":
        return f"{text}: differences of accuracy are cut off there, margins are not"
    if tied_at_the_cut and settings.unfit_probe == "error":
        raise SelectionError(
            f"{text} and {tied_at_the_cut} heads with the same drop of accuracy share the cut; use "
            f"score margin, or {HARDER[settings.probe]}"
        )
    return f"{text}: heads that are needed only for harder questions look useless"

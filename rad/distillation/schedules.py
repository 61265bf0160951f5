"""Learning-rate schedules in closed form: a function of the step, so that nothing is to be saved.

A schedule is the share of the way from the final rate (0) to the peak (1):

    rate(step) = final + (peak - final) * height(step)        after the warm-up
    rate(step) = peak * (step + 1) / warm-up steps            during it

Steps are counted from 0. Where a schedule falls, `p` is the share of the fall that is behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from rad.recipe_settings import StageSettings


def _constant(stage: StageSettings, step: int, warmup: int, steps: int) -> float:
    return 1.0


def _cosine(stage: StageSettings, step: int, warmup: int, steps: int) -> float:
    """(1 + cos(pi p)) / 2 from the end of the warm-up to the last step."""
    return _fall(step, warmup, steps)


def _wsd(stage: StageSettings, step: int, warmup: int, steps: int) -> float:
    """Warm-up, stable, decay: linear over the last `decay_fraction` of the steps (MOHAWK)."""
    start = max(warmup, steps - math.ceil(stage.decay_fraction * steps))
    if step < start:
        return 1.0
    return 1.0 - (step - start + 1) / (steps - start)


def _stable_cosine_stable(stage: StageSettings, step: int, warmup: int, steps: int) -> float:
    """Peak, a cosine between two shares of the steps, final (RADLADS, step 2a)."""
    return _fall(step, max(warmup, stage.decay_from * steps), stage.decay_to * steps)


def _fall(step: int, start: float, end: float) -> float:
    """Half a cosine from 1 at `start` to 0 at `end`."""
    p = min(1.0, max(0.0, (step - start) / max(1.0, end - start)))
    return (1 + math.cos(math.pi * p)) / 2


SCHEDULES: dict[str, Callable[[StageSettings, int, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "wsd": _wsd,
    "stable_cosine_stable": _stable_cosine_stable,
}


def warmup_steps(stage: StageSettings, steps: int) -> int:
    """Steps of linear warm-up; all but the last at most."""
    if stage.warmup_steps is not None:
        return min(stage.warmup_steps, steps - 1)
    return math.ceil(stage.warmup_fraction * steps)


def rate(
    stage: StageSettings, step: int, steps: int, peak: float = 1.0, final: float | None = None
) -> float:
    """Learning rate of a step (counted from 0) of a group with this `peak` and `final` rate.

    `final` is `final_fraction` of the peak unless given.
    """
    warmup = warmup_steps(stage, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if final is None:
        final = stage.final_fraction * peak
    return final + (peak - final) * SCHEDULES[stage.schedule](stage, step, warmup, steps)

"""Selection: which (layer, head) pairs of a base stay softmax attention under a budget.

One file per selector; `select(context)` runs the one that the settings name. No torch is imported
before a selector that needs it runs.
"""

from rad.selection.base import (
    SELECTORS,
    CostMeter,
    SelectionContext,
    SelectionError,
    calibration_rows,
    load_selector,
    select,
)

__all__ = [
    "SELECTORS",
    "CostMeter",
    "SelectionContext",
    "SelectionError",
    "calibration_rows",
    "load_selector",
    "select",
]

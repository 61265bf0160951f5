"""Activation MSE: keep the layers whose absence moves the base's last hidden state furthest.

The authors' script is not public; the rule is our default for the KL-guided paper's name: the
attention output of one layer is zero, and layers rank by the squared distance between the final
hidden states, before the last norm, with and without it.

Legend: B batch, T time, E hidden size.
"""

from __future__ import annotations

from torch import Tensor

from rad.field_settings import ActivationMseSettings
from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, ranked
from rad.selection.layer_moves import (
    TextBatch,
    Trunk,
    stand_ins,
    sweep,
    text_batches,
)


def select(context: SelectionContext) -> Placement:
    """Keep the K layers with the largest mean squared distance on calibration rows.

    Needs a corpus; `move: linearise` also the resources `mixer` and `aligned`.
    """
    settings = context.settings
    assert isinstance(settings, ActivationMseSettings)
    context.layer_count()  # a budget that cannot be met ends the job before any work
    batches = text_batches(context.need_corpus(), settings.rows, settings.batch_size, settings.seed)
    modules = stand_ins(context, settings.move)
    _, changed = sweep(context, batches, modules, distance, "activation_mse")
    scores = changed[:, 0].tolist()
    return context.layer_placement(
        context.best_layers(scores),
        scores=Scores(
            kind="layer",
            name="mean squared change of the last hidden state without the layer's attention",
            values=scores,
        ),
        provenance={"ranking": ranked(scores, True, "activation_mse")},
    )


def distance(trunk: Trunk, hidden: Tensor, batch: TextBatch) -> tuple[Tensor, float]:
    """Sum (1,) over tokens that count of the mean square of `hidden` (B,T,E) less the base's."""
    counts = (batch[1] > 0).to(hidden.device)
    square = (hidden - trunk.hidden).float().square().mean(-1)
    return (square * counts).sum()[None], float(counts.sum())

"""LM-PPL: keep the layers without whose attention the base predicts text worst.

The authors' script is not public; the rule is our default for the KL-guided paper's name: the
attention output of one layer is zero and layers rank by the rise of perplexity. The score is the
rise of cross entropy, which ranks alike and does not overflow.
"""

from __future__ import annotations

import math

from rad.field_settings import LmPplSettings
from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, ranked
from rad.selection.layer_moves import stand_ins, sweep, text_batches, text_loss


def select(context: SelectionContext) -> Placement:
    """Keep the K layers whose absence raises the loss on calibration rows most.

    Needs a corpus; `move: linearise` also the resources `mixer` and `aligned`.
    """
    settings = context.settings
    assert isinstance(settings, LmPplSettings)
    context.layer_count()  # a budget that cannot be met ends the job before any work
    batches = text_batches(context.need_corpus(), settings.rows, settings.batch_size, settings.seed)
    modules = stand_ins(context, settings.move)
    intact, changed = sweep(context, batches, modules, text_loss, "lm_ppl")
    scores = (changed - intact)[:, 0].tolist()
    return context.layer_placement(
        context.best_layers(scores),
        scores=Scores(
            kind="layer",
            name="rise of cross entropy without the layer's attention (nats per token)",
            values=scores,
        ),
        provenance={
            "intact_perplexity": math.exp(float(intact[0])),
            "ranking": ranked(scores, True, "lm_ppl"),
        },
    )

"""Stage 1: the mixers of *all* layers learn their attention's output, once per base and mixer.

Every run that starts `aligned`, and KL-guided selection, starts from this folder (the alignment
stage of KL-guided selection, section 2.1; hidden-state alignment of MOHAWK).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rad.data.corpus import Corpus
from rad.distillation import loop
from rad.distillation import state as states
from rad.distillation.batches import held_out
from rad.distillation.layerwise import align_layer, layer_calls
from rad.distillation.run import save_aligned, versions
from rad.files import digest, write_json
from rad.kernels.selftest import require
from rad.models import sources
from rad.models.convert import convert
from rad.models.kernel_check import kernel_records
from rad.placement import Placement
from rad.settings import AlignmentSettings

HELD_OUT_ROWS = 32


def align(
    base_record: Mapping[str, Any],
    mixer: Mapping[str, Any],
    settings: AlignmentSettings,
    *,
    corpus: Path,
    state: Path,
    output: Path,
    device: str = "cpu",
) -> None:
    """Write `mixers.safetensors` and `alignment.json` under `output`; resumable like any job."""
    base = sources.load(
        base_record["source"], revision=base_record["revision"], dtype=base_record["dtype"]
    )
    base.to(device).requires_grad_(False)
    nothing = Placement(
        base=base_record["name"],
        layers=base_record["layers"],
        heads=base_record["heads"],
        kv_heads=base_record["kv_heads"],
        softmax=[],
        selector="none",
    )
    student = convert(base, nothing, mixer, settings.initialisation, seed=settings.seed)
    data = Corpus(corpus)
    what = {
        "base_weights_sha256": base_record["weights_sha256"],
        "mixer": dict(mixer),
        "settings": settings.model_dump(mode="json"),
        "corpus": data.manifest["settings_sha256"],
    }
    kernels = kernel_records(student)
    require(kernels)
    before = layer_errors(base, student, data, settings)
    job = loop.Job(
        student=student,
        base=base,
        teacher=base,
        corpus=data,
        stages=[settings.stage()],
        seed=settings.seed,
        digest=digest(what),
        state=state,
        autocast=settings.autocast,
        title=f"align {base_record['name']} {mixer['type']}",
    )
    records = loop.train(job)
    after = layer_errors(base, student, data, settings)
    with states.space(output, "the job goes on from its last good state"):
        save_aligned(student, output)
        write_json(
            output / "alignment.json",
            {
                "schema": 1,
                **what,
                "held_out_error_before": before,
                "held_out_error_after": after,
                "cost": {"tokens": records[-1]["tokens"], "seconds": job.seconds},
                "losses": [record["train_loss"] for record in records],
                "kernels": kernels,
                "versions": versions(),
            },
        )
    states.discard(state)


@torch.no_grad()
def layer_errors(
    base: Any, student: Any, corpus: Corpus, settings: AlignmentSettings
) -> list[float]:
    """Held-out alignment loss of every layer: (L,), in the unit and distance that are trained."""
    batch, stage = held_out(corpus, HELD_OUT_ROWS).to(base.device), settings.stage()
    counted = (batch.weight > 0).float()
    return [
        align_layer(call, student, counted, stage).item()
        for call in layer_calls(base, batch.tokens)
    ]

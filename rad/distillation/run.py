"""One run of the grid: spec + placement -> converted, distilled, saved hybrid with its curve."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rad.data.corpus import Corpus
from rad.distillation import loop
from rad.distillation import state as states
from rad.distillation.measure import HeldOut, Probe
from rad.files import replacing, write_json, write_text
from rad.kernels.selftest import require
from rad.models import sources
from rad.models.convert import convert
from rad.models.kernel_check import kernel_records
from rad.placement import Budget, Placement
from rad.settings import RecipeSettings
from rad.study import training_digest


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import torch
    import transformers

    import rad

    return {
        "rad": rad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def distil(
    spec: Mapping[str, Any],
    placement: Placement,
    *,
    corpus: Path,
    state: Path,
    output: Path,
    aligned: Path | None = None,
    probe: Callable[[Any], Probe] | None = None,
) -> None:
    """Write `model/`, `curve.jsonl`, `training.json` and `placement.json` under `output`.

    `probe` builds a task probe from the tokenizer. Raises `ValueError` with one line on a placement
    that misses the budget, `loop.Interrupted` after a signal.
    """
    import torch

    placement.check_budget(Budget.model_validate(spec["budget"]))
    base = _load(spec["base"])
    tokenizer = sources.load_tokenizer(spec["base"]["source"], revision=spec["base"]["revision"])
    student = convert(
        base,
        placement,
        spec["mixer"],
        spec["initialisation"],
        seed=spec["seed"],
        aligned=aligned,
    )
    recipe = RecipeSettings.model_validate(
        {key: value for key, value in spec["recipe"].items() if key != "name"}
    )
    self_taught = spec["teacher"]["name"] == "self" or not recipe.stages
    teacher = base if self_taught else _load(spec["teacher"])
    for model in (base, teacher):
        model.requires_grad_(False)
    kernels = []
    if recipe.stages:
        kernels = kernel_records(student)
        require(kernels)  # a wrong gradient trains without complaint
    data = Corpus(corpus)
    held_out = HeldOut(data, base, teacher, probe=probe(tokenizer) if probe else None)
    job = loop.Job(
        student=student,
        base=base,
        teacher=teacher,
        corpus=data,
        stages=recipe.stages,
        seed=spec["seed"],
        digest=training_digest(spec),
        state=state,
        measure=held_out,
        log_points=recipe.log_points,
        save_every_seconds=recipe.save_every_seconds,
        title=spec["run"],
    )
    if recipe.stages:
        records = loop.train(job)
    else:
        records = [{"step": 0, "tokens": 0, "stage": 0, "seconds": 0.0, **held_out(student)}]
    last = records[-1]
    placement.save(output / "placement.json")
    write_text(output / "curve.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    write_json(
        output / "training.json",
        {
            "schema": 1,
            "run": spec["run"],
            "tokens": last["tokens"],
            "steps": last["step"],
            "seconds": job.seconds,
            "tokens_per_second": last["tokens"] / job.seconds if job.seconds else 0.0,
            "peak_memory_mib": last.get("peak_memory_mib"),
            "resumed": job.resumed,
            "threads": torch.get_num_threads(),
            "spec_sha256": training_digest(spec),
            "kernels": kernels,
            "versions": versions(),
        },
    )
    save_model(student, tokenizer, output / "model")
    states.discard(state)


def _load(model: Mapping[str, Any]) -> Any:
    return sources.load(model["source"], revision=model["revision"], dtype=model["dtype"])


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face checkpoint folder; weights are renamed into place last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as name:
        temporary = Path(name)
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
        files = sorted(temporary.iterdir(), key=lambda file: file.name.endswith(".safetensors"))
        for file in files:
            os.replace(file, folder / file.name)


def save_aligned(student: Any, folder: Path) -> None:
    """`mixers.safetensors` of an all-mixer student: mixer parameters and o_proj, layer by layer."""
    from safetensors.torch import save_file

    tensors = {}
    for index, layer in enumerate(student.model.layers):
        attention = layer.self_attn
        for name, parameter in attention.mixer.named_parameters():
            tensors[f"layers.{index}.{name}"] = parameter.detach().contiguous()
        for name, parameter in attention.o_proj.named_parameters():
            tensors[f"layers.{index}.o_proj.{name}"] = parameter.detach().contiguous()
    with replacing(folder / "mixers.safetensors") as temporary:
        save_file(tensors, str(temporary))

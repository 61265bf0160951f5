"""One run of the grid: spec + placement -> converted, distilled, saved hybrid with its curve."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rad.data.corpus import Corpus
from rad.distillation import loop, parallel
from rad.distillation import state as states
from rad.distillation.measure import HeldOut, Probe
from rad.distillation.speed import bfloat16_in_hardware
from rad.distillation.targets import align_vocabulary, check_head, head_of
from rad.distillation.teachers import StoredTeacher
from rad.files import digest, replacing, write_json, write_text
from rad.kernels.selftest import require
from rad.models import sources
from rad.models.convert import convert
from rad.models.kernel_check import kernel_records
from rad.placement import Budget, Placement
from rad.settings import RecipeSettings
from rad.study import training_digest


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
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
    teacher_outputs: Path | None = None,
    teacher_sha256: str | None = None,
    teacher_wait: float | None = None,
    device: str = "cpu",
) -> None:
    """Write `model/`, `curve.jsonl`, `training.json` and `placement.json` under `output`.

    With several processes models stay on the CPU until they are cut (`parallel.sharded`).
    `probe` builds a task probe from the tokenizer. `teacher_outputs` is a folder of stored outputs
    of the teacher (whose weights have the digest `teacher_sha256`), which is then not loaded; with
    `teacher_wait` (minutes) they may still be being written.
    Raises `ValueError` with one line on a placement that misses the budget, a stage shorter than a
    step, or a full disk; `loop.Interrupted` after a signal.
    """
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
    data = Corpus(corpus)
    taught = any(stage.loss == "kl" and stage.kl_weight for stage in recipe.stages)
    self_taught = spec["teacher"]["name"] == "self" or not taught
    # in pieces on the GPUs, when several processes share the job
    whole = "cpu" if parallel.active() and recipe.stages else device
    for model in (base, student):
        model.to(whole)
    base.requires_grad_(False)
    check_head(base)
    teacher: Any = base
    vocabulary = None
    if not self_taught and teacher_outputs is not None:
        teacher = StoredTeacher(
            teacher_outputs,
            data,
            vocab_size=head_of(student).vocabulary,
            teacher_sha256=teacher_sha256,
            device=device,
            wait_minutes=teacher_wait,
        )
        vocabulary = teacher.vocabulary
    elif not self_taught:
        teacher = _load(spec["teacher"]).to(whole).requires_grad_(False)
        check_head(teacher)
        vocabulary = _vocabulary(student, teacher, tokenizer, spec)
    kernels = []
    if recipe.stages:
        kernels = kernel_records(student, device if parallel.active() else None)
        require(kernels)  # a wrong gradient trains without complaint
    held_out = HeldOut(
        data,
        base,
        teacher,
        probe=probe(tokenizer) if probe else None,
        vocabulary=vocabulary,
        device=device,
    )
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
        log_tokens=recipe.log_tokens,
        save_every_seconds=recipe.save_every_seconds,
        title=spec["run"],
        keep_best=recipe.keep != "last",
        autocast=recipe.autocast,
        activation_checkpointing=recipe.activation_checkpointing,
        compile=recipe.compile,
        vocabulary=vocabulary,
    )
    if recipe.stages:
        records = loop.train(job)
    else:
        records = [{"step": 0, "tokens": 0, "stage": 0, "seconds": 0.0, **held_out(student)}]
    if not parallel.first():
        return  # the first process has the whole student
    student = job.student
    with states.space(output, "the job goes on from its last good state"):
        placement.save(output / "placement.json")
        # sorted, as records that went through a state are: a resumed curve is the same file
        lines = [json.dumps(record, sort_keys=True) + "\n" for record in records]
        write_text(output / "curve.jsonl", "".join(lines))
        where = torch.device(device) if parallel.active() else student.device
        write_json(output / "training.json", _training(spec, job, records, kernels, where))
        _save_models(student, tokenizer, recipe, job, output)
    states.discard(state)


def _vocabulary(student: Any, teacher: Any, tokenizer: Any, spec: Mapping[str, Any]) -> int | None:
    """Rows of the heads that are compared; None: all, because both have the same."""
    mine, theirs = (head_of(model).vocabulary for model in (student, teacher))
    if mine == theirs:
        return None
    digests = [spec[who].get("tokenizer_sha256") for who in ("base", "teacher")]
    if None in digests:
        other = sources.load_tokenizer(
            spec["teacher"]["source"], revision=spec["teacher"]["revision"]
        )
        digests = [digest(each.get_vocab()) for each in (tokenizer, other)]
    return align_vocabulary(
        mine, theirs, len(tokenizer), student_tokenizer=digests[0], teacher_tokenizer=digests[1]
    )


def _training(
    spec: Mapping[str, Any],
    job: loop.Job,
    records: list[loop.Record],
    kernels: list[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """The content of `training.json`."""
    last = records[-1]
    return {
        "schema": 1,
        "run": spec["run"],
        "tokens": last["tokens"],
        "steps": sum(job.steps(stage) for stage in job.stages),
        "seconds": job.seconds,
        "tokens_per_second": last["tokens"] / job.seconds if job.seconds else 0.0,
        "model_flops_per_second": last.get("model_flops_per_second"),
        "peak_memory_mib": last.get("peak_memory_mib"),
        "best": job.best or None,
        "autocast": job.autocast and bfloat16_in_hardware(device),
        "resumed": job.resumed,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "spec_sha256": training_digest(spec),
        "kernels": kernels,
        "versions": versions(),
    }


def _save_models(
    student: Any, tokenizer: Any, recipe: RecipeSettings, job: loop.Job, output: Path
) -> None:
    """`model/` with the last or the best weights, and `best/` when both are wanted."""
    best = None if job.state is None else job.state / loop.BEST
    if recipe.keep == "both":
        save_model(student, tokenizer, output / "model")
    if recipe.keep != "last" and recipe.stages and best is not None:
        states.load_weights(best, student)
        save_model(student, tokenizer, output / ("best" if recipe.keep == "both" else "model"))
    elif recipe.keep != "both":
        save_model(student, tokenizer, output / "model")


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

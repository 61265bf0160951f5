"""What scoring a model costs: prompts once, answers token by token."""

from __future__ import annotations

from typing import Any

from rad.estimate import flops
from rad.estimate.activations import WIDE
from rad.estimate.jobs import Hardware, Job, halves
from rad.estimate.memory import Memory
from rad.estimate.shapes import BYTES, Model, Shape

# tokens of a worked example, of a function, of a nano task; documents of a task that names none
SHOT_TOKENS, CODE_TOKENS, NANO_TOKENS, DOCUMENTS = 200, 400, 96, 1000


def scored(settings: Any, hardware: Hardware, name: str, model: Model, dtype: str) -> Job:
    """Prompts once, answers token by token; keys and values of a full batch."""
    job = Job("evaluate", name, users=[name])
    longest, logits = 1, 0.0
    for task in settings.tasks.values():
        prompts = _prompts(task, settings, model.shape)
        for length in prompts:
            answer = (
                0 if task.kind == "perplexity" else int(getattr(task, "max_new_tokens", None) or 0)
            )
            documents = int(getattr(task, "samples", None) or DOCUMENTS)
            documents *= max(1, len(getattr(task, "subtasks", [])))
            job.tokens += documents * (length + answer)
            job.flops += documents * flops.forward(model, length, head=False)
            job.flops += documents * answer * flops.decode(model, length + answer // 2)
            if task.kind == "perplexity":
                head = 2.0 * length * model.shape.vocabulary * model.shape.hidden
                job.flops += documents * head
                full = length * model.shape.vocabulary * (2 * WIDE + BYTES[dtype])
                logits = max(logits, settings.batch_size * full)
            longest = max(longest, length + answer)
    width, s = BYTES[dtype], model.shape
    tokens = settings.batch_size * longest
    cache = tokens * sum(2 * layer.kv_heads * s.head_dim * width for layer in model.layers)
    cache += settings.batch_size * sum(layer.state_bytes(width) for layer in model.layers)
    active = tokens * width * (3 * s.hidden + 3 * s.mlp)
    logits = max(logits, settings.batch_size * s.vocabulary * 2.0 * WIDE)
    weights = model.weight_bytes(dtype)
    job.memory = Memory(weights, 0.0, 0.0, active + cache, logits, 0.0, "prefill")
    job.fits = job.memory.total <= hardware.gpu.memory
    if not job.fits:
        job.remedy = _smaller(job.memory, settings.batch_size, hardware)
    job.gpu_hours = hardware.hours(job.flops, dtype != "float32")
    return job


def _smaller(memory: Memory, batch: int, hardware: Hardware) -> str:
    """The largest batch that fits; everything but the weights grows with it."""
    for rows in halves(batch):
        rest = (memory.total - memory.weights) * rows / batch
        if memory.weights + rest <= hardware.gpu.memory:
            return f"evaluation.batch_size: {rows}"
    return ""


def _prompts(task: Any, settings: Any, shape: Shape) -> list[int]:
    """Lengths of a task's prompts in tokens."""
    if getattr(task, "lengths", None):
        return [int(length) for length in task.lengths]
    if task.kind == "perplexity":
        limit = settings.max_length or 2048
        return [min(limit, shape.max_positions or limit)]
    if task.kind == "gsm8k":
        return [SHOT_TOKENS * ((getattr(task, "shots", None) or 0) + 1)]
    return [CODE_TOKENS if task.kind == "crux" else NANO_TOKENS]

"""AR, AR-MH, VT and CWE: keep the layers whose silence costs a recall task most.

The layer ablations that KL-guided selection compares itself with: the
attention of one layer of the base adds nothing (or its aligned mixer takes over), the base answers
prompts, and a layer is worth what its absence costs. Prompts are our own wording of the tasks; the
published scoring looks for the answer in generated text, ours asks by default that every token of
the answer be the most likely one, which is the greedy answer word for word and needs one pass.

Legend: B batch, T time, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rad.field_settings import RecallAblationSettings
from rad.placement import Placement, Scores
from rad.selection import recall_probes
from rad.selection.agreement import spearman
from rad.selection.base import SelectionContext, SelectionError, ranked
from rad.selection.layer_moves import Trunk, silenced, stand_ins, sweep
from rad.selection.recall_probes import Answers, Question


def select(context: SelectionContext) -> Placement:
    """Keep the K layers whose ablation costs most accuracy (or log-probability) on the task.

    Raises `SelectionError` when the intact base is at chance, or when no layer's loss costs
    anything; `move: linearise` needs the resources `mixer` and `aligned`.
    """
    settings = context.settings
    assert isinstance(settings, RecallAblationSettings)
    task, kept = settings.method, context.layer_count()
    if settings.scoring == "generated" and settings.metric != "accuracy":
        raise SelectionError(f"{task}: scoring generated has no {settings.metric}; use forced")
    asked = recall_probes.questions(
        task,
        settings.style,
        context.tokenizer,
        settings.samples,
        pairs=settings.pairs,
        tokens=settings.tokens,
        seed=settings.seed,
    )
    if settings.scoring == "generated":
        intact, changed = generated(context, asked)
    else:
        base = context.need_model()
        parts = recall_probes.batches(
            context.tokenizer, asked, settings.batch_size, base.config.max_position_embeddings
        )
        modules = stand_ins(context, settings.move)
        intact, changed = sweep(context, parts, modules, answer_score, task)
    accuracy = float(intact[0])
    check_probe(task, asked, accuracy)
    column = 0 if settings.metric == "accuracy" else 1
    drops = (intact - changed).T.tolist()
    scores = drops[column]
    if 0 < kept < context.layers:
        check_drops(task, accuracy, scores)
    record: dict[str, Any] = {
        "intact_accuracy": accuracy,
        "at_ceiling": accuracy == 1.0,
        "chance": max(question.chance for question in asked),
        "prompts": len(asked),
        "accuracy_drop": drops[0],
    }
    if len(drops) > 1:
        record["log_probability_drop"] = drops[1]
        record["spearman_of_the_two"] = spearman(drops[0], drops[1])
    unit = {"accuracy": "share of prompts", "log_probability": "nats per answer"}[settings.metric]
    return context.layer_placement(
        context.best_layers(scores),
        scores=Scores(
            kind="layer",
            name=f"drop of {task} {settings.metric.replace('_', ' ')} without the layer ({unit})",
            values=scores,
        ),
        provenance={"probe": record, "ranking": ranked(scores, True, settings.method)},
    )


def answer_score(trunk: Trunk, hidden: Tensor, batch: Answers) -> tuple[Tensor, float]:
    """Sums over rows of exact answers and of answers' log-probabilities (2,), and the row count."""
    rows, places = batch.asked[:, 1:].nonzero(as_tuple=True)
    rows, places = rows.to(hidden.device), places.to(hidden.device)
    targets = batch.tokens[:, 1:].to(hidden.device)[rows, places]
    # the state before a token predicts it
    logits = trunk.logits(hidden[rows, places])
    own = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    count = len(batch.tokens)
    wrong = torch.zeros(count, device=hidden.device)
    wrong = wrong.index_add(0, rows, (logits.argmax(-1) != targets).float())
    return torch.stack([(wrong == 0).float().sum(), own.sum()]), float(count)


def check_probe(task: str, asked: Sequence[Question], accuracy: float) -> None:
    """Raise `SelectionError` when `accuracy` is what guessing gives."""
    chance = max(question.chance for question in asked)
    noise = 2 * math.sqrt(max(chance * (1 - chance), 0.25 / len(asked)) / len(asked))
    if accuracy <= chance + noise:
        raise SelectionError(
            f"{task}: the intact base answers {accuracy:.3f} of {len(asked)} prompts, guessing "
            f"gives {chance:.3f}: layers cannot be ranked by it; make the prompts easier (pairs, "
            "tokens, style), take more samples, or use another selector"
        )


def check_drops(task: str, accuracy: float, drops: Sequence[float]) -> None:
    """Raise `SelectionError` when all layers cost the same: the probe is too easy, or too hard."""
    if len(set(drops)) == 1:
        raise SelectionError(
            f"{task}: the intact base answers {accuracy:.3f} of the prompts and no layer's absence "
            "tells them apart; make the prompts longer (pairs, tokens), take more samples, or use "
            "metric log_probability"
        )


@torch.no_grad()
def generated(context: SelectionContext, asked: Sequence[Question]) -> tuple[Tensor, Tensor]:
    """Accuracy of the intact base (1,) and with each layer changed (L, 1), by generating.

    As published: up to `max_new_tokens` greedy tokens, correct when they contain the answer.
    """
    settings = context.settings
    assert isinstance(settings, RecallAblationSettings)
    model, tokenizer = context.need_model(), context.tokenizer
    size = sum(parameter.numel() for parameter in model.parameters())
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token

    def accuracy() -> float:
        right = 0
        for first in range(0, len(asked), settings.batch_size):
            part = asked[first : first + settings.batch_size]
            inputs = tokenizer(
                [q.prompt for q in part], return_tensors="pt", padding=True, padding_side="left"
            )
            inputs = {
                name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")
            }
            output = model.generate(
                **inputs,
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            fresh = output[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(fresh, skip_special_tokens=True)
            right += sum(q.answer.strip() in text for q, text in zip(part, texts, strict=True))
            context.meter.add(output.numel(), int(fresh.shape[1]), weights=size)
        return right / len(asked)

    # a silenced layer still fills its cache, whose length the others rely on
    if settings.move != "zero":
        raise SelectionError(f"{settings.method}: scoring generated goes with move zero only")
    rows = [accuracy()]
    for layer in range(context.layers):
        with silenced(model, [layer]):
            rows.append(accuracy())
        context.progress(f"{settings.method}: layer {layer}: accuracy {rows[-1]:.3f}")
    means = torch.tensor(rows, dtype=torch.float64)[:, None]
    return means[0], means[1:]

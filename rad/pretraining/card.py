"""The model card of a nano checkpoint: what it is, how it was made, what it scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rad.data.nano.mixture import PROMPT_WEIGHT, SHARES
from rad.pretraining.probe import TASKS, ablation, score
from rad.pretraining.recipes import RECIPES, Phase

Scores = dict[str, dict[str, dict[str, float]]]


def draw_ablation(result: dict[str, Any], path: Path, title: str) -> None:
    """Heat maps (layer x query head) of what zeroing one head costs; written as `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    plt.rcParams["svg.hashsalt"] = "nano"  # the same picture gives the same file
    nats = np.asarray(result["log_probability_drop"])
    hits = 100 * np.asarray(result["accuracy_drop"])
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 0.32 * len(nats) + 1.5), layout="constrained")
    panels = ((nats, "answer log-probability lost (nats)", "{:.2f}"),
              (hits, "accuracy lost (points)", "{:.0f}"))  # fmt: skip
    for axis, (values, label, pattern) in zip(axes, panels, strict=True):
        top = max(float(values.max()), 1e-6)
        axis.imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
        axis.set_title(label, fontsize=9)
        axis.set_xlabel("query head", fontsize=8)
        axis.set_ylabel("layer", fontsize=8)
        axis.set_xticks(range(values.shape[1]))
        axis.set_yticks(range(values.shape[0]))
        axis.tick_params(labelsize=7)
        for row in range(values.shape[0]):
            for column in range(values.shape[1]):
                value = float(values[row, column])
                ink = "white" if value > 0.6 * top else "black"
                text = pattern.format(value).replace("-0.00", "0.00")
                text = "0" if text == "-0" else text
                axis.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _cell(value: dict[str, float]) -> str:
    if "nats" in value:
        return f"{value['nats']:.3f} nats/token"
    return f"{100 * value['score']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def score_table(scores: Scores) -> str:
    """Markdown: a row per task, a column per split."""
    splits = list(scores)
    lines = ["| task | " + " | ".join(splits) + " |", "|---" * (len(splits) + 1) + "|"]
    for task in TASKS:
        if task in scores[splits[0]]:
            cells = " | ".join(_cell(scores[split][task]) for split in splits)
            lines.append(f"| {task} | {cells} |")
    return "\n".join(lines)


def top_heads(result: dict[str, Any], count: int = 8) -> list[tuple[int, int, float, float]]:
    """(layer, head, nats lost, accuracy lost), the largest loss first."""
    nats, hits = result["log_probability_drop"], result["accuracy_drop"]
    heads = [
        (layer, head, value, hits[layer][head])
        for layer, row in enumerate(nats)
        for head, value in enumerate(row)
    ]
    return sorted(heads, key=lambda item: -item[2])[:count]


def _phase_line(phase: Phase) -> str:
    parts = [f"{phase.kind}: "]
    if phase.kind == "induction":
        parts.append(
            f"at most {phase.steps} steps of {phase.rows} x {phase.context} tokens, blocks of "
            f"{phase.block[0]}-{phase.block[1]} tokens, active heads per layer "
            f"{list(phase.active_heads or ())}, until the loss falls under {phase.threshold}"
        )
    else:
        steps = phase.steps if phase.stop is None else phase.stop
        parts.append(f"{steps} steps of {phase.rows} x {phase.context} tokens")
    parts.append(f", lr {phase.learning_rate:g}")
    if phase.final < 1:
        parts.append(f" (cosine over {phase.steps} steps to {phase.final:g} of it)")
    if phase.grow is not None:
        parts.append(f", grown to {len(phase.grow)} layers by the plan `{list(phase.grow)}`")
    if phase.rounded:
        parts.append(", weights rounded to bf16 first")
    if phase.kind == "mixture":
        shares = ", ".join(f"{k} {v:g}" for k, v in dict(phase.shares or SHARES).items())
        parts.append(
            f"; documents {shares}; above the easy level {phase.hard_share:g}, of these at the "
            f"level of `hard` {phase.top_share:g}; {phase.crux_turns} calls per function; "
            f"variable tracing `{phase.trace}`"
        )
    return "".join(parts)


def _phases(size: str) -> str:
    phases = RECIPES[size].phases
    return "\n".join(f"{i}. {_phase_line(phase)}" for i, phase in enumerate(phases, 1))


def write_card(
    folder: Path,
    size: str,
    *,
    training: dict[str, Any],
    scores: Scores,
    result: dict[str, Any] | None,
    count: int,
) -> None:
    """Write README.md (and for an ablation its JSON and picture) into the checkpoint folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    recipe = RECIPES[size]
    parent = f"nano:{recipe.parent}" if recipe.parent else "nothing (random weights)"
    shape = [config[k] for k in ("num_hidden_layers", "hidden_size", "intermediate_size")]
    heads = [config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim")]
    facts = {
        "layers / width / MLP": " / ".join(map(str, shape)),
        "query heads / KV heads / head size": " / ".join(map(str, heads)),
        "vocabulary, embeddings": f"{config['vocab_size']} (byte-level BPE, single digits), tied",
        "parameters": f"{training['parameters']:,}",
        "training context": "128 tokens",
        "started from": parent,
        "tokens": f"{training['tokens']:,}{training.get('tokens_note', '')}",
        "seed": training["seed"],
        "wall time": f"{training['seconds']} s, {training.get('hardware', 'one CPU core')}",
        "data": "generated by `rad.data.nano` (task mixture, no downloaded text)",
        "command": f'`rad.pretraining.loop.pretrain("{size}", output, seed={training["seed"]})`',
        "licence": "Apache-2.0, as the package",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = f"""# nano:{size}

A small Llama-architecture model that does small versions of three benchmarks (word problems,
output prediction for short Python functions, finding values in a context). Made for experiments
on converting Transformers; of no use outside these generated tasks.

| | |
|---|---|
{table}

## Recipe

AdamW (0.9, {recipe.beta2}), weight decay {recipe.weight_decay}, gradient clip {recipe.clip}; answer
tokens weigh 1, prompt tokens {PROMPT_WEIGHT}.

{_phases(size)}

## Scores

Exact match in percent with 95 % intervals, greedy, {count} examples per cell; retrieval tasks at
128 tokens. Word problems count the number after `####`, everything else the whole answer.

{score_table(scores)}
"""
    if result is not None:
        (folder / "ablation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw_ablation(
            result, folder / "ablation.svg", f"nano:{size}, multikey retrieval, one head zeroed"
        )
        rows = "\n".join(
            f"| {layer} | {head} | {nats:.3f} | {100 * hits:.1f} |"
            for layer, head, nats, hits in top_heads(result)
        )
        text += f"""
## Retrieval heads

What is lost on `multikey` (test, {result["examples"]} examples) when the output of one query head
is set to zero before the output projection; untouched the model has
{100 * result["base_accuracy"]:.1f} % and {result["base_log_probability"]:.4f} nats per answer.

![single-head ablation](ablation.svg)

| layer | head | nats lost | accuracy points lost |
|---|---|---|---|
{rows}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def describe(folder: Path, size: str, *, count: int = 300, heads: int = 128) -> None:
    """Score the checkpoint in `folder`, ablate its heads and write its card.

    `training.json`, which `pretrain` leaves there, says how it was made.
    """
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    path = folder / "training.json"
    training: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    training["parameters"] = sum(p.numel() for p in model.parameters())
    write_card(
        folder,
        size,
        training=training,
        scores=score(model, tokenizer, count=count),
        result=ablation(model, tokenizer, count=heads),
        count=count,
    )

"""Quick scores of a nano model: exact match by greedy generation, and single-head ablation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rad.data.nano import generate
from rad.data.nano.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# name -> family and options; retrieval at the training context.
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gsm_nano": ("gsm_nano", {}),
    "crux_nano": ("crux_nano", {}),
    "single": ("ruler_nano", {"task": "single", "tokens": 128}),
    "multikey": ("ruler_nano", {"task": "multikey", "tokens": 128}),
    "vt": ("ruler_nano", {"task": "vt", "tokens": 128}),
    "cwe": ("ruler_nano", {"task": "cwe", "tokens": 128}),
    "text_nano": ("text_nano", {}),
}


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion."""
    if count == 0:
        return 0.0, 1.0
    p, zz = hits / count, z * z / count
    centre = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / count + zz / (4 * count)) / (1 + zz)
    # Rounding must not push a bound past the proportion itself at 0 and 1.
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))


def examples_of(task: str, split: str, count: int, seed: int = 1) -> list[Example]:
    family, options = TASKS[task]
    return generate(family, split, seed, count, **options)


@torch.no_grad()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch: int = 64,
    new_tokens: int = 64,
) -> list[str]:
    """Greedy completions up to `</s>`, in the order of `prompts`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = [""] * len(prompts)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        encoded = tokenizer(
            [prompts[i] for i in chosen],
            return_tensors="pt",
            padding=True,
            return_token_type_ids=False,
        )
        output = model.generate(
            **encoded, max_new_tokens=new_tokens, do_sample=False, num_beams=1, use_cache=True
        )
        new = output[:, encoded["input_ids"].shape[1] :]
        for i, text in zip(chosen, tokenizer.batch_decode(new, True), strict=True):
            found[i] = text
    return found


def exact_match(
    model: Any, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example], batch: int = 64
) -> int:
    """How many completions equal the answer (for word problems: the number after `####`)."""
    budget = 2 + max(len(tokenizer.encode(e.answer, add_special_tokens=False)) for e in examples)
    given = answers(model, tokenizer, [e.prompt for e in examples], batch=batch, new_tokens=budget)
    return sum(is_right(e, text) for e, text in zip(examples, given, strict=True))


def is_right(example: Example, text: str) -> bool:
    """The scoring rule: the final number of a word problem, else the whole answer."""
    if example.family == "gsm_nano":
        _, mark, final = text.rpartition("####")
        return bool(mark) and final.strip() == str(example.meta["value"])
    return text.strip() == example.answer.strip()


@torch.no_grad()
def text_loss(model: Any, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> float:
    """Nats per answer token."""
    scored = answer_log_probabilities(model, tokenizer, examples)
    tokens = sum(len(tokenizer.encode(e.answer, add_special_tokens=False)) for e in examples)
    return -float(scored.sum()) / tokens


@torch.no_grad()
def answer_log_probabilities(
    model: Any, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> torch.Tensor:
    """Summed log-probability of each answer given its prompt: (examples,)."""
    pairs = [
        (
            tokenizer.encode(e.prompt),
            tokenizer.encode(e.answer, add_special_tokens=False),
        )
        for e in examples
    ]
    longest = max(len(p) + len(a) for p, a in pairs)
    ids = torch.zeros(len(pairs), longest, dtype=torch.long)
    wanted = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        wanted[row, len(prompt) : len(prompt) + len(answer)] = True
    # Right padding needs no mask: later positions cannot be seen.
    logits = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    picked: torch.Tensor = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    summed: torch.Tensor = (picked * wanted[:, 1:]).sum(-1)
    return summed


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    count: int = 300,
    splits: Sequence[str] = ("test", "hard"),
    tasks: Sequence[str] | None = None,
    seed: int = 1,
) -> dict[str, dict[str, dict[str, float]]]:
    """Split -> task -> exact match with its 95 % interval (text_nano: nats per token)."""
    model.eval()
    result: dict[str, dict[str, dict[str, float]]] = {}
    for split in splits:
        result[split] = {}
        for task in TASKS if tasks is None else tasks:
            examples = examples_of(task, split, count, seed)
            if task == "text_nano":
                result[split][task] = {"nats": text_loss(model, tokenizer, examples)}
                continue
            hits = exact_match(model, tokenizer, examples)
            low, high = wilson(hits, count)
            result[split][task] = {"score": hits / count, "low": low, "high": high}
    return result


def brief(scores: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line: every task's percentage per split."""
    parts = []
    for split, tasks in scores.items():
        cells = [
            f"{task} {100 * cell['score']:.0f}" if "score" in cell else f"{task} {cell['nats']:.3f}"
            for task, cell in tasks.items()
        ]
        parts.append(f"{split}: " + ", ".join(cells))
    return " | ".join(parts)


@contextmanager
def head_zeroed(model: Any, layer: int, head: int) -> Iterator[None]:
    """Inside, query head `head` of `layer` contributes nothing (its input to o_proj is zero)."""
    size = model.config.head_dim
    part = slice(head * size, (head + 1) * size)
    weight = model.model.layers[layer].self_attn.o_proj.weight
    with torch.no_grad():
        kept = weight[:, part].clone()
        weight[:, part] = 0
        try:
            yield
        finally:
            weight[:, part] = kept


def ablation(
    model: Any, tokenizer: PreTrainedTokenizerFast, *, count: int = 128, seed: int = 2
) -> dict[str, Any]:
    """Loss of answer log-probability and of accuracy on `multikey` when one head is zeroed."""
    model.eval()
    examples = examples_of("multikey", "test", count, seed)

    def measure() -> tuple[float, float]:
        scored = answer_log_probabilities(model, tokenizer, examples)
        return float(scored.mean()), exact_match(model, tokenizer, examples, batch=128) / count

    base_log, base_hit = measure()
    nats: list[list[float]] = []
    drops: list[list[float]] = []
    for layer in range(model.config.num_hidden_layers):
        nats.append([])
        drops.append([])
        for head in range(model.config.num_attention_heads):
            with head_zeroed(model, layer, head):
                log, hit = measure()
            nats[-1].append(base_log - log)
            drops[-1].append(base_hit - hit)
    return {
        "task": "multikey",
        "tokens": 128,
        "examples": count,
        "seed": seed,
        "base_log_probability": base_log,
        "base_accuracy": base_hit,
        "log_probability_drop": nats,
        "accuracy_drop": drops,
    }

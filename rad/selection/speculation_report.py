"""Reports on speculative decoding: one skip set on given prompts, and sets against each other.

Try it: `speculate(model, tokenizer, ["Once upon a time"], skip=[2, 5])`.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from rad.placement import Placement
from rad.selection.base import SelectionError


def speculate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    skip: Collection[int],
    *,
    new_tokens: int = 64,
    max_draft: int = 8,
    exit_threshold: float = 0.6,
    adaptive_exit: bool = True,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ignore_stop: bool = False,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Decode `prompts` plainly and speculatively with the attention of `skip` left out of drafts.

    Temperature 0 is greedy decoding. Decoding ends at the tokenizer's end token unless
    `ignore_stop`. Raises `SelectionError` for prompts and options that cannot be used.
    """
    from rad.selection.sampling import rule_for
    from rad.selection.speculative import DraftExit
    from rad.selection.throughput import compare

    skip = sorted(set(skip))
    _check(model, skip, new_tokens=new_tokens, max_draft=max_draft, exit_threshold=exit_threshold)
    rows = [_tokens(model, tokenizer, text, new_tokens) for text in prompts]
    if not rows:
        raise SelectionError("no prompts: give at least one")
    if not temperature >= 0:
        raise SelectionError(f"temperature is {temperature}: expected 0 (greedy) or more")
    rule = partial(rule_for, temperature, top_p, seed)
    stop = None if ignore_stop else tokenizer.eos_token_id
    model.eval()
    # the first calls of a process are slow, whichever way of decoding they serve
    compare(model, rows[:1], skip, min(new_tokens, 4), rule=rule)
    if progress is not None:
        progress(f"speculate: decoding {len(rows)} prompts twice")
    found = compare(
        model,
        rows,
        skip,
        new_tokens,
        max_draft=max_draft,
        draft_exit=DraftExit(exit_threshold, adaptive_exit),
        rule=rule,
        stop_token=stop,
    )
    texts = [tokenizer.decode(output, skip_special_tokens=True) for output in found.outputs]
    return {
        "schema": 1,
        "skipped": skip,
        "layers": model.config.num_hidden_layers,
        "rule": "greedy" if temperature == 0 else "sampled",
        "options": {
            "new_tokens": new_tokens,
            "max_draft": max_draft,
            "exit_threshold": exit_threshold,
            "adaptive_exit": adaptive_exit,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "ignore_stop": ignore_stop,
        },
        "prompts": len(rows),
        **decoding_report(model, skip, found.statistics, max_draft),
        "measured": measured_report(found, greedy=temperature == 0),
        "outputs": [
            {"prompt": prompt, "text": text, "tokens": len(output)}
            for prompt, text, output in zip(prompts, texts, found.outputs, strict=True)
        ],
    }


def _check(model: Any, skip: Collection[int], **options: float) -> None:
    from rad.selection.base import decoder_layers

    layers = len(decoder_layers(model))
    unknown = [layer for layer in skip if not 0 <= layer < layers]
    if unknown:
        raise SelectionError(
            f"cannot skip layer {unknown[0]}: the model has layers 0 to {layers - 1}"
        )
    for name in ("new_tokens", "max_draft"):
        if options[name] < 1:
            raise SelectionError(f"{name} is {options[name]}: expected at least 1")
    if not 0 <= options["exit_threshold"] <= 1:
        raise SelectionError(
            f"exit_threshold is {options['exit_threshold']}: expected a probability"
        )


def _tokens(model: Any, tokenizer: Any, text: str, new_tokens: int) -> Any:
    row = tokenizer(text, return_tensors="pt")["input_ids"][0].to(model.device)
    if len(row) == 0:
        raise SelectionError("an empty prompt has no token to start from")
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(row) + new_tokens > limit:
        raise SelectionError(
            f"a prompt of {len(row)} tokens and {new_tokens} new ones exceed the model's {limit} "
            "positions; shorten the prompt or lower new_tokens"
        )
    return row


def decoding_report(
    model: Any, skip: Collection[int], counts: Any, max_draft: int
) -> dict[str, Any]:
    """The counts of a draft-and-verify loop and the speed-up they stand for.

    `analytic_speed_up` charges weights read (memory-bound decoding), `speed_up_limit` is the same
    with every drafted token accepted: (W + 1) / (W c + 1) (RAD, section 3.1).
    """
    from rad.selection.acceptance import draft_cost

    cost = draft_cost(model, skip)
    return {
        "drafted": counts.drafted,
        "accepted": counts.accepted,
        "verifications": counts.verifications,
        "acceptance_rate": counts.acceptance_rate,
        "acceptance_length": counts.acceptance_length,
        "draft_cost": cost,
        "analytic_speed_up": counts.speed_up(cost),
        "speed_up_limit": (max_draft + 1) / (max_draft * cost + 1),
    }


def measured_report(found: Any, *, greedy: bool) -> dict[str, Any]:
    """Tokens per second both ways; with the greedy rule, the prompts whose outputs are equal."""
    report = {
        "speed_up": found.speed_up,
        "tokens_per_second": found.tokens_per_second,
        "plain_tokens_per_second": found.plain_tokens_per_second,
        "prompts": len(found.outputs),
    }
    return {**report, "identical": found.identical} if greedy else report


def skipped_by(placement: Placement) -> list[int]:
    """The layers that a placement replaces whole: what its draft would skip."""
    return [layer for layer in range(placement.layers) if placement.kind(layer) == "mixer"]


def jaccard(left: Collection[int], right: Collection[int]) -> float:
    """Shared share of two sets, 1 for two empty ones."""
    union = {*left, *right}
    return len({*left} & {*right}) / len(union) if union else 1.0


def expected_jaccard(left: int, right: int, layers: int) -> float:
    """Mean Jaccard of two independent random sets of these sizes out of `layers`."""
    total = math.comb(layers, right)
    return sum(
        math.comb(left, both)
        * math.comb(layers - left, right - both)
        / total
        * (both / (left + right - both) if left + right else 1.0)
        for both in range(min(left, right) + 1)
    )


def agreement(chosen: Mapping[str, Collection[int]], layers: int) -> dict[str, Any]:
    """How far named sets of layers agree: Jaccard of every pair, and what chance would give.

    `votes` counts for every layer the sets that hold it. Raises `SelectionError` for fewer than two
    sets.
    """
    if len(chosen) < 2:
        raise SelectionError("agreement needs at least two sets")
    pairs: list[tuple[str, str, float]] = [
        (left, right, jaccard(chosen[left], chosen[right]))
        for left, right in itertools.combinations(chosen, 2)
    ]
    values = [value for _, _, value in pairs]
    chance = [
        expected_jaccard(len(set(chosen[left])), len(set(chosen[right])), layers)
        for left, right, _ in pairs
    ]
    votes = Counter(layer for members in chosen.values() for layer in set(members))
    return {
        "sets": {name: sorted(set(members)) for name, members in chosen.items()},
        "pairs": [list(pair) for pair in pairs],
        "mean": sum(values) / len(values),
        "lowest": min(values),
        "chance": sum(chance) / len(chance),
        "votes": [votes[layer] for layer in range(layers)],
    }

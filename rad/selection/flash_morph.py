"""FlashMorph: a gate per layer learns how much attention it needs (arXiv 2606.30562).

Every layer runs its attention and its aligned linear branch side by side, both frozen; its output
is alpha x attention + (1 - alpha) x linear, alpha starting at 1. Only the gates learn, to keep the
hidden states that predict the answers of retrieval prompts while the sum of the gates shrinks; the
layers with the largest gates stay (arXiv 2606.30562). Known at second hand; our defaults
where the description is silent: Adam, cosine decay, hidden states after the last norm, no clamping.

Legend: B batch, T time, E hidden size, L layers.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor, nn

from rad.data.nouns import NOUNS
from rad.field_settings import FlashMorphSettings
from rad.placement import Placement, Scores
from rad.selection import recall_probes
from rad.selection.base import SelectionContext, SelectionError, calibration_rows, ranked
from rad.selection.layer_moves import all_linear, replaced
from rad.selection.recall_probes import Answers, Question


class Gated(nn.Module):
    """alpha x attention + (1 - alpha) x linear, with `gates[layer]` as alpha."""

    def __init__(self, attention: nn.Module, linear: nn.Module, gates: Tensor, layer: int) -> None:
        super().__init__()
        self.attention, self.linear = attention, linear
        self.gates, self.layer = gates, layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states (B,T,E) -> (B,T,E)."""
        alpha = self.gates[self.layer].to(hidden_states.dtype)
        full = self.attention(hidden_states=hidden_states, **kwargs)[0]
        other = self.linear(hidden_states=hidden_states, **kwargs)[0]
        return alpha * full + (1 - alpha) * other, None


def select(context: SelectionContext) -> Placement:
    """Keep the K layers with the largest gates after training them.

    Needs the resources `mixer` and `aligned`, a tokenizer and, for prompts in the wording `text`, a
    corpus. Raises `SelectionError` when a gate stops being a finite number.
    """
    settings = context.settings
    assert isinstance(settings, FlashMorphSettings)
    context.layer_count()  # a budget that cannot be met ends the job before any work
    gates, curve = learn_gates(context, settings)
    scores = gates.tolist()
    return context.layer_placement(
        context.best_layers(scores),
        scores=Scores(
            kind="layer", name="gate of the layer's attention (1 at the start)", values=scores
        ),
        provenance={"curve": curve, "ranking": ranked(scores, True, "flash_morph")},
    )


def learn_gates(
    context: SelectionContext, settings: FlashMorphSettings
) -> tuple[Tensor, list[dict[str, float]]]:
    """Trained gates (L,) and some points of the loss curve."""
    base = context.need_model().requires_grad_(False)
    linear = all_linear(context).requires_grad_(False)
    gates = torch.ones(context.layers, device=base.device, requires_grad=True)
    layers = base.get_decoder().layers
    modules: dict[int, nn.Module] = {
        index: Gated(layer.self_attn, linear.model.layers[index].self_attn, gates, index)
        for index, layer in enumerate(layers)
    }
    optimiser = torch.optim.Adam([gates], lr=settings.learning_rate)
    steps = max(1, settings.tokens // (settings.batch_size * settings.prompt_tokens))
    size = sum(parameter.numel() for parameter in base.parameters())
    prompts = Prompts(context, settings)
    curve: list[dict[str, float]] = []
    for step in range(steps):
        tokens, answers = prompts(step)
        tokens = tokens.to(base.device)
        rows, places = answers.asked[:, 1:].nonzero(as_tuple=True)  # the state before predicts
        with torch.no_grad():
            target = base.get_decoder()(input_ids=tokens, use_cache=False)[0][rows, places]
        with replaced(base, modules):
            mine = base.get_decoder()(input_ids=tokens, use_cache=False)[0][rows, places]
        error = (mine - target).float().square().mean()
        loss = error + settings.sparsity * gates.sum()
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            share = (1 + math.cos(math.pi * step / steps)) / 2
            low = settings.final_learning_rate
            group["lr"] = low + (settings.learning_rate - low) * share
        optimiser.step()
        # both branches of every layer run, forward and backward
        context.meter.add(tokens.numel(), weights=size)
        context.meter.add(tokens.numel(), weights=size, trained=True)
        if step in {round(k * (steps - 1) / 8) for k in range(9)}:
            point = {"step": step, "hidden_mse": error.item(), "gates": gates.sum().item()}
            curve.append(point)
            context.progress(f"flash_morph: step {step} of {steps}: hidden MSE {error.item():.4f}")
    return gates.detach().cpu(), curve


class Prompts:
    """Batches of retrieval prompts, a function of the seed and the step."""

    def __init__(self, context: SelectionContext, settings: FlashMorphSettings) -> None:
        if context.tokenizer is None:
            raise SelectionError("selector flash_morph needs the base's tokenizer")
        self.context, self.settings = context, settings
        self.style = settings.style
        if self.style == "auto":
            self.style = "nano" if recall_probes.is_nano(context.tokenizer) else "text"
        self.longest = context.need_model().config.max_position_embeddings

    def __call__(self, step: int) -> tuple[Tensor, Answers]:
        """Tokens (B,T) and the places of the answers."""
        settings = self.settings
        seed = settings.seed * 1_000_003 + step
        if self.style == "nano":
            asked = recall_probes.questions(
                "ar",
                "nano",
                self.context.tokenizer,
                settings.batch_size,
                pairs=settings.passkeys,
                tokens=settings.prompt_tokens,
                seed=seed,
            )
        else:
            asked = self.passkeys(seed)
        tokenizer, size = self.context.tokenizer, settings.batch_size
        return recall_probes.batches(tokenizer, asked, size, self.longest)[0]

    def passkeys(self, seed: int) -> list[Question]:
        """Prompts of corpus text in which pass keys are hidden; one of them is asked."""
        settings, tokenizer = self.settings, self.context.tokenizer
        rng = random.Random(f"passkeys/{seed}")
        rows = calibration_rows(self.context.need_corpus(), settings.batch_size, seed)
        special = set(getattr(tokenizer, "all_special_ids", ()) or ())
        found = []
        for row in rows.tolist():
            names = rng.sample(NOUNS, settings.passkeys)
            keys = [str(rng.randrange(10_000, 100_000)) for _ in names]
            said = [f" The pass key of {n} is {k}." for n, k in zip(names, keys, strict=True)]
            asked = rng.randrange(len(names))
            end = f" The pass key of {names[asked]} is"
            used = sum(len(tokenizer(piece)["input_ids"]) for piece in [*said, end, keys[asked]])
            text = [token for token in row if token not in special]
            filler = text[: max(0, settings.prompt_tokens - used)]
            cuts = sorted(rng.randint(0, len(filler)) for _ in said)
            pieces, before = [], 0
            for cut, sentence in zip(cuts, said, strict=True):
                pieces += [tokenizer.decode(filler[before:cut]), sentence]
                before = cut
            pieces += [tokenizer.decode(filler[before:]), end]
            found.append(Question("".join(pieces), f" {keys[asked]}", 0.0))
        return found

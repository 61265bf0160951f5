"""Matchness: how often the model predicts its own text while some attention is skipped.

SWIFT's objective (arXiv 2410.06916): one teacher-forced pass instead of decoding, the same number
every time. The skipped model reads its *own* keys and values throughout, also for the tokens that a
real draft would find verified in the shared cache.

Two skip sets that agree on the first layers have the same hidden states up to there. These are kept
by the pattern of skips that led to them, so that every prefix is computed once, as long as it fits.

Legend: B texts, T tokens, N predicted ones, E hidden size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import CostMeter, SelectionError, decoder_layers
from rad.selection.speculative import skip_attention

Pattern = tuple[bool, ...]  # of the layers below: whether their attention is skipped

KEPT_BYTES = 1 << 29  # hidden states kept; the ones longest unused go first


def check_finite(values: Tensor, skip: Collection[int]) -> None:
    """Raise `SelectionError` when a model's logits are not finite: their argmax means nothing."""
    if not bool(values.isfinite().all()):
        raise SelectionError(
            f"with the attention of layers {sorted(skip)} skipped the base's logits are not "
            "finite; look at its weights and dtype"
        )


class Matchness:
    """Agreement with `text` (B,T) from token `start` on, by skip set."""

    def __init__(
        self,
        model: Any,
        text: Tensor,
        start: int,
        meter: CostMeter | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._model, self._start, self._limit = model, start, kept_bytes
        self._layers = decoder_layers(model)
        self._meter = meter or CostMeter()
        self._weights = model.num_parameters()
        self._tokens, self._truth = text[:, :-1], text[:, start:]
        self._settings: list[dict[str, Any]] = []  # what the decoder hands to each layer
        self._hidden: OrderedDict[Pattern, Tensor] = OrderedDict()
        self._held = 0
        self.layers_run = 0
        self._intact()

    @torch.no_grad()
    def _intact(self) -> None:
        """One pass of the whole model: the layers' arguments and the first prefixes."""
        with ExitStack() as stack:
            for layer in self._layers:
                handle = layer.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(handle.remove)
            self._model.get_decoder()(input_ids=self._tokens, use_cache=False)
        self.layers_run += len(self._layers)
        self._meter.add(self._tokens.numel(), weights=self._weights)

    def _note(self, module: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        del module
        self._keep((False,) * len(self._settings), arguments[0])
        self._settings.append(settings)

    def _keep(self, pattern: Pattern, hidden: Tensor) -> None:
        self._hidden[pattern] = hidden
        self._held += hidden.nbytes
        # the input of the first layer is what everything starts from
        while self._held > self._limit and len(self._hidden) > 1:
            oldest = next(key for key in self._hidden if key)
            self._held -= self._hidden.pop(oldest).nbytes

    @torch.no_grad()
    def __call__(self, skip: Collection[int]) -> float:
        """Share of the predicted tokens (B,N) that the model without `skip` has as its argmax."""
        depth = len(self._layers)
        pattern = tuple(layer in set(skip) for layer in range(depth))
        first = next(n for n in range(depth - 1, -1, -1) if pattern[:n] in self._hidden)
        self._hidden.move_to_end(pattern[:first])
        hidden = self._hidden[pattern[:first]]  # (B,T-1,E)
        with skip_attention(self._model, skip, fill_cache=False):
            for index in range(first, depth):
                if index > first:
                    self._keep(pattern[:index], hidden)
                output = self._layers[index](hidden, **self._settings[index])
                hidden = output[0] if isinstance(output, tuple) else output
        self.layers_run += depth - first
        self._meter.add(self._tokens.numel() * (depth - first) / depth, weights=self._weights)
        # the output at a position predicts the next token
        normed = self._model.get_decoder().norm(hidden[:, self._start - 1 :])  # (B,N,E)
        top, choices = self._model.get_output_embeddings()(normed).max(-1)
        check_finite(top, skip)
        return float((choices == self._truth).double().mean())

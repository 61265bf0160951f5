"""What every selector is given and must return, and the registry of selectors.

Importing this module imports no torch: the registry names functions, and they are imported when
they are called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rad.data.corpus import Corpus
from rad.placement import Budget, Cost, Footprint, Placement
from rad.settings import Settings

Selector = Callable[["SelectionContext"], Placement]

# method -> module:function. A selector outside the package is a workflow rule, not an entry here.
SELECTORS: dict[str, str] = {
    "uniform": "rad.selection.uniform:select",
    "random": "rad.selection.random:select",
    "rad": "rad.selection.rad:select",
    "kl_guided": "rad.selection.kl_guided:select",
    "retrieval_aware": "rad.selection.retrieval_aware:select",
    "smart": "rad.selection.smart:select",
    "halo": "rad.selection.halo:select",
    "ar": "rad.selection.recall_ablation:select",
    "ar_mh": "rad.selection.recall_ablation:select",
    "vt": "rad.selection.recall_ablation:select",
    "cwe": "rad.selection.recall_ablation:select",
    "lm_ppl": "rad.selection.lm_ppl:select",
    "activation_mse": "rad.selection.activation_mse:select",
    "leave_one_out": "rad.selection.leave_one_out:select",
    "flash_morph": "rad.selection.flash_morph:select",
    "preset": "rad.selection.preset:select",
}


class SelectionError(ValueError):
    """A selector cannot run on this base or corpus; the message is one line."""


@dataclass(frozen=True)
class Spent:
    """What a part of a selection cost: see `Cost`."""

    tokens: float = 0.0
    trained: float = 0.0
    flops: float = 0.0
    forward_passes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


class CostMeter:
    """Counts the tokens and model calls of a selection, and its wall time since creation.

    `reused` is the part of it that other jobs have spent.
    """

    def __init__(self) -> None:
        self.tokens = 0.0
        self.trained = 0.0
        self.flops = 0.0
        self.forward_passes = 0
        self.reused = Spent()
        self._start = time.perf_counter()

    def add(
        self, tokens: float, passes: int = 1, *, weights: int = 0, trained: bool = False
    ) -> None:
        """Count `passes` model calls over `tokens` tokens in all.

        A call that runs a share of the layers counts that share of its tokens. `weights` of the
        model that ran turn tokens into FLOPs: 2 each forward, 6 with the backward pass.
        """
        self.tokens += tokens
        self.forward_passes += passes
        self.trained += tokens if trained else 0
        self.flops += (6 if trained else 2) * weights * tokens

    def include(self, spent: Spent) -> None:
        """Count what another job spent on scores that this one uses."""
        self.tokens += spent.tokens
        self.trained += spent.trained
        self.flops += spent.flops
        self.forward_passes += spent.forward_passes
        self.reused += spent

    def spent(self) -> Spent:
        """All that is counted so far."""
        seconds = time.perf_counter() - self._start + self.reused.seconds
        return Spent(self.tokens, self.trained, self.flops, self.forward_passes, seconds)

    def cost(self) -> Cost:
        """The record that goes into the placement."""
        return Cost(
            tokens=round(self.tokens),
            seconds=self.spent().seconds,
            forward_passes=self.forward_passes,
            trained_tokens=round(self.trained),
            flops=self.flops,
        )


def _silent(message: str) -> None:
    del message


@dataclass
class SelectionContext:
    """The inputs of a selector.

    `model` is a Hugging Face causal model whose layers have `self_attn.{q,k,v,o}_proj`; `uniform`
    needs neither it nor a tokenizer. `corpus` is a folder as `docs/contracts.md` describes it.
    """

    base: str
    layers: int
    heads: int
    kv_heads: int
    budget: Budget
    settings: Settings
    model: Any = None
    tokenizer: Any = None
    corpus: Path | None = None
    progress: Callable[[str], None] = _silent
    provenance: Mapping[str, Any] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)  # inputs of one selector only
    meter: CostMeter = field(default_factory=CostMeter)
    # bytes that one key/value head caches per token: 2 x head dim x bytes of the dtype
    kv_head_bytes: int | None = None
    # what had the same score on both sides of the budget's cut, for the placement's provenance
    ties: list[Any] = field(default_factory=list)

    @classmethod
    def for_model(
        cls, model: Any, budget: Budget, settings: Settings, *, base: str = "base", **fields: Any
    ) -> SelectionContext:
        """A context whose shape is read from `model.config`."""
        config = model.config
        return cls(
            base=base,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            budget=budget,
            settings=settings,
            model=model,
            **{"kv_head_bytes": head_bytes(config, model.dtype.itemsize), **fields},
        )

    def need_model(self) -> Any:
        """The model, in evaluation mode; raises `SelectionError` when there is none."""
        if self.model is None:
            raise SelectionError(f"selector {self._method()} needs the base model's weights")
        return self.model.eval()

    def need_corpus(self) -> Path:
        """The corpus folder; raises `SelectionError` when there is none."""
        if self.corpus is None:
            raise SelectionError(f"selector {self._method()} needs a corpus to calibrate on")
        return self.corpus

    def placement(self, softmax: list[tuple[int, int]], **fields: Any) -> Placement:
        """The placement keeping `softmax`, with this context's shape, settings and cost filled in.

        Raises `BudgetError` when it does not meet the budget.
        """
        found = self._bare(
            softmax,
            parameters=self.settings.model_dump(mode="json", exclude={"method"}),
            scores=fields.pop("scores", None),
            cost=self.meter.cost(),
            provenance={**self.provenance, **fields.pop("provenance", {})},
        )
        if self.ties:
            found.provenance.setdefault("tied_at_the_cut", self.ties)
        if self.kv_head_bytes is not None:
            cached = found.cached_kv_heads()
            found.footprint = Footprint(
                heads=len(found.softmax),
                kv_heads=cached,
                kv_bytes_per_token=cached * self.kv_head_bytes,
            )
        if fields:
            raise TypeError(f"unknown fields {sorted(fields)}")
        found.check_budget(self.budget)
        return found

    def layer_placement(self, kept: list[int], **fields: Any) -> Placement:
        """`placement` of the whole layers `kept`."""
        pairs = [(layer, head) for layer in kept for head in range(self.heads)]
        return self.placement(pairs, **fields)

    def layer_count(self) -> int:
        """Whole layers that the budget keeps; raises `BudgetError` when no whole number does."""
        whole = None if self.kv_head_bytes is None else self.kv_heads * self.kv_head_bytes
        return self.budget.layer_count(self.layers, self.heads, whole)

    def best_layers(self, scores: Sequence[float], higher_is_kept: bool = True) -> list[int]:
        """The layers that the budget keeps by their scores, best first; ties: the earlier layer.

        Raises `SelectionError` when a score is no finite number.
        """
        order = ranked(scores, higher_is_kept, self._method())
        count = self.layer_count()
        self.ties = _ties(order, list(scores), count)
        return order[:count]

    def best_heads(
        self, scores: Sequence[Sequence[float]], higher_is_kept: bool = True
    ) -> list[tuple[int, int]]:
        """The (layer, head) pairs that the budget keeps, best first; ties: the earlier pair.

        Under a budget in bytes, the longest prefix of the ranking whose cache fits. Raises
        `SelectionError` when a score is no finite number.
        """
        flat = [value for row in scores for value in row]
        pairs = [
            divmod(index, self.heads) for index in ranked(flat, higher_is_kept, self._method())
        ]
        values = {pair: scores[pair[0]][pair[1]] for pair in pairs}
        if self.budget.kv_bytes_per_token is None:
            count = self.budget.head_count(self.layers, self.heads)
            self.ties = _ties(pairs, values, count)
            return pairs[:count]
        if self.kv_head_bytes is None:
            raise SelectionError(f"selector {self._method()}: bytes per key/value head not known")
        limit = self.budget.kv_bytes_per_token // self.kv_head_bytes
        for count in range(len(pairs), 0, -1):
            kept = self._bare(pairs[:count])
            if kept.cached_kv_heads() <= limit:
                self.ties = _ties(pairs, values, count)
                return pairs[:count]
        return []

    def _bare(self, softmax: list[tuple[int, int]], **fields: Any) -> Placement:
        return Placement(
            schema=1,
            base=self.base,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            softmax=softmax,
            selector=self._method(),
            **fields,
        )

    def _method(self) -> str:
        return str(getattr(self.settings, "method", "?"))


def head_bytes(config: Any, itemsize: int) -> int:
    """Bytes of keys and values that one kv head of a model caches per token."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(width) * itemsize


def head_bytes_of(record: Mapping[str, Any]) -> int:
    """The same from the description of a model (`source.json`)."""
    return 2 * int(record["head_dim"]) * {"float32": 4, "bfloat16": 2}[record["dtype"]]


def ranked(scores: Sequence[float], higher_is_kept: bool, method: str) -> list[int]:
    """Indices from the best score to the worst, ties by index; raises `SelectionError` on NaN."""
    values = np.asarray(scores, dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise SelectionError(
            f"selector {method}: score {int(bad[0])} of {len(values)} is {values[bad[0]]}, not a "
            "finite number"
        )
    return [
        int(index) for index in np.argsort(-values if higher_is_kept else values, kind="stable")
    ]


def _ties(order: Sequence[Any], scores: Any, count: int) -> list[Any]:
    """Members of `order` whose score the last kept and the first dropped one share."""
    if not 0 < count < len(order) or scores[order[count - 1]] != scores[order[count]]:
        return []
    return [member for member in order if scores[member] == scores[order[count]]]


def load_selector(method: str) -> Selector:
    """The function registered for `method`; raises `SelectionError` when there is none."""
    try:
        module, function = SELECTORS[method].split(":")
    except KeyError:
        known = ", ".join(SELECTORS)
        raise SelectionError(f"unknown selector {method!r}; known: {known}") from None
    selector: Selector = getattr(import_module(module), function)
    return selector


def select(context: SelectionContext) -> Placement:
    """Run the selector that `context.settings` names and check its placement's budget."""
    found = load_selector(context._method())(context)
    found.check_budget(context.budget)
    return found


def calibration_rows(folder: Path, count: int, seed: int) -> NDArray[np.int64]:
    """`count` different rows of a corpus' training split, (rows, context), the same for a seed.

    Raises `SelectionError` when the corpus is missing or has fewer rows.
    """
    try:
        rows = Corpus(folder).rows("train")
    except (KeyError, ValueError) as error:
        raise SelectionError(f"{folder}: not a corpus folder ({error})") from error
    if count > len(rows):
        raise SelectionError(f"{folder}: {count} calibration rows asked, but it has {len(rows)}")
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size=count, replace=False))
    return np.asarray(rows[chosen], dtype=np.int64)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers of a Hugging Face causal model.

    Raises `SelectionError` when they have no `self_attn.o_proj`.
    """
    layers = list(model.get_decoder().layers)
    for index, layer in enumerate(layers):
        if not hasattr(getattr(layer, "self_attn", None), "o_proj"):
            raise SelectionError(
                f"layer {index} of {type(model).__name__} has no self_attn.o_proj: only models "
                "with q/k/v/o projections can be searched"
            )
    return layers

"""Answers to a batch of prompts: greedy or sampled, ended by tokens, strings or a count."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from rad.evaluation.sampling import SeededSampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Fills rows on the left, and what follows an answer that ended early. Never seen: the former is
# masked, the latter cut. Not the tokenizer's, which may lie outside of the model's embedding.
_PADDING = 0


@dataclass(frozen=True)
class Decoding:
    """How the answers of a task are generated; `stops` are texts that end one."""

    new_tokens: int
    stops: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    @classmethod
    def read(cls, task: str, options: Mapping[str, Any]) -> Decoding:
        """From lm-eval's `generation_kwargs`; raises `ValueError` naming the task."""
        left = dict(options)
        where = f"task {task}: generation_kwargs"
        until = left.pop("until", None) or ()
        found = cls(
            new_tokens=left.pop("max_gen_toks", 0),
            stops=(until,) if isinstance(until, str) else tuple(until),
            do_sample=bool(left.pop("do_sample", False)),
            temperature=float(left.pop("temperature", None) or 0.0),
            top_p=float(left.pop("top_p", 1.0)),
            top_k=int(left.pop("top_k", 0)),
            seed=int(left.pop("seed", 0)),
        )
        if left:
            raise ValueError(f"{where}: unknown {min(left)!r}")
        if "max_gen_toks" not in options:
            raise ValueError(f"{where}: max_gen_toks is missing; say how long an answer may be")
        if not isinstance(found.new_tokens, int) or found.new_tokens < 1:
            raise ValueError(f"{where}: max_gen_toks is {found.new_tokens!r}; at least 1")
        if "" in found.stops:
            raise ValueError(f"{where}: until holds an empty text, which ends every answer")
        if not found.do_sample:
            # temperature 0 and 1 are what greedy tasks write; filters do not change an argmax
            if found.temperature not in (0.0, 1.0):
                raise ValueError(f"{where}: a temperature needs `do_sample: true`")
            return cls(found.new_tokens, found.stops)
        if found.temperature <= 0 or not math.isfinite(found.temperature):
            raise ValueError(f"{where}: sampling needs a temperature above 0")
        if not 0 < found.top_p <= 1 or found.top_k < 0:
            raise ValueError(f"{where}: top_p lies in (0, 1], top_k is 0 (off) or more")
        return found


class Answer(NamedTuple):
    """What a model wrote: text up to a stop, tokens generated for it, and whether it just ran out.

    The token or text that ends an answer counts as generated; `truncated` means that there was
    none within `new_tokens`.
    """

    text: str
    new_tokens: int
    truncated: bool


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a generation: the checkpoint's and the tokenizer's end of text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


class _Ends(StoppingCriteria):
    """Ends each row by itself at its first end of text or stop string; remembers where."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt: int, rows: int, decoding: Decoding
    ) -> None:
        self.tokenizer, self.prompt, self.stops = tokenizer, prompt, decoding.stops
        # A byte is the least that a token writes; one more for the text that it starts within.
        self.window = max((len(stop.encode()) for stop in self.stops), default=0) + 1
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **unused: Any) -> Tensor:
        """Rows (B,) that have ended, of tokens (B, T)."""
        if self.stops:
            length = input_ids.shape[1] - self.prompt
            start = max(self.prompt, input_ids.shape[1] - self.window)
            tails = input_ids[:, start:].tolist()
            for row, tail in enumerate(tails):
                if self.lengths[row] is None:
                    text = self.tokenizer.decode(tail)
                    if any(stop in text for stop in self.stops):
                        self.lengths[row] = length
        ended = [length is not None for length in self.lengths]
        return torch.tensor(ended, device=input_ids.device)


@contextlib.contextmanager
def _own_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """`config` in place of what the checkpoint ships: sampling, penalties, lengths.

    transformers takes from there whatever a call leaves open.
    """
    shipped = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = shipped


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop of all."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    decoding: Decoding,
    seeds: Sequence[int] = (),
) -> list[Answer]:
    """The answer to every prompt (token ids) of one batch; `seeds`, one per row, for sampling."""
    longest = max(map(len, prompts))
    rows = [[_PADDING] * (longest - len(row)) + row for row in prompts]
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
    ends = stop_ids(model, tokenizer)
    watch = _Ends(tokenizer, longest, len(rows), decoding)
    sampling = []
    if decoding.do_sample:
        sampling.append(
            SeededSampling(
                seeds,
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                top_k=decoding.top_k,
                device=model.device,
            )
        )
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=decoding.new_tokens,
        eos_token_id=ends or None,
        pad_token_id=_PADDING,
    )
    with _own_settings(model, config), torch.no_grad():
        output = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(rows, device=model.device),
            attention_mask=torch.tensor(masks, device=model.device),
            logits_processor=sampling,
            stopping_criteria=[watch],
            use_cache=True,
        )
    # as HFLM: the end of text is a stop string too, should a model spell it out
    end = tokenizer.eos_token_id
    spelled = str(tokenizer.decode([end])) if end is not None else ""
    stops = [*decoding.stops, *([spelled] if spelled else [])]
    found = []
    for tokens, stopped in zip(output[:, longest:].tolist(), watch.lengths, strict=True):
        at_end = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
        length = min((n for n in (at_end, stopped) if n is not None), default=len(tokens))
        full = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))
        text = _cut(full, stops)
        ran_out = at_end is None and stopped is None and text == full
        found.append(Answer(text, length, ran_out))
    return found

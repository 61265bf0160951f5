"""A loaded Hugging Face model as an lm-eval `LM`: greedy, batched, left-padded, never truncating.

lm-eval's own `HFLM` does the same for more kinds of models, at the price of importing accelerate
and peft, a stop rule that keeps a finished row running until the slowest is done, and a prompt that
is cut with a warning when it is too long. Here a row that has stopped costs nothing in its answer,
and a prompt that does not fit is an error. A test holds the two to the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn import functional
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Tokens = list[int]
Row = TypeVar("Row", bound=tuple[Any, ...])  # (index, tokens, ...)


class TruncationError(ValueError):
    """A prompt and its answer do not fit into the context."""


class _StopStrings(StoppingCriteria):
    """Marks the rows whose new text contains one of the stop strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int):
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start
        # A token holds at least one byte, so this many tokens hold the longest stop string.
        self.window = max(len(stop.encode()) for stop in stops) + 1

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **unused: Any
    ) -> torch.BoolTensor:
        recent = input_ids[:, self.start :][:, -self.window :]
        texts = self.tokenizer.batch_decode(recent, skip_special_tokens=False)
        found = [any(stop in text for stop in self.stops) for text in texts]
        result: torch.BoolTensor = torch.tensor(found, device=input_ids.device)  # type: ignore[assignment]
        return result


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokens of a prompt with the specials that the tokenizer adds, and never two `<s>`."""
    tokens: Tokens = tokenizer.encode(text)
    start = tokenizer.bos_token_id
    while start is not None and tokens[:2] == [start, start]:
        tokens = tokens[1:]  # the text (a chat template) brought its own
    return tokens


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> tuple[Tokens, Tokens]:
    """Tokens of a prompt and of what follows it, cut where generation would start.

    Tokenised together when that leaves the prompt's tokens as they are, else apart.
    """
    before = encode(tokenizer, prompt)
    both = encode(tokenizer, prompt + target)
    if both[: len(before)] == before:
        return before, both[len(before) :]
    return before, tokenizer.encode(target, add_special_tokens=False)


def pad(rows: Sequence[Tokens], value: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask), each (rows, longest), padded on the `left` or the `right`."""
    longest = max(len(row) for row in rows)
    tokens = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        tokens[index, place] = torch.tensor(row, dtype=torch.long)
        mask[index, place] = 1
    return tokens, mask


def stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Tokens that end a generation: the model's and the tokenizer's end of text."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if configured is None:
        configured = []
    elif isinstance(configured, int):
        configured = [configured]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return sorted({*configured, *own})


class Bridge(LM):  # type: ignore[misc]
    """lm-eval's view of `model`; `max_length` is the longest prompt plus answer in tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length: int = max_length or model.config.max_position_embeddings
        self.progress = progress
        self.stop_ids = stop_ids(model, tokenizer)
        pads = (tokenizer.pad_token_id, *self.stop_ids, 0)
        self.pad_id: int = next(token for token in pads if token is not None)

    # --- lm-eval's interface ----------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @property
    def prefix_id(self) -> int:
        """The token that stands before a text: `<s>`, or end of text where there is none."""
        start = self.tokenizer.bos_token_id
        return start if start is not None else self.stop_ids[0]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first stop string; raises `TruncationError`."""
        groups: dict[tuple[tuple[str, ...], int], list[tuple[int, Tokens]]] = {}
        for index, request in enumerate(requests):
            prompt, options = request.args
            room = int(options["max_gen_toks"])
            tokens = encode(self.tokenizer, prompt)
            self._check(len(tokens) + room, f"{request.task_name} document {request.doc_id}")
            groups.setdefault((tuple(options.get("until") or ()), room), []).append((index, tokens))
        answers = [""] * len(requests)
        with self._bar(len(requests), "generate", disable_tqdm) as bar:
            for (stops, room), rows in sorted(groups.items()):
                for batch in self._batches(rows):
                    texts = self._generate([tokens for _, tokens in batch], stops, room)
                    for (index, _), text in zip(batch, texts, strict=True):
                        answers[index] = text
                    bar.update(len(batch))
        return answers

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the argmax throughout) of each continuation."""
        pairs = []
        for request in requests:
            before, after = encode_pair(self.tokenizer, *request.args)
            self._check(len(before) + len(after), f"{request.task_name} document {request.doc_id}")
            pairs.append((before or [self.prefix_id], after))
        return self._score(pairs, disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood in nats of each whole text, every token predicted once, `<s>` first."""
        windows: list[tuple[Tokens, Tokens]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append(make_disjoint_window(window))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score(windows, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    # --- the work ---------------------------------------------------------------------------

    def _check(self, need: int, what: str) -> None:
        if need > self.max_length:
            raise TruncationError(
                f"{what} needs {need} tokens, prompt and answer together, but the limit is "
                f"{self.max_length}: raise evaluation.max_length or shorten the task"
            )

    def _bar(self, total: int, title: str, disable: bool) -> Any:
        from tqdm import tqdm

        return tqdm(total=total, desc=title, disable=disable or not self.progress)

    def _batches(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Fixed batches, longest first; ties by content, so that the order is always the same."""
        ordered = sorted(rows, key=lambda row: (-len(row[1]), row[1], row[0]))
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    @torch.no_grad()
    def _generate(self, prompts: list[Tokens], stops: Sequence[str], room: int) -> list[str]:
        tokens, mask = pad(prompts, self.pad_id, "left")
        width = tokens.shape[1]
        criteria = StoppingCriteriaList()
        if stops:
            criteria.append(_StopStrings(self.tokenizer, stops, width))
        output = self.model.generate(
            input_ids=tokens.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            stopping_criteria=criteria,
            # A configuration of its own: checkpoints ship sampling settings.
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                max_new_tokens=room,
                eos_token_id=self.stop_ids or None,
                pad_token_id=self.pad_id,
                use_cache=True,
            ),
        )
        return [self._text(row, stops) for row in output[:, width:].tolist()]

    def _text(self, tokens: Tokens, stops: Sequence[str]) -> str:
        """The answer before the first end of text or stop string."""
        ends = [index for index, token in enumerate(tokens) if token in self.stop_ids]
        kept = tokens[: ends[0]] if ends else tokens
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True))
        cuts = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(cuts)] if cuts else text

    @torch.no_grad()
    def _score(
        self, pairs: list[tuple[Tokens, Tokens]], disable_tqdm: bool
    ) -> list[tuple[float, bool]]:
        rows = [(index, before + after, len(after)) for index, (before, after) in enumerate(pairs)]
        result: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        with self._bar(len(rows), "score", disable_tqdm) as bar:
            for batch in self._batches(rows):
                tokens, _ = pad([row[:-1] for _, row, _ in batch], self.pad_id, "right")
                # Causal models do not see what is padded on the right, so no mask is needed.
                logits = self.model(tokens.to(self.model.device), use_cache=False).logits
                for (index, row, count), values in zip(batch, logits, strict=True):
                    if count:
                        goal = torch.tensor(row[-count:], device=values.device)
                        part = values[len(row) - 1 - count : len(row) - 1].float()
                        nats = -functional.cross_entropy(part, goal, reduction="sum")
                        same = bool((part.argmax(-1) == goal).all())
                        result[index] = (float(nats), same)
                bar.update(len(batch))
        return result

"""lm-eval's view of a loaded model: fixed batches, one `<s>`, never truncating, shared by ranks.

Stands beside lm-eval's `HFLM` and gives its answers, with these differences: the start token is
decided text by text, sampling does not depend on the batch, a row stops at its own stop string, and
several processes share the requests of a model in memory.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from rad.evaluation import sharing
from rad.evaluation.decoding import Answer, Decoding, answers, stop_ids
from rad.evaluation.sampling import seed_of
from rad.files import digest

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HarnessModel", "TruncationError", "stop_ids"]

# What a batch has finished: (task, document) of each request, and the tokens generated for them.
Report = Callable[[Sequence[tuple[str, int]], int], None]


class TruncationError(ValueError):
    """A prompt and its answer do not fit into the context."""


class _Prompt(NamedTuple):
    """A text to continue; `place` is where it stands among the requests."""

    place: int
    tokens: list[int]
    seed: int
    request: Any


class _Span(NamedTuple):
    """Tokens to score: the last `answer` of `tokens`, given those before."""

    place: int
    tokens: list[int]
    answer: int
    request: Any


def _batches(rows: Iterable[Any], size: int, most: int | None, new: int = 0) -> list[list[Any]]:
    """Rows in batches, longest first, so that little is padded; ties in an order of their own.

    At most `size` rows, and at most `most` tokens with `new` ones for each row and the padding; a
    row that is longer by itself is alone.
    """
    ordered = sorted(rows, key=lambda row: (-len(row.tokens), row.tokens, row.place))
    batches, start = [], 0
    while start < len(ordered):
        fit = size if most is None else most // (len(ordered[start].tokens) + new)
        batches.append(ordered[start : start + max(1, min(size, fit))])
        start += len(batches[-1])
    return batches


def _places(batch: Iterable[_Prompt | _Span]) -> list[tuple[str, int]]:
    return [(row.request.task_name, row.request.doc_id) for row in batch]


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """lm-eval's view of `model`; `max_length` is the longest prompt plus answer in tokens.

    Raises `TruncationError` naming task and document where something would be cut. Neither the
    model's generation settings nor the tokenizer are changed. `answers` has, for every (task,
    document), what is known of each answer. `report` is told of every finished batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_length: int | None = None,
        report: Report | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: evaluation needs at least 1")
        self.model = model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        trained = getattr(model.config, "max_position_embeddings", None)
        self.max_length = int(max_length or trained or tokenizer.model_max_length)
        self.answers: dict[tuple[str, int], list[Answer]] = {}
        self._report = report or (lambda places, tokens: None)

    # --- tokens -----------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """End of text."""
        token: int = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: `<s>`, else end of text."""
        start: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Tokens with what the tokenizer puts in front, unless the text brings its own `<s>`.

        A text that starts with several (a double one on purpose) keeps them all.
        """
        start = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (start and string.startswith(start))
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens

    def _check(self, request: Instance, prompt: int, answer: int) -> None:
        if prompt + answer > self.max_length:
            raise TruncationError(
                f"task {request.task_name}, document {request.doc_id}: a prompt of {prompt} tokens "
                f"needs {prompt + answer} tokens with its answer, but the limit is "
                f"{self.max_length}: raise evaluation.max_length or shorten the task"
            )

    # --- generation -------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to every request, cut before its first stop string.

        A request that is in the list several times (lm-eval's `repeats`) is answered each time;
        sampled answers differ by their turn.
        """
        groups: dict[Decoding, list[_Prompt]] = {}
        turns: Counter[int] = Counter()
        for index, request in enumerate(requests):
            text, options = request.args
            decoding = Decoding.read(request.task_name, options)
            tokens = self.tok_encode(text)
            self._check(request, len(tokens), decoding.new_tokens)
            document = getattr(request, "doc", None) or {}
            name = document.get("id", request.doc_id)
            seed = seed_of(decoding.seed, request.task_name, name, turns[id(request)])
            turns[id(request)] += 1
            groups.setdefault(decoding, []).append(_Prompt(index, tokens, seed, request))
        batches = [
            (decoding, batch)
            for decoding, rows in groups.items()
            for batch in _batches(rows, self.batch_size, self.batch_tokens, decoding.new_tokens)
        ]
        _agree(batch for _, batch in batches)

        def act(job: tuple[Decoding, list[_Prompt]]) -> list[Answer]:
            decoding, batch = job
            prompts = [row.tokens for row in batch]
            seeds = [row.seed for row in batch]
            return answers(self.model, self.tokenizer, prompts, decoding, seeds)

        def done(job: tuple[Decoding, list[_Prompt]], result: Sequence[Sequence[Any]]) -> None:
            self._report(_places(job[1]), sum(count for _, count, _ in result))

        found: dict[int, Answer] = {}
        results = sharing.dealt(batches, act, done)
        for (_, batch), result in zip(batches, results, strict=True):
            for row, answer in zip(batch, result, strict=True):
                found[row.place] = Answer(*answer)
        for index, request in enumerate(requests):
            place = (request.task_name, request.doc_id)
            self.answers.setdefault(place, []).append(found[index])
        return [found[index].text for index in range(len(requests))]

    # --- likelihood -------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether it is the argmax throughout) of every continuation."""
        spans = []
        for index, request in enumerate(requests):
            context, continuation = request.args
            before, after = self._pair(context, continuation)
            if not after:
                raise ValueError(
                    f"task {request.task_name}, document {request.doc_id}: an answer of no tokens "
                    "has no likelihood"
                )
            self._check(request, len(before), len(after) - 1)  # the last is not read
            spans.append(_Span(index, before + after, len(after), request))
        found = self._scored(spans)
        return [found[index][0] for index in range(len(requests))]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; without a context the prefix token stands before."""
        if context:
            before, after = self._encode_pair(context, continuation)
            return before, after
        return self._after_prefix(continuation)

    def _after_prefix(self, text: str) -> tuple[list[int], list[int]]:
        tokens = self.tok_encode(text, add_special_tokens=False)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts in nats, in windows of the context where they are longer.

        The start token is read and not scored.
        """
        spans = []
        for index, request in enumerate(requests):
            (prefix,), tokens = self._after_prefix(request.args[0])
            windows = get_rolling_token_windows(tokens, prefix, self.max_length, context_len=1)
            for before, after in map(make_disjoint_window, windows):
                spans.append(_Span(index, before + after, len(after), request))
        found = self._scored(spans)
        return [sum(value for value, _ in found.get(i, [])) for i in range(len(requests))]

    def _scored(self, spans: Sequence[_Span]) -> dict[int, list[tuple[float, bool]]]:
        """Request -> (log-likelihood, argmax) of its spans, in their order."""
        batches = _batches(spans, self.batch_size, self.batch_tokens)
        _agree(batches)
        waiting = Counter(span.place for span in spans)

        def done(batch: list[_Span], _: Any) -> None:
            ended = []
            for span in batch:
                waiting[span.place] -= 1
                if not waiting[span.place]:
                    ended.append(span)
            self._report(_places(ended), 0)

        results = sharing.dealt(batches, self._likelihoods, done)
        by_span = {
            id(span): (float(value), bool(greedy))
            for batch, result in zip(batches, results, strict=True)
            for span, (value, greedy) in zip(batch, result, strict=True)
        }
        found: dict[int, list[tuple[float, bool]]] = {}
        for span in spans:
            found.setdefault(span.place, []).append(by_span[id(span)])
        return found

    @torch.no_grad()
    def _likelihoods(self, batch: Sequence[_Span]) -> list[tuple[float, bool]]:
        """(log-likelihood, argmax) of each span of a batch, summed in float32."""
        # Choices of one token differ in what is not read: their prompt is read once.
        read = [tuple(span.tokens[:-1]) for span in batch]
        rows = {tokens: row for row, tokens in enumerate(dict.fromkeys(read))}
        # Padded on the right: a causal model does not see it, so no mask is needed.
        tokens = pad_sequence(list(map(torch.tensor, rows)), batch_first=True)  # (B, T)
        first = min(len(span.tokens) - 1 - span.answer for span in batch)
        kept = tokens.shape[1] - first
        tokens = tokens.to(self.model.device)
        logits = self.model(tokens, use_cache=False, logits_to_keep=kept).logits  # (B, kept, V)
        found = []
        for span, key in zip(batch, read, strict=True):
            end = len(span.tokens) - 1 - first
            scored = logits[rows[key], end - span.answer : end]  # (answer, V)
            words = scored.float().log_softmax(-1)
            goal = torch.tensor(span.tokens[-span.answer :], device=words.device)
            value = words.gather(1, goal[:, None]).sum()
            found.append((float(value), bool((words.argmax(-1) == goal).all())))
        return found

    def _loglikelihood_tokens(self, requests: Any, **unused: Any) -> Any:
        # abstract in lm-eval's class, whose own `loglikelihood` would drop the documents' names
        raise NotImplementedError("requests are scored by `loglikelihood`")


def _agree(batches: Iterable[Sequence[_Prompt | _Span]]) -> None:
    """Raise `ValueError` unless all processes hold the same batches."""
    if sharing.count() > 1:
        rows = [[(row.place, *_places([row]), row.tokens) for row in batch] for batch in batches]
        sharing.agree("documents or batch size", digest(rows))

"""Sources of a corpus: streams of tokenised documents, and several of them by their weights.

Order is a function of the settings alone. Nothing is held but the shuffle buffer and one batch.
Legend: T tokens of a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rad.data.chat import ChatTemplate
from rad.data.records import CorpusError, field, records, shuffled
from rad.data.text import text_documents
from rad.settings import CorpusSettings, SourceSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BATCH = 64  # texts per call of the tokenizer
_SEED_STEP = 1000  # between the seeds of sources: nano takes two in a row


class Document(NamedTuple):
    """One tokenised document."""

    ids: NDArray[np.int64]  # (T,)
    weights: NDArray[np.float32]  # (T,) loss weight of predicting each token
    key: bytes  # equal for equal documents: what is held out is known by it
    divisible: bool = True  # whether pieces of it mean something


@dataclass
class Source:
    """A named stream per split; `read` counts what was taken from it."""

    name: str
    weight: float
    stream: Callable[[str], Iterator[Document]]
    documents: int = 0
    tokens: int = 0


class Mixture:
    """Sources in turn: next comes the one that is furthest behind its weight.

    With weights by tokens, shares are exact to within one document at every point of the stream.
    """

    def __init__(self, sources: list[Source], weigh_by: str) -> None:
        self.sources, self.weigh_by = sources, weigh_by
        self.exhausted: Source | None = None
        self._held_out: set[bytes] = set()

    def documents(self, split: str) -> Iterator[Document]:
        """Documents of a split, until a source has no more; `held_out` must be read first.

        A document that equals one taken for `held_out` is left out of `train`.
        """
        streams = {source.name: source.stream(split) for source in self.sources}
        for source in self.sources:
            source.documents = source.tokens = 0
        while True:
            source = min(self.sources, key=lambda source: self._taken(source) / source.weight)
            document = next(streams[source.name], None)
            if document is None:
                self.exhausted = source
                return
            if split == "held_out":
                self._held_out.add(document.key)
            elif document.key in self._held_out:
                continue
            source.documents += 1
            source.tokens += len(document.ids)
            yield document

    def _taken(self, source: Source) -> int:
        return source.tokens if self.weigh_by == "tokens" else source.documents


def open_sources(settings: CorpusSettings, tokenizer: PreTrainedTokenizerFast) -> Mixture:
    """The mixture that a corpus is made of; nothing is read yet."""
    sources = []
    for number, source in enumerate(settings.every_source):
        seed = settings.seed + _SEED_STEP * number
        name = f"{number + 1}: {source.source}"
        if source.files or source.dataset:
            name += f" {source.dataset or source.files[0]}"
        if source.source == "nano":
            stream = _nano(tokenizer, seed, settings.prompt_weight)
        else:
            stream = _running(_documents(source, settings, tokenizer, seed))
        sources.append(Source(name, source.weight, stream))
    return Mixture(sources, settings.weigh_by)


def _running(documents: Iterator[Document]) -> Callable[[str], Iterator[Document]]:
    """One stream for all splits: the next split goes on where the one before ended."""
    return lambda _split: documents


def _nano(
    tokenizer: PreTrainedTokenizerFast, seed: int, prompt_weight: float
) -> Callable[[str], Iterator[Document]]:
    """Documents of the nano families, without end; a question without its context is noise."""
    from rad.data.nano.mixture import PROMPT_WEIGHT, encode, training_documents

    def stream(split: str) -> Iterator[Document]:
        for example in training_documents(seed + 1 if split == "held_out" else seed):
            ids, weights = encode(example, tokenizer)
            given = np.asarray(weights, dtype=np.float32)
            # float32 rounding: the generators mark prompt tokens with this very weight
            prompt = np.isclose(given, PROMPT_WEIGHT)
            weight = np.where(prompt, np.float32(prompt_weight), given)
            yield Document(np.asarray(ids), weight, example.prompt.encode(), divisible=False)

    return stream


def _documents(
    source: SourceSettings, settings: CorpusSettings, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[Document]:
    if source.source == "text":
        if not source.files:
            raise CorpusError("source `text` needs the key `files`")
        texts = shuffled(
            text_documents(Path(file) for file in source.files), seed, settings.shuffle_buffer
        )
        yield from _tokenised(texts, tokenizer, settings.separators)
        return
    chosen = source.messages or source.column
    values = (
        (where, field(where, record, chosen))
        for where, record in records(source, seed, settings.shuffle_buffer)
    )
    mixed = shuffled(values, seed, settings.shuffle_buffer)
    if source.messages is None:
        texts = (_text(where, value, chosen) for where, value in mixed)
        yield from _tokenised(texts, tokenizer, settings.separators)
        return
    template = ChatTemplate(tokenizer, source.chat_template)
    for where, value in mixed:
        ids, answer = template.encode(value, where)
        weights = np.where(answer, np.float32(1), np.float32(settings.prompt_weight))
        yield Document(ids, weights, _key(ids))


def _tokenised(
    texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, separators: str
) -> Iterator[Document]:
    """Every text between the special tokens asked for, all tokens weighing 1; empty texts pass."""
    bos = [tokenizer.bos_token_id] if separators in ("both", "bos") else []
    eos = [tokenizer.eos_token_id] if separators in ("both", "eos") else []
    before = [token for token in bos if token is not None]
    after = [token for token in eos if token is not None]
    for batch in _batches(texts):
        # verbose=False: documents longer than the model's range are cut into rows, not an error
        coded: Any = tokenizer(batch, add_special_tokens=False, verbose=False)
        for given in coded["input_ids"]:
            if given:
                ids = np.asarray([*before, *given, *after], dtype=np.int64)
                yield Document(ids, np.ones(len(ids), dtype=np.float32), _key(ids))


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _text(where: str, value: Any, column: str) -> str:
    if isinstance(value, str):
        return value
    kind = "nothing" if value is None else f"a {type(value).__name__}"
    hint = f"; conversations go by the key `messages: {column}`" if isinstance(value, list) else ""
    raise CorpusError(f"{where}: column {column!r} holds {kind}, not text{hint}")


def _key(ids: NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()

"""The study's tokenizer as the builders of tasks use it: token counts, its digest, the context."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from rad.data.records import first_line
from rad.evaluation.sources import Count, TaskError
from rad.files import file_digest, read_json
from rad.settings import EvaluationSettings

_GPT2 = ("vocab.json", "merges.txt")


def _counted(encode: Callable[[str], list[int]]) -> Count:
    """Tokens of a text; the `<s>` that a chat template wrote is not counted twice."""
    start = encode("")[:1]

    def count(text: str) -> int:
        tokens = encode(text)
        return len(tokens) - (len(start) == 1 and tokens[:2] == start * 2)

    return count


def counter(tokenizer_path: str) -> Count:
    """A function text -> number of tokens as the model will see them, `<s>` included.

    `tokenizer_path` is a checkpoint folder (of a hub id: `rad.models.sources.tokenizer_folder`) or
    one with nothing but GPT-2's two files. Raises `TaskError` when there is no tokenizer.
    """
    folder = Path(tokenizer_path)
    file = folder / "tokenizer.json"
    if not file.is_file() and all((folder / name).is_file() for name in _GPT2):
        from tokenizers import ByteLevelBPETokenizer

        gpt2 = ByteLevelBPETokenizer(*(str(folder / name) for name in _GPT2))
        return lambda text: len(gpt2.encode(text).ids)
    if file.is_file():
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(file))
        backend.no_truncation()
        return _counted(lambda text: backend.encode(text).ids)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    except (OSError, ValueError) as error:
        raise TaskError(f"no tokenizer at {tokenizer_path}: {first_line(error)}") from error
    return _counted(tokenizer.encode)


def trained_context(tokenizer_path: str) -> int | None:
    """The context that a checkpoint folder states, in tokens, or None."""
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        file = Path(tokenizer_path) / name
        if file.is_file() and isinstance(value := read_json(file).get(key), int):
            return value
    return None


def context_limit(settings: EvaluationSettings, tokenizer_path: str) -> int:
    """Longest prompt plus answer in tokens: `max_length`, else what the checkpoint states."""
    limit = settings.max_length or trained_context(tokenizer_path)
    if limit is None:
        raise TaskError(
            f"evaluation.max_length: {tokenizer_path} does not say how long its context is; set it"
        )
    return limit


def tokenizer_digest(folder: str) -> str:
    """sha256 of the tokenizer's own file, or of its serialised form where it has no such file."""
    path = Path(folder)
    if (path / "tokenizer.json").is_file():
        return file_digest(path / "tokenizer.json")
    if all((path / name).is_file() for name in _GPT2):
        text = "".join(file_digest(path / name) for name in _GPT2)
        return hashlib.sha256(text.encode()).hexdigest()
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    backend = getattr(loaded, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(loaded.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()

"""Token counts of a tokenizer folder, and the digest that says which tokenizer it was."""

from __future__ import annotations

import hashlib
from pathlib import Path

from rad.evaluation.sources import Count
from rad.files import file_digest

_GPT2 = ("vocab.json", "merges.txt")


def counter(folder: str) -> Count:
    """Text -> tokens as the model sees them, with `<s>`, of a checkpoint folder or hub id.

    A folder may also hold nothing but GPT-2's two files. Raises `TaskError` when it has none.
    """
    path = Path(folder)
    if not (path / "tokenizer.json").is_file() and all((path / n).is_file() for n in _GPT2):
        from tokenizers import ByteLevelBPETokenizer

        backend = ByteLevelBPETokenizer(*(str(path / name) for name in _GPT2))
        return lambda text: len(backend.encode(text).ids)
    from rad.evaluation.build import counter as checkpoint_counter

    return checkpoint_counter(folder)


def tokenizer_digest(folder: str) -> str:
    """sha256 of the tokenizer's own file, or of its serialised form when it comes from the hub."""
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

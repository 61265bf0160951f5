"""Corpora: packing, the held-out split, text cleaning, and what is said when data run out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rad.data.corpus import Corpus, CorpusError, build
from rad.data.nano import tokenizer as nano_tokenizer
from rad.data.text import paragraphs, read_text, text_documents
from rad.settings import CorpusSettings

BOOK = """Title page of Project Gutenberg
*** START OF THIS PROJECT GUTENBERG EBOOK X ***

First paragraph,\r
over two lines.

Second paragraph.

*** END OF THIS PROJECT GUTENBERG EBOOK X ***
licence
"""


def _settings(**changes: object) -> CorpusSettings:
    fields = {"source": "nano", "tokens": 4096, "held_out_tokens": 512, "context": 128, "seed": 3}
    return CorpusSettings.model_validate({**fields, **changes})


def test_nano_rows_hold_whole_documents_with_their_weights(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    build("distil", _settings(prompt_weight=0.2), tokenizer, tmp_path)
    corpus = Corpus(tmp_path)
    rows, weights = corpus.rows("train"), corpus.weights("train")
    assert rows.shape == weights.shape == (32, 128)
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert set(np.unique(weights)) == {0, 51, 255}
    assert (weights[rows == tokenizer.pad_token_id] == 0).all()
    assert (weights[rows == tokenizer.eos_token_id] == 255).all()
    # a document never ends at the border of a row unless it is complete
    text = tokenizer.decode(rows[0])
    assert text.count("<s>") <= text.count("</s>")


def test_no_held_out_document_is_trained_on(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    build("distil", _settings(tokens=65536, held_out_tokens=8192), tokenizer, tmp_path)
    corpus = Corpus(tmp_path)

    def documents(split: str) -> set[str]:
        text = tokenizer.decode(corpus.rows(split).reshape(-1).astype(np.int64))
        return {document for document in text.split("<s>") if "</s>" in document}

    assert len(documents("held_out")) > 50
    assert not documents("held_out") & documents("train")


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    for name in ("a", "b"):
        build("distil", _settings(), tokenizer, tmp_path / name)
    for file in ("train.bin", "held_out_weight.bin", "manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_books_lose_their_frame_and_keep_their_paragraphs(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(BOOK.encode())
    assert "Gutenberg" not in read_text(book) and "licence" not in read_text(book)
    assert paragraphs(book) == ["First paragraph, over two lines.", "Second paragraph."]
    assert text_documents([book]) == ["First paragraph, over two lines.\nSecond paragraph."]


def test_text_is_packed_end_to_end_and_running_out_is_said(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"Paragraph {n} says {n * 7}." for n in range(2000)))
    settings = _settings(source="text", files=[str(book)], tokens=2048)
    build("distil", settings, tokenizer, tmp_path / "corpus")
    assert (Corpus(tmp_path / "corpus").weights("train") == 255).all()
    with pytest.raises(CorpusError, match=r"corpora\.distil: the source has \d+ tokens"):
        build("distil", settings.model_copy(update={"tokens": 10**7}), tokenizer, tmp_path / "x")
    assert not (tmp_path / "x" / "manifest.json").exists()
    with pytest.raises(ValueError, match="no such text file"):
        read_text(tmp_path / "missing.txt")


def test_datasets_from_a_local_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"text": f"Record {n} is here. " * 30}) for n in range(200)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    settings = _settings(source="hub", dataset=str(folder), tokens=2048)
    manifest = build("distil", settings, nano_tokenizer.load(), tmp_path / "corpus")
    assert manifest["splits"]["train"]["rows"] == 16
    with pytest.raises(ValueError, match="no column 'body'"):
        build("d", settings.model_copy(update={"column": "body"}), nano_tokenizer.load(), tmp_path)

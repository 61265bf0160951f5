"""Corpora: sources and their weights, the held-out split, and what is said of bad data."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from rad.data.corpus import Corpus, CorpusError, build
from rad.data.nano import tokenizer as nano_tokenizer
from rad.data.nano.mixture import rows as nano_rows
from rad.data.nano.mixture import training_documents
from rad.data.packing import PADDING, START
from rad.data.records import folder_files, shuffled
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
    assert list(paragraphs(book)) == ["First paragraph, over two lines.", "Second paragraph."]
    assert list(text_documents([book])) == ["First paragraph, over two lines.\nSecond paragraph."]


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


# --- sources --------------------------------------------------------------------------------

TEXTS = [f"Record {n} says {n * 7} and {'no' if n % 3 else 'yes'}. " * 5 for n in range(300)]


def _write(file: Path, records: list[Any]) -> str:
    lines = "\n".join(json.dumps(record) for record in records)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_text(lines)
    return str(file)


def _tokens(output: Path, **changes: object) -> np.ndarray:
    build("distil", _settings(**changes), nano_tokenizer.load(), output)
    return np.asarray(Corpus(output).rows("train"))


def test_a_source_gives_the_same_rows_whatever_its_format(tmp_path: Path) -> None:
    records = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
    plain = _write(tmp_path / "a.jsonl", records)
    packed = _write(tmp_path / "a.jsonl.gz", records)
    columns = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(records), columns)
    folder = tmp_path / "folder"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train-00000-of-00001.parquet").write_bytes(Path(columns).read_bytes())
    _write(folder / "data" / "test-00000-of-00001.jsonl", [{"text": "not this one"}])
    expected = _tokens(tmp_path / "plain", source="jsonl", files=[plain])
    for name, source in {
        "gz": {"source": "jsonl", "files": [packed]},
        "parquet": {"source": "parquet", "files": [columns]},
        "folder": {"source": "hub", "dataset": str(folder)},
    }.items():
        assert np.array_equal(_tokens(tmp_path / name, **source), expected), name
    assert not np.array_equal(
        _tokens(tmp_path / "seed", source="jsonl", files=[plain], seed=4), expected
    )


def test_documents_start_where_the_boundaries_say(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    file = _write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    for packing in ("concatenate", "whole", "isolate"):
        settings = _settings(source="jsonl", files=[file], packing=packing, shuffle_buffer=1)
        manifest = build("distil", settings, tokenizer, tmp_path / packing)
        corpus = Corpus(tmp_path / packing)
        rows, boundaries = corpus.rows("train"), corpus.boundaries("train")
        assert np.array_equal(boundaries == START, rows == tokenizer.bos_token_id)
        assert np.array_equal(boundaries == PADDING, rows == tokenizer.pad_token_id)
        assert manifest["splits"]["train"]["documents"] == (boundaries == START).sum()
        assert corpus.isolated == (packing == "isolate")
        if packing == "concatenate":
            assert (boundaries[:, 0] != START).any() and (corpus.weights("train") == 255).all()
        else:
            assert (boundaries[:, 0] == START).all()
            assert (corpus.weights("train")[boundaries != 0] == 0).all()
    # in the order of the file: the first training document follows the held-out ones
    text = tokenizer.decode(np.asarray(Corpus(tmp_path / "concatenate").rows("held_out")).ravel())
    assert text.startswith("<s>" + TEXTS[0] + "</s><s>" + TEXTS[1])


@pytest.mark.parametrize("separators", ["both", "bos", "eos", "none"])
def test_separators_around_documents(tmp_path: Path, separators: str) -> None:
    tokenizer = nano_tokenizer.load()
    file = _write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    rows = _tokens(tmp_path / "c", source="jsonl", files=[file], separators=separators)
    assert (rows == tokenizer.bos_token_id).any() == (separators in ("both", "bos"))
    assert (rows == tokenizer.eos_token_id).any() == (separators in ("both", "eos"))
    assert (Corpus(tmp_path / "c").boundaries("train") == START).any()


def test_nano_documents_are_packed_as_in_pretraining(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    built = _tokens(tmp_path, tokens=2048, held_out_tokens=128)
    held_out = Corpus(tmp_path).rows("held_out")
    theirs = list(itertools.islice(nano_rows(training_documents(4), tokenizer, 128), 1))
    assert np.array_equal(held_out[0], theirs[0][0])
    boundaries = Corpus(tmp_path).boundaries("train")
    assert np.array_equal(boundaries == START, built == tokenizer.bos_token_id)


def test_sources_share_the_tokens_by_their_weights(tmp_path: Path) -> None:
    short = _write(tmp_path / "short.jsonl", [{"text": f"s{n}"} for n in range(4000)])
    long = _write(tmp_path / "long.jsonl", [{"body": text} for text in TEXTS])
    sources = [
        {"source": "jsonl", "files": [short], "weight": 3},
        {"source": "jsonl", "files": [long], "column": "body"},
        {"source": "nano", "weight": 4},
    ]
    settings = _settings(source=None, sources=sources, tokens=16384)
    manifest = build("distil", settings, nano_tokenizer.load(), tmp_path / "tokens")
    for split in ("held_out", "train"):
        read = manifest["splits"][split]["sources"]
        total = sum(part["tokens"] for part in read)
        longest = 128 + 2
        for part, weight in zip(read, (3, 1, 4), strict=True):
            assert abs(part["tokens"] - total * weight / 8) <= longest, (split, part)
    by_documents = settings.model_copy(update={"weigh_by": "documents", "tokens": 4096})
    manifest = build("distil", by_documents, nano_tokenizer.load(), tmp_path / "documents")
    a, b, c = (part["documents"] for part in manifest["splits"]["train"]["sources"])
    assert abs(a - 3 * b) <= 3 and abs(4 * a - 3 * c) <= 12
    # the settings come back from their JSON form, as the workflow hands them over
    assert CorpusSettings.model_validate_json(settings.model_dump_json()) == settings


def test_a_held_out_document_that_comes_twice_is_not_trained_on(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    records = [{"text": text} for text in TEXTS]
    twice = _write(tmp_path / "twice.jsonl", [*records[:20], *records])
    settings = _settings(
        source="jsonl", files=[twice], packing="isolate", shuffle_buffer=1, held_out_tokens=1024
    )
    build("distil", settings, tokenizer, tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    seen = {
        split: set(tokenizer.decode(np.asarray(corpus.rows(split)).ravel()).split("<s>"))
        for split in ("held_out", "train")
    }
    assert {text.replace("<pad>", "") for text in seen["held_out"]} & {
        text.replace("<pad>", "") for text in seen["train"]
    } <= {""}


def test_shuffling_keeps_every_item_and_is_bounded() -> None:
    pulled = 0

    def numbers() -> Any:
        nonlocal pulled
        for number in range(1000):
            pulled += 1
            yield number

    stream = shuffled(numbers(), 7, 50)
    first = next(stream)
    assert pulled == 51
    order = [first, *stream]
    assert sorted(order) == list(range(1000)) and order != sorted(order)
    assert order == list(shuffled(range(1000), 7, 50))
    assert list(shuffled(range(9), 7, 1)) == list(range(9))


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    # no document longer than a row, so that packing keeps no more in one case than in the other
    file = _write(tmp_path / "a.jsonl", [{"text": f"Number {n} is here."} for n in range(16000)])
    tokenizer = nano_tokenizer.load()
    peaks = []
    for tokens in (16384, 131072):
        settings = _settings(source="jsonl", files=[file], tokens=tokens, shuffle_buffer=100)
        build("warm", settings.model_copy(update={"tokens": 512}), tokenizer, tmp_path / "warm")
        tracemalloc.start()
        build("distil", settings, tokenizer, tmp_path / str(tokens))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # the larger corpus has 0.4 MB more of rows alone
    assert peaks[1] - peaks[0] < 50_000


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"", {}, r"has 0 tokens in 0 documents; 4608 tokens are needed \(512 held out"),
        (b'{"text": "one"}\n', {}, r"has \d tokens in 1 documents; 4608 tokens are needed"),
        (b'{"text": "one"}\n\n{"text": "tw', {}, r"a.jsonl, line 3: not JSON"),
        (b'{"text": "one"}\n\xff\xfe\n', {}, r"a.jsonl, line 2: not JSON"),
        (b'[{"text": "one"}]\n', {}, r"a.jsonl, line 1: a list, not an object"),
        (b'{"text": 3}\n', {}, r"line 1: column 'text' holds a int, not text"),
        (b'{"text": null}\n', {}, r"line 1: column 'text' holds nothing, not text"),
        (b'{"text": [{}]}\n', {}, r"not text; conversations go by the key `messages: text`"),
        (b'{"text": "a", "id": 1}\n', {"column": "body"}, r"1: no column 'body'; it has text, id"),
        (b'{"text": "a"}\n', {"messages": "chat"}, r"the tokenizer has no chat template"),
        (b"", {"source": "parquet"}, r"a.jsonl: unreadable parquet after row 0"),
        (b"", {"files": ["no.jsonl"]}, r"no.jsonl: no such JSON Lines file"),
        (b"", {"files": []}, r"source `jsonl` needs the key `files`"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, content: bytes, changes: dict[str, Any], message: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    settings = _settings(**{"source": "jsonl", "files": [str(file)], **changes})
    with pytest.raises(CorpusError, match=message) as caught:
        build("distil", settings, nano_tokenizer.load(), tmp_path / "corpus")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "corpus").glob("*"))


def test_damaged_archives_and_parquet_files_are_named(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    records = [{"text": os.urandom(200).hex()} for _ in range(1000)]
    packed = Path(_write(tmp_path / "a.jsonl.gz", records))
    packed.write_bytes(packed.read_bytes()[:-1000])
    columns = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), columns, compression="gzip")
    data = bytearray(columns.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20_000] = bytes(20_000)
    columns.write_bytes(data)
    for kind, file in (("jsonl", packed), ("parquet", columns)):
        settings = _settings(source=kind, files=[str(file)], tokens=10**7, shuffle_buffer=1)
        with pytest.raises(CorpusError, match=rf"{file.name}: unreadable .*after (line|row) \d+"):
            build("distil", settings, tokenizer, tmp_path / "corpus")
    whole = tmp_path / "whole.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, "body": "x"}]), whole)
    with pytest.raises(CorpusError, match=r"whole.parquet: no column 'text'; it has id, body"):
        build(
            "distil",
            _settings(source="parquet", files=[str(whole)]),
            tokenizer,
            tmp_path / "corpus",
        )


def test_the_source_that_ran_out_is_named(tmp_path: Path) -> None:
    few = _write(tmp_path / "few.jsonl", [{"text": text} for text in TEXTS[:3]])
    sources = [{"source": "nano"}, {"source": "jsonl", "files": [few], "weight": 3}]
    with pytest.raises(CorpusError, match=r"source 2: jsonl .*few.jsonl has \d+ tokens in 3 docu"):
        build(
            "distil", _settings(source=None, sources=sources), nano_tokenizer.load(), tmp_path / "c"
        )


def test_settings_name_sources_in_one_way() -> None:
    with pytest.raises(ValidationError, match="give `source`, or `sources` for several"):
        _settings(source=None)
    with pytest.raises(ValidationError, match="`sources` and 'files' are both given"):
        _settings(source=None, files=["a"], sources=[{"source": "nano"}])


def test_a_folder_without_the_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no .jsonl, .jsonl.gz, .parquet file"):
        folder_files(tmp_path, "train")
    _write(tmp_path / "part-1.jsonl", [{"text": "x"}])
    _write(tmp_path / "test.jsonl", [{"text": "x"}])
    assert [file.name for file in folder_files(tmp_path, "train")] == ["part-1.jsonl"]
    with pytest.raises(CorpusError, match=r"no file of split 'dev' among part-1.jsonl, test.jsonl"):
        folder_files(tmp_path, "dev")


def test_a_hub_dataset_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    code = (
        "from rad.data.records import records; from rad.settings import SourceSettings\n"
        "next(records(SourceSettings(source='hub', dataset='nobody/nothing'), 0, 10))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "CorpusError: dataset nobody/nothing: cannot be read (" in done.stderr.splitlines()[-1]


def test_a_full_disk_leaves_the_corpus_that_was_there(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    manifest = build("distil", _settings(), tokenizer, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        with pytest.raises(CorpusError, match="no space left for the corpus"):
            build("distil", _settings(tokens=65536), tokenizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    corpus = Corpus(tmp_path)
    assert corpus.manifest == manifest
    corpus.verify()
    assert not list(tmp_path.glob(".*"))


def test_changed_and_cut_files_are_refused(tmp_path: Path) -> None:
    build("distil", _settings(), nano_tokenizer.load(), tmp_path)
    file = tmp_path / "train_boundary.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorpusError, match=r"train_boundary.bin: not the bytes that were built"):
        Corpus(tmp_path).verify()
    file.write_bytes(data[:-1])
    with pytest.raises(CorpusError, match=r"train_boundary.bin: expected 4096 bytes, found 4095"):
        Corpus(tmp_path).boundaries("train")

"""Tokenizers, texts and question files for the RULER tests: small ones made here, real ones too."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from rad.evaluation.ruler import tasks
from rad.evaluation.ruler.generate import Builder
from rad.evaluation.ruler.haystack import TextFiles
from rad.evaluation.ruler.questions import QuestionFile
from rad.evaluation.ruler.words import word_lists

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared"))
GPT2 = SHARED / "data" / "tokenizers" / "gpt2"
needs_shared = pytest.mark.skipif(
    not (GPT2 / "vocab.json").is_file(), reason=f"no tokenizer at {GPT2} (set RAD_SHARED)"
)
Document = dict[str, Any]


def _sentence(rng: random.Random) -> str:
    words = [rng.choice(word_lists().vocabulary) for _ in range(rng.randint(5, 14))]
    return f"{' '.join(words).capitalize()}."


def book(path: Path, sentences: int = 1200) -> Path:
    """Paragraphs of sentences of real words, without digits."""
    rng = random.Random(0)
    parts = [" ".join(_sentence(rng) for _ in range(5)) for _ in range(sentences // 5)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def squad(path: Path, articles: int = 6) -> Path:
    """SQuAD 2.0 with one answered and one impossible question per paragraph."""
    rng = random.Random(1)
    data = []
    for article in range(articles):
        paragraphs = []
        for number in range(5):
            answer = f"Answer{article}x{number}"
            context = f"{_sentence(rng)} The name is {answer}. {_sentence(rng)} {_sentence(rng)}"
            texts = [{"text": text, "answer_start": 0} for text in (answer, answer, "The name")]
            asked = {"question": f"Which name has article {article}, part {number}?"}
            paragraphs.append(
                {
                    "context": context,
                    "qas": [
                        {**asked, "answers": texts, "is_impossible": False},
                        {"question": "Nobody knows?", "answers": [], "is_impossible": True},
                    ],
                }
            )
        data.append({"title": str(article), "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return path


def hotpotqa(path: Path, questions: int = 12) -> Path:
    """HotpotQA's distractor layout: ten documents per question, two of them supporting."""
    rng = random.Random(2)
    items = []
    for number in range(questions):
        context = [
            [
                f"Title {number}.{at}",
                [f"{_sentence(rng)} ", f"Part {number}.{at}. ", _sentence(rng)],
            ]
            for at in range(10)
        ]
        support = [[f"Title {number}.3", 1], [f"Title {number}.7", 0]]
        asked = {"question": f"What links {number}?", "answer": f"Part {number}.7"}
        items.append({**asked, "supporting_facts": support, "context": context})
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


@cache
def small_tokenizer() -> ByteLevelBPETokenizer:
    """A byte-level BPE of 1500 tokens, trained here on the words and the prompts."""
    tokenizer = ByteLevelBPETokenizer()
    rng = random.Random(3)
    prompts = [
        " ".join(pair) for pair in (tasks.NIAH_MANY, tasks.VT, tasks.CWE, tasks.FWE, tasks.QA)
    ]
    noise = [" ".join(tasks.NOISE), tasks.NEEDLE]
    texts = [*[_sentence(rng) for _ in range(1500)], *(20 * [*prompts, *noise])]
    tokenizer.train_from_iterator(texts, vocab_size=1500, show_progress=False)
    return tokenizer


def small_count(text: str) -> int:
    """Tokens of a text with the small tokenizer, and one for `<s>`."""
    return 1 + len(small_tokenizer().encode(text).ids)


@cache
def gpt2_tokenizer() -> ByteLevelBPETokenizer:
    return ByteLevelBPETokenizer(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt"))


def gpt2_count(text: str) -> int:
    return len(gpt2_tokenizer().encode(text).ids)


@cache
def stories_tokenizer() -> Tokenizer:
    """Of a trained checkpoint with a vocabulary of 512."""
    tokenizer = Tokenizer.from_file(str(SHARED / "models" / "stories260K-hf" / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def stories_count(text: str) -> int:
    return len(stories_tokenizer().encode(text).ids)


def small_builder(folder: Path, count: Callable[[str], int] = small_count) -> Builder:
    """A builder of made-up texts and questions, written below `folder`."""
    path = book(folder / "book.txt")
    found = {
        "squad": QuestionFile("mine", "squad", squad(folder / "squad.json")),
        "xquad": QuestionFile("mine", "xquad", squad(folder / "xquad.json")),
        "hotpotqa": QuestionFile("mine", "hotpotqa", hotpotqa(folder / "hotpotqa.json")),
    }
    return Builder("mine", count, TextFiles("mine", [str(path)], Path()), found)


def shared_builder(count: Callable[[str], int] = gpt2_count) -> Builder:
    """A builder of the public-domain books and XQuAD."""
    data = SHARED / "data"
    books = sorted(str(path) for path in (data / "text" / "gutenberg").glob("*.txt"))
    found = {"xquad": QuestionFile("mine", "xquad", data / "ruler" / "xquad" / "xquad.en.json")}
    return Builder("mine", count, TextFiles("mine", books, Path()), found)


def listed(document: Document) -> list[str]:
    """The words that a cwe document lists last: those that are asked about."""
    context = document["prompt"].rsplit("Memorize the ones that appear most often.\n", 1)[1]
    return [item.strip() for item in re.split(r"\d+\. ", context.split("\nQuestion:")[0])[1:]]

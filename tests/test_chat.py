"""Conversations: what a chat template writes, which tokens are answers, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rad.data.chat import ChatTemplate
from rad.data.corpus import Corpus, CorpusError, build
from rad.data.nano import tokenizer as nano_tokenizer
from rad.settings import CorpusSettings

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
# thoughts are written in the last answer alone, as some published templates do
THINKING = (
    "{% for m in messages %}[{{ m.role }}] "
    "{% if m.role == 'assistant' and loop.last %}(thought){% endif %}{{ m.content | trim }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[a] {% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}[u] {{ m.content }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "a or b?"},
    {"role": "assistant", "content": " a "},
    {"role": "user", "content": "Why a?"},
    {"role": "assistant", "content": "Because."},
]


def _chat(tmp_path: Path, template: str) -> ChatTemplate:
    (tmp_path / "chat.jinja").write_text(template)
    return ChatTemplate(nano_tokenizer.load(), str(tmp_path / "chat.jinja"))


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHAT, ["a</s>", "Because.</s>"]),
        (THINKING, ["a</s>", "(thought)Because.</s>"]),
        (MARKED, [" a </s>", "Because.</s>"]),
    ],
)
def test_the_tokens_of_answers_are_marked(
    tmp_path: Path, template: str, answers: list[str]
) -> None:
    chat = _chat(tmp_path, template)
    ids, answer = chat.encode(TALK, "here")
    pieces = [
        chat.tokenizer.decode([int(token) for token, _ in group])
        for marked, group in itertools.groupby(zip(ids, answer, strict=True), lambda t: bool(t[1]))
        if marked
    ]
    assert pieces == answers or [piece.strip() for piece in pieces] == answers
    other = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
             for m in TALK]  # fmt: skip
    assert np.array_equal(chat.encode(other, "here")[0], ids)


def test_a_corpus_of_chats_weighs_prompts_less(tmp_path: Path) -> None:
    tokenizer = nano_tokenizer.load()
    tokenizer.chat_template = CHAT
    talks = [
        {"chat": [{"role": "user", "content": f"What is {n}?"},
                  {"role": "assistant", "content": f"The number {n}."}]}
        for n in range(400)
    ]  # fmt: skip
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, talks)))
    settings = CorpusSettings(
        source="jsonl",
        files=[str(file)],
        messages="chat",
        packing="isolate",
        prompt_weight=0.2,
        tokens=4096,
        held_out_tokens=512,
        context=128,
    )
    build("distil", settings, tokenizer, tmp_path / "corpus")
    corpus = Corpus(tmp_path / "corpus")
    row, weight = corpus.rows("train")[3], corpus.weights("train")[3]
    assert set(np.unique(weight)) == {0, 51, 255}
    answers = tokenizer.decode(row[weight == 255].astype(np.int64)).split("</s>")
    assert len(answers) > 2 and all(a.strip().startswith("The number") for a in answers[:-1])
    # a document longer than a row is no error, and nothing is put around what the template wrote
    assert tokenizer.decode(row.astype(np.int64)).count("<s>") == len(answers) - 1


def test_no_template_depends_on_the_day(tmp_path: Path) -> None:
    chat = _chat(tmp_path, "{{ strftime_now('%d %b %Y') }}: " + CHAT)
    assert chat.tokenizer.decode(chat.encode(TALK, "x")[0]).startswith("26 Jul 2024: <s>[user]")


@pytest.mark.parametrize(
    ("template", "value", "message"),
    [
        (CHAT, "text", "here: no conversation"),
        (CHAT, [], "here: no conversation"),
        (CHAT, [{"role": "user"}], "here: no conversation"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "refuses it .roles must alternate"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", TALK, "turn 2 differently"),
        ("", TALK, "no chat template"),
    ],
)
def test_chats_that_cannot_be_written_are_refused(
    tmp_path: Path, template: str, value: Any, message: str
) -> None:
    with pytest.raises(CorpusError, match=message) as caught:
        _chat(tmp_path, template).encode(value, "here")
    assert "\n" not in str(caught.value)

"""RULER documents: lengths, answers, seeds, official prompts, and one clear line for bad input."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruler_fixture import (
    book,
    listed,
    needs_shared,
    shared_builder,
    small_builder,
    small_count,
    stories_count,
)

from rad.evaluation.ruler import counted, tasks
from rad.evaluation.ruler.generate import Builder
from rad.evaluation.ruler.haystack import Haystack, TextFiles, sentences
from rad.evaluation.ruler.questions import QuestionFile
from rad.evaluation.ruler.sizing import Unfit, largest
from rad.evaluation.scoring.ruler import ruler_results
from rad.evaluation.sources import TaskError

Document = dict[str, Any]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return small_builder(tmp_path_factory.mktemp("ruler"))


def make(builder: Builder, task: str, length: int = 2048, samples: int = 4) -> list[Document]:
    return builder.documents(task, length, samples, seed=7)[0]


def check_filled(builder: Builder, task: str, length: int, samples: int) -> None:
    documents, facts = builder.documents(task, length, samples, seed=7)
    room = length - tasks.EVERY[task].new_tokens
    shares = []
    for document in documents:
        tokens = builder.count(document["prompt"])
        assert document["tokens"] == tokens
        assert 0.9 * room <= tokens <= room, (task, length, document["id"])
        shares.append(tokens / room)
    assert facts["fill"] == {
        "min": round(min(shares), 4),
        "mean": round(sum(shares) / len(shares), 4),
    }
    assert len({document["prompt"] for document in documents}) == samples


# --- lengths --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [600, 1024, 2048, 4096])
@pytest.mark.parametrize("task", tasks.EVERY)
def test_every_length_is_filled(builder: Builder, task: str, length: int) -> None:
    check_filled(builder, task, length, 2)


@needs_shared
@pytest.mark.parametrize("task", [name for name in tasks.EVERY if name not in ("qa_1", "qa_2")])
def test_books_and_gpt2_fill_every_length(task: str) -> None:
    builder = shared_builder()
    for length in (512, 1024, 2048, 4096):
        check_filled(builder, task, length, 2)


@needs_shared
def test_128k() -> None:
    check_filled(shared_builder(), "niah_single_3", 131_072, 1)


@needs_shared
def test_a_vocabulary_of_512_fills_lengths_too() -> None:
    builder = shared_builder(stories_count)
    for task in tasks.EVERY:
        if task not in ("qa_1", "qa_2"):
            check_filled(builder, task, 1024, 3)


@given(
    costs=st.lists(st.integers(0, 30), min_size=1, max_size=60),
    wrong=st.floats(0.3, 3.0),
    base=st.integers(0, 50),
    room=st.integers(0, 1200),
)
@settings(max_examples=300, deadline=None)
def test_the_search_fits_whatever_the_estimates(
    costs: list[int], wrong: float, base: int, room: int
) -> None:
    def count(size: int) -> int:
        return base + sum(costs[:size])

    def estimate(size: int) -> int:
        return int(wrong * sum(costs[:size]))

    if base > room:
        with pytest.raises(Unfit):
            largest(count, estimate, 0, len(costs), room)
        return
    size, tokens = largest(count, estimate, 0, len(costs), room)
    assert tokens == count(size) <= room
    best = max(n for n in range(len(costs) + 1) if count(n) <= room)
    exact, _ = largest(count, count, 0, len(costs), room)
    assert count(exact) >= min(count(best), room - room // 100), "with good estimates"


def test_short_lengths_have_documented_variants(builder: Builder) -> None:
    facts = {length: builder.documents("cwe", length, 1, 7)[1] for length in (600, 2048, 8192)}
    assert facts[8192]["variant"]["often"] == 30 and facts[8192]["official"]
    assert facts[2048]["variant"]["often"] == 6 and facts[2048]["variant"]["common"] == 10
    assert facts[600]["variant"]["common"] < 10 and not facts[600]["official"]
    short, long = (builder.documents("vt", length, 1, 7)[1] for length in (600, 2048))
    assert not short["official"]
    assert long["official"] and long["variant"] == {"hops": 4, "example_tokens": 500}
    asked, all_ten = (builder.documents("qa_2", length, 1, 7)[1] for length in (600, 4096))
    assert all_ten["variant"] == {"given": "all"} and asked["variant"] == {"given": "supporting"}


# --- answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [600, 2048, 4096])
@pytest.mark.parametrize("task", [name for name in tasks.EVERY if name.startswith("niah")])
def test_every_needle_comes_once(builder: Builder, task: str, length: int) -> None:
    documents, facts = builder.documents(task, length, 4, seed=7)
    scaled = next(iter(facts["variant"].values()), 1)
    answers = 1 if "keys" in facts["variant"] else scaled
    for document in documents:
        prompt, references = document["prompt"], document["references"]
        found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?:\s|$)", prompt)
        assert len(references) == answers == len(set(references))
        assert all(prompt.count(reference) == 1 for reference in references)
        keys = Counter(key for key, _ in found)
        query = prompt.rsplit("for ", 1)[1].split(" mentioned")[0]
        asked = re.split(r", and |, ", query)
        values = [value for key in asked for k, value in found if k == key]
        assert sorted(values) == sorted(references)
        if "values" in facts["variant"]:
            assert keys == {asked[0]: scaled}
        elif tasks.EVERY[task].options["haystack"] == "needle":
            assert len(found) >= 3 and set(keys.values()) == {1}
        else:
            assert len(found) == scaled and set(keys.values()) == {1}
        assert all(0 <= depth <= 1 for depth in document["depths"])


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_are_at_every_depth(builder: Builder, task: str) -> None:
    documents = make(builder, task, 2048, 24)
    depths = [depth for document in documents for depth in document["depths"]]
    assert min(depths) < 0.25 and max(depths) > 0.75
    assert sum(0.25 < depth < 0.75 for depth in depths) > 4


def test_a_chain_is_complete_and_in_order(builder: Builder) -> None:
    for document in make(builder, "vt", 4096, 6):
        example, question = document["prompt"].split("\n\nMemorize", 1)
        names = document["references"]
        links = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question)
        value = links[0][1]
        assert links == [(names[0], value), *zip(names[1:], names, strict=False)]
        assert len(names) == 5 and f"5 variables are assigned the value {value}" in question
        worked = example.rsplit("they are:  ", 1)[1].split()
        assert re.findall(r"VAR (\w+) = ", example) == worked and len(worked) == 5
        assert not set(worked) & set(names) and value not in example
        before, prefix, _ = example.rpartition("they are: ")
        assert 400 < small_count(before + prefix) <= 500


@pytest.mark.parametrize("length", [600, 2048, 4096])
def test_common_words_come_as_often_as_said(builder: Builder, length: int) -> None:
    documents, facts = builder.documents("cwe", length, 4, seed=7)
    variant = facts["variant"]
    for document in documents:
        counts = Counter(listed(document))
        common = [word for word, count in counts.items() if count == variant["often"]]
        assert sorted(common) == sorted(document["references"])
        assert len(common) == variant["common"]
        assert set(counts.values()) == {variant["often"], variant["seldom"]}
        assert document["prompt"].count("Question:") == 2, "one worked example"
        assert f"the {variant['common']} most common words" in document["prompt"]


def test_the_word_list_of_cwe_can_be_exhausted(builder: Builder) -> None:
    draft = counted.draft_cwe(
        tasks.variants("cwe", 131_072)[0], random.Random(0), builder.meter, 131_072
    )
    assert draft.most > 9000
    text = draft.render(9000, 0)
    words = Counter(listed({"prompt": text}))
    assert Counter(words.values()) == {3: 9000, 30: 10}


@pytest.mark.parametrize("length", [600, 1024, 4096])
def test_coded_words_have_one_right_order(builder: Builder, length: int) -> None:
    for document in make(builder, "fwe", length):
        context = document["prompt"].split("coded words. ", 1)[1].split("\nQuestion")[0]
        ranked = Counter(context.split(" ")).most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == document["references"]
        counts = [count for _, count in ranked]
        assert counts[1] > counts[2] > counts[3] > counts[4]
        total = max(n for n in range(9000) if counted.zipf_counts(n, 9)[:3] == counts[:3])
        assert counts == counted.zipf_counts(total, len(counts))[: len(counts)]


@pytest.mark.parametrize("task", ["qa_1", "qa_2", "qa_xquad"])
def test_answers_are_among_the_documents_once(builder: Builder, task: str) -> None:
    for length in (600, 2048, 4096):
        for document in make(builder, task, length):
            context, asked = document["prompt"].split("\n\nAnswer the question", 1)
            assert document["match"] == "part" and document["references"]
            assert len(set(document["references"])) == len(document["references"])
            assert context.count(document["references"][0]) == 1
            numbers = [int(n) for n in re.findall(r"^Document (\d+):$", context, re.MULTILINE)]
            assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 1
            assert asked.endswith(" Answer:") and "Nobody knows" not in asked


def test_a_document_is_asked_about_once_and_places_differ(builder: Builder) -> None:
    documents = make(builder, "qa_1", 2048, 20)
    assert len({document["question"] for document in documents}) == 20
    at = [doc["prompt"].index(doc["references"][0]) / len(doc["prompt"]) for doc in documents]
    assert min(at) < 0.3 and max(at) > 0.7


def test_hotpotqa_gives_all_ten_documents_where_they_fit(builder: Builder) -> None:
    for document in make(builder, "qa_2", 4096):
        number = re.search(r"What links (\d+)\?", document["prompt"])
        assert number is not None
        for at in range(10):
            assert document["prompt"].count(f"Title {number[1]}.{at}\n") == 1


def test_gold_answers_score_one_and_none_scores_zero(builder: Builder) -> None:
    for task in tasks.EVERY:
        for document in make(builder, task, 2048, 2):
            assert ruler_results(document, [document["target"]]) == {"string_match": 1.0}
            assert ruler_results(document, [""]) == {"string_match": 0.0}
            assert ruler_results(document, ["\x00\x01"]) == {"string_match": 0.0}


# --- seeds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.EVERY)
def test_seeds(builder: Builder, task: str, tmp_path: Path) -> None:
    first, _ = builder.documents(task, 1024, 4, seed=7)
    more, _ = small_builder(tmp_path).documents(task, 1024, 6, seed=7)
    assert json.dumps(more[:4]) == json.dumps(first), "same seed, more samples, fresh builder"
    others = [builder.documents(task, 1024, 4, seed=8)[0], make(builder, task, 2048, 4)]
    others.append(builder.documents(task, 1024, 4, seed=7, stream="probe")[0])
    seen = {document["prompt"] for document in first}
    for each in others:
        assert not seen & {document["prompt"] for document in each}


def test_the_global_generator_is_neither_read_nor_changed(builder: Builder) -> None:
    random.seed(5)
    before = random.getstate()
    first = make(builder, "niah_multikey_1")
    assert random.getstate() == before
    random.seed(6)
    assert make(builder, "niah_multikey_1") == first


@needs_shared
def test_documents_are_those_of_the_first_version() -> None:
    # whoever changes these bytes raises VERSION in generate.py
    builder = shared_builder()
    found = {}
    for task in ("niah_single_2", "niah_multikey_3", "vt", "cwe", "fwe", "qa_xquad"):
        text = json.dumps(make(builder, task, 1024, 2))
        found[task] = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert found == GOLDEN


GOLDEN = {
    "niah_single_2": "0a3ad6560549",
    "niah_multikey_3": "c3b4de9187b5",
    "vt": "1fbe82736c80",
    "cwe": "c62dacf137b2",
    "fwe": "6edffb944ded",
    "qa_xquad": "86a8de29378e",
}


# --- official prompts -----------------------------------------------------------------------


def test_prompts_are_the_official_ones(builder: Builder) -> None:
    one, many = (make(builder, task)[0]["prompt"] for task in ("niah_single_3", "niah_multiquery"))
    assert one.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the uuid afterwards.\n"
    )
    key = one.rsplit(" for ", 1)[1].split(" ")[0]
    assert one.endswith(
        f"\nWhat is the special magic uuid for {key} mentioned in the provided text? "
        f"The special magic uuid for {key} mentioned in the provided text is"
    )
    assert f"One of the special magic uuids for {key} is: " in one
    assert "Some special magic numbers are hidden within" in many
    assert re.search(r"for \S+, \S+, \S+, and \S+ mentioned in the provided text are$", many)
    noise = make(builder, "niah_single_1")[0]["prompt"].split("\n")
    line = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    assert Counter(noise)[line] == len(noise) - 3
    chain = make(builder, "vt", 4096)[0]["prompt"]
    assert chain.count("\nMemorize and track the chain(s)") == 1
    assert re.search(r" 5 variables are assigned the value \d{5}, they are: $", chain)


def test_new_tokens_are_the_official_ones() -> None:
    found = {name: task.new_tokens for name, task in tasks.TASKS.items()}
    assert len(found) == 13
    rest = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert found == {**{name: 128 for name in found if name[:4] == "niah"}, **rest}


def test_a_chat_template_is_counted_and_the_prefix_comes_after_it(tmp_path: Path) -> None:
    plain = small_builder(tmp_path)
    header = "<|user|> " * 30
    wrapped = Builder(
        "mine",
        small_count,
        plain.texts,
        plain.questions,
        wrap=lambda text, prefix: f"{header}{text}<|end|><|assistant|>{prefix}",
    )
    for task in tasks.EVERY:
        check_filled(wrapped, task, 1024, 2)
        prompt = make(wrapped, task, 1024, 1)[0]["prompt"]
        assert prompt.startswith(header)
        assert re.search(r"<\|assistant\|> (?:The special|Answer)", prompt)


# --- text -----------------------------------------------------------------------------------


def test_sentences_keep_every_word() -> None:
    text = 'He met Mr. Holmes. "Come!" he said.  It rained.\nIt\'s 3.5 miles. (Really?) "No." Yes'
    found = sentences(text)
    assert " ".join(found) == " ".join(text.split())
    assert found[0] == "He met Mr. Holmes." and "It rained." in found and found[-1] == "Yes"


def test_a_short_text_is_repeated(tmp_path: Path) -> None:
    text = "\n\n".join(
        f"This is part {chr(97 + n)} of it. It has two sentences." for n in range(26)
    )
    hay = Haystack("mine", [text])
    passage = hay.passage(25, 1000)
    assert len(passage.words) >= 1000
    assert passage.words[:4] == ["This", "is", "part", "z"]
    assert passage.words[10:14] == ["This", "is", "part", "a"]
    assert passage.ends[:3] == [6, 10, 16] and passage.ends[-1] == len(passage.words)
    file = tmp_path / "short.txt"
    file.write_text(text)
    builder = Builder("mine", small_count, TextFiles("mine", [str(file)], Path()))
    check_filled(builder, "niah_single_2", 4096, 2)


# --- bad input ------------------------------------------------------------------------------


def fails(builder: Builder, task: str, length: int = 1024, samples: int = 2) -> str:
    with pytest.raises(TaskError) as caught:
        builder.documents(task, length, samples, seed=7)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("evaluation.tasks.mine.")
    return message


@pytest.mark.parametrize("task", tasks.EVERY)
def test_too_short_names_a_length_that_is_enough(builder: Builder, task: str) -> None:
    message = fails(builder, task, 160)
    least = int(message.rsplit(" ", 1)[1])
    assert task in message and 160 < least < 700
    check_filled(builder, task, least, 3)
    assert "least length" in fails(builder, task, 8)


def test_missing_and_wrong_files(builder: Builder, tmp_path: Path) -> None:
    def with_texts(*files: str) -> Builder:
        return Builder("mine", small_count, TextFiles("mine", files, tmp_path))

    assert "no text file is named" in fails(with_texts(), "niah_single_2")
    assert str(tmp_path / "gone.txt") in fails(with_texts("gone.txt"), "niah_multivalue")
    (tmp_path / "tiny.txt").write_text("One sentence.")
    assert "too little text" in fails(with_texts("tiny.txt"), "niah_single_2")
    assert "needs the questions of hotpotqa" in fails(with_texts(), "qa_2")
    assert "unknown RULER task 'niah_multikey'; did you mean" in fails(builder, "niah_multikey")
    assert "samples" in fails(builder, "vt", samples=0)
    assert "30 questions that fit" in fails(builder, "qa_1", samples=31)


@pytest.mark.parametrize("content", ["{", "[]", '{"data": [{}]}', '{"data": []}', "[1]"])
@pytest.mark.parametrize("dataset", ["squad", "hotpotqa"])
def test_a_file_of_another_layout_is_named(content: str, dataset: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(content)
    found = {dataset: QuestionFile("mine", dataset, path)}
    builder = Builder("mine", small_count, TextFiles("mine", [], tmp_path), found)
    task = "qa_1" if dataset == "squad" else "qa_2"
    assert str(path) in fails(builder, task)


def test_a_haystack_that_holds_the_answer_is_drawn_again(tmp_path: Path) -> None:
    # all numbers from 1000000 on that a document might draw cannot be written; one can
    first = small_builder(tmp_path)
    value = first.documents("niah_single_2", 1024, 1, seed=7)[0][0]["references"][0]
    path = book(tmp_path / "again.txt")
    parts = path.read_text().split("\n\n")
    path.write_text("\n\n".join(f"The value {value} is here. {part}" for part in parts))
    builder = Builder("mine", small_count, TextFiles("mine", [str(path)], Path()))
    document = builder.documents("niah_single_2", 1024, 1, seed=7)[0][0]
    assert document["references"] != [value]
    assert document["prompt"].count(document["references"][0]) == 1

"""The nano generators: deterministic, apart from one another, true, and of the promised length."""

from __future__ import annotations

import ast
import itertools
import re
from typing import Any

import pytest

from rad.data import nano
from rad.data.nano import crux, mixture, ruler, tokenizer
from rad.data.nano.example import Example, split_of
from rad.data.nano.words import ADJECTIVES, NAMES, NOUNS

SPLITS = ("train", "test", "hard")


@pytest.mark.parametrize("family", nano.FAMILIES)
def test_same_arguments_same_examples(family: str) -> None:
    first = nano.generate(family, "test", 5, 20)
    assert first == nano.generate(family, "test", 5, 20)
    assert [e.prompt for e in first] != [e.prompt for e in nano.generate(family, "test", 6, 20)]


@pytest.mark.parametrize("family", nano.FAMILIES)
def test_splits_are_disjoint(family: str) -> None:
    prompts = {split: {e.prompt for e in nano.generate(family, split, 0, 100)} for split in SPLITS}
    for split, found in prompts.items():
        assert {split_of(prompt) for prompt in found} == {split}
    assert len(prompts["test"]) == len(prompts["hard"]) == 100


def test_training_stream_has_no_test_prompt() -> None:
    documents = list(itertools.islice(nano.training_documents(3), 500))
    assert {split_of(d.prompt) for d in documents} == {"train"}
    assert {d.family for d in documents} == set(nano.FAMILIES)
    again = list(itertools.islice(nano.training_documents(3), 50))
    assert documents[:50] == again


@pytest.mark.parametrize("split", ["test", "hard"])
def test_word_problem_arithmetic_holds(split: str) -> None:
    for example in nano.generate("gsm_nano", split, 0, 100):
        worked, _, final = example.answer.rpartition("\n#### ")
        value = None
        for left, sign, right, claimed in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", worked):
            assert value is None or int(left) == value
            numbers = int(left), int(right)
            value = {"+": sum(numbers), "-": numbers[0] - numbers[1], "*": numbers[0] * numbers[1]}[
                sign
            ]
            assert value == int(claimed)
        assert int(final) == value == example.meta["value"]


@pytest.mark.parametrize("split", ["test", "hard"])
def test_function_outputs_are_what_the_function_returns(split: str) -> None:
    for example in nano.generate("crux_nano", split, 0, 100):
        source, _, call = example.prompt.rpartition("assert ")
        argument = ast.literal_eval(call.removeprefix("f(").removesuffix(") == "))
        assert ast.literal_eval(example.answer) == crux.run(source, argument)


@pytest.mark.parametrize("task", ruler.TASKS)
@pytest.mark.parametrize("tokens", [64, 96, 128])
def test_retrieval_fills_its_context(task: str, tokens: int) -> None:
    loaded = tokenizer.load()
    for example in nano.generate("ruler_nano", "test", 0, 25, task=task, tokens=tokens):
        length = len(loaded.encode(example.text)) + 1  # <s> is in, </s> is not
        assert tokens - 5 <= length <= tokens


def _statements(prompt: str) -> dict[str, str]:
    return dict(re.findall(r" (\w+) (\w+);", prompt))


@pytest.mark.parametrize("split", ["test", "hard"])
def test_retrieval_answers_follow_from_the_context(split: str) -> None:
    for task in ("single", "multikey", "vt"):
        for example in nano.generate("ruler_nano", split, 0, 40, task=task, tokens=128):
            pairs = _statements(example.prompt)
            at = example.prompt.rpartition(" ask ")[2]
            way = []
            while at in pairs:
                at = pairs[at]
                way.append(at)
            assert example.answer == "".join(f" {word}" for word in way)
            assert len(way) == 1 if task != "vt" else len(way) >= 2
    for example in nano.generate("ruler_nano", split, 0, 40, task="cwe", tokens=128):
        words = example.prompt.removeprefix("Count:").removesuffix(" ask most").split()
        counts = sorted((words.count(w) for w in set(words)), reverse=True)
        assert words.count(example.answer.strip()) == counts[0]
        assert counts[0] - counts[1] >= (1 if split == "hard" else 3)


def test_code_turns_are_true_and_follow_the_prompt() -> None:
    stream = mixture.training_documents(0, crux_turns=3)
    found = [e for e in itertools.islice(stream, 300) if e.meta.get("turns") and "source" in e.meta]
    assert found
    for example in found:
        for call, answer in example.meta["turns"]:
            argument = ast.literal_eval(call.removeprefix("assert f(").removesuffix(") == "))
            assert ast.literal_eval(answer) == crux.run(example.meta["source"], argument)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown nano family 'gsm'"):
        nano.generate("gsm", "test", 0, 1)
    with pytest.raises(ValueError, match="unknown split"):
        nano.generate("gsm_nano", "dev", 0, 1)
    with pytest.raises(ValueError, match="unknown ruler_nano task"):
        nano.generate("ruler_nano", "test", 0, 1, task="needle")
    with pytest.raises(ValueError, match="takes no options"):
        nano.generate("gsm_nano", "test", 0, 1, tokens=64)


def test_tokenizer_specials_digits_and_round_trip() -> None:
    loaded = tokenizer.load()
    assert len(loaded) == 512
    assert loaded.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.padding_side == "left"
    assert loaded.encode("12")[0] == 1 and len(loaded.encode("12")) == 3
    assert not [t for t in loaded.get_vocab() if sum(c.isdigit() for c in t) > 1]
    for text in (
        "Tom has 12 hats.\n#### 8",
        "déjà vu – 你好 🙂",
        "def f(xs):\n\treturn xs  [0] \n",
    ):
        assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text


def test_every_shared_word_is_one_token() -> None:
    loaded = tokenizer.load()
    for word in (*NOUNS, *ADJECTIVES, *NAMES):
        assert len(loaded.encode(f" {word}", add_special_tokens=False)) == 1, word


def test_no_token_crosses_from_prompt_to_answer() -> None:
    loaded = tokenizer.load()
    for family in nano.FAMILIES:
        for example in nano.generate(family, "hard", 0, 50):
            apart = loaded.encode(example.prompt) + loaded.encode(
                example.answer, add_special_tokens=False
            )
            assert loaded.encode(example.text) == apart


def _first_rows(seed: int, count: int) -> list[tuple[Any, Any]]:
    stream = mixture.rows(mixture.training_documents(seed), tokenizer.load())
    return list(itertools.islice(stream, count))


def test_rows_hold_whole_documents_and_weights() -> None:
    rows = _first_rows(0, 50)
    assert sum((ids != 0).mean() for ids, _ in rows) / 50 > 0.9
    for ids, weights in rows:
        assert ids.shape == weights.shape == (128,)
        filled = int((ids != 0).sum())
        assert ids[0] == 1 and ids[filled - 1] == 2
        assert not weights[filled:].any() and not weights[ids == 1].any()
        assert (weights[ids == 2] == 1.0).all()
    assert (rows[7][0] == _first_rows(0, 8)[7][0]).all()


def test_every_question_of_a_retrieval_document_is_an_answer() -> None:
    loaded = tokenizer.load()
    example = Example("ruler_nano", "Look: fox red; hen tan; ask fox", " red",
                      {"turns": [[" ask hen", " tan"]]})  # fmt: skip
    ids, weights = mixture.encode(example, loaded)
    given = [loaded.decode([i]) for i, w in zip(ids, weights, strict=True) if w == 1.0]
    assert given == [" red", "</s>", " tan", "</s>"]

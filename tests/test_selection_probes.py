"""Retrieval probes: their text, their scores, and bases that do not fit them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import selection_models as models
import torch
from retrieval_fixture import build, context_of, nano

from rad.placement import Budget
from rad.selection import SelectionError, calibration_rows, select
from rad.selection.probe_fit import tune_pairs
from rad.selection.probes import Probe, ProbeTooLong


def test_margin_and_correctness_of_one_and_two_tokens() -> None:
    tokens = torch.tensor([[5, 1, 0, 0], [5, 6, 2, 3]])
    probe = Probe(
        tokens,
        rows=torch.tensor([0, 1]),
        positions=torch.tensor([[1, -1], [2, 3]]),
        rivals=torch.tensor([[[2, 3], [-1, -1]], [[1, -1], [0, -1]]]),
    )
    p = torch.full((2, 2, 8), 0.01)
    p[0, 0, [1, 2, 3]] = torch.tensor([0.5, 0.3, 0.1])
    p[1, 0, [2, 1]] = torch.tensor([0.6, 0.2])
    p[1, 1, [3, 0, 7]] = torch.tensor([0.4, 0.1, 0.45])
    margins, correct = probe.score(p.log())
    # Two tokens: a rival that differs in the first loses to both, one in the second to that one.
    expected = min(math.log(0.6 * 0.4 / 0.2), math.log(0.4 / 0.1))
    assert margins.tolist() == pytest.approx([math.log(0.5 / 0.3), expected])
    assert correct.tolist() == [True, False], "token 7 is likelier than the answer's second"


def test_dictionary_probe_has_the_papers_format() -> None:
    from rad.data.nano import tokenizer

    loaded = tokenizer.load()
    context = nano(probe="dictionary", pairs=5, samples=4)
    probe = build(context)
    for row in range(4):
        ids = probe.tokens[row]
        text = loaded.decode(ids[ids != 0].tolist(), skip_special_tokens=True)
        head, *pairs, question = text.split("\n")
        assert head == "Memorize the following dictionary:" and len(pairs) == 5
        stated = dict(pair.split(":") for pair in pairs)
        assert len(stated) == len(set(stated.values())) == 5
        key, value = question.removeprefix("The value of the key '").split("' is ")
        assert stated[key] == value
        where = probe.positions[row]
        answer = loaded.decode(ids[where[where >= 0]].tolist())
        assert answer.strip() == value
        assert int((probe.rivals[row] >= 0).sum()) == 4
    again = build(context)
    assert torch.equal(probe.tokens, again.tokens) and torch.equal(probe.rivals, again.rivals)


def test_the_number_of_pairs_brings_the_base_off_the_ceiling() -> None:
    def accuracy(drop_from: int, limit: int = 1000) -> Any:
        def of(pairs: int) -> float:
            if pairs > limit:
                raise ProbeTooLong(f"{pairs} pairs are too long")
            return 1.0 if pairs < drop_from else max(0.0, 0.9 - 0.1 * (pairs - drop_from))

        return of

    assert tune_pairs(accuracy(16))[0] == 16
    pairs, tried = tune_pairs(accuracy(20))
    assert 20 <= pairs <= 23 and tried[16] == 1 and tried[32] == 0
    assert tune_pairs(accuracy(50, limit=40))[0] in (4, 8, 16, 32), "all that fit are too easy"
    assert tune_pairs(lambda pairs: 0.0)[0] == 2, "too hard with few: the fewest"
    with pytest.raises(ProbeTooLong, match="4 pairs"):
        tune_pairs(accuracy(20, limit=3))


def test_probes_that_do_not_fit_the_base_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"with 2 pairs .* is right in .*, chance is 0.5"):
        select(nano(probe="dictionary"))
    with pytest.raises(ProbeTooLong, match="the base has 128 positions: lower tokens"):
        build(context_of(models.random_llama(), Budget(heads=1), tokens=200))
    with pytest.raises(ProbeTooLong, match=r"lower pairs \(now 100\)"):
        build(nano(probe="dictionary", pairs=100))
    with pytest.raises(SelectionError, match="tokenizer is not the base's"):
        other = {"probe": "nano", "tokens": 64, "tokenizer": nano().tokenizer}
        build(context_of(models.random_llama(), Budget(heads=1), **other))
    warned = select(context_of(models.random_llama(), Budget(heads=1)))
    assert "chance is" in warned.provenance["probe"]["warnings"][0]


def test_a_base_without_the_words_is_refused() -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "Memorize": 1, "the": 2}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    chosen = {"probe": "dictionary", "pairs": 3}
    with pytest.raises(SelectionError, match="has no tokens for 'Memorize the following"):
        build(context_of(models.random_llama(), Budget(heads=1), tokenizer=tokenizer, **chosen))
    with pytest.raises(SelectionError, match="needs the base's tokenizer"):
        build(context_of(models.random_llama(), Budget(heads=1), tokenizer=None, **chosen))


def test_nano_probe_asks_training_prompts_only() -> None:
    from rad.data.nano import split_of, tokenizer

    loaded = tokenizer.load()
    context = nano(tokens=64, samples=4)
    probe = build(context)
    for row, where, rivals in zip(probe.rows, probe.positions, probe.rivals, strict=True):
        ids = probe.tokens[row, : where[where >= 0].min()]
        prompt = loaded.decode(ids.tolist(), skip_special_tokens=True)
        assert split_of(prompt) == "train"
        answer = loaded.decode(probe.tokens[row, where[0]].tolist())
        wrong = [loaded.decode([token]) for token in rivals[0].tolist() if token >= 0]
        assert wrong and answer not in wrong
        assert all(f"{value};" in prompt for value in [answer, *wrong])


@pytest.mark.parametrize("kind", ["copy", "repeat"])
def test_repeating_probes_ask_what_was_seen(kind: str, tmp_path: Path) -> None:
    corpus = models.write_corpus(tmp_path, models.random_rows(5, 40))
    probe = build(context_of(models.random_llama(), Budget(heads=1), probe=kind, corpus=corpus))
    assert probe.tokens.shape == (4, 24)
    for row, (place,), rivals in zip(probe.rows, probe.positions, probe.rivals, strict=True):
        before = probe.tokens[row, :place].tolist()
        answer = int(probe.tokens[row, place])
        assert answer in before
        wrong = {token for token in rivals[0].tolist() if token >= 0}
        assert answer not in wrong and wrong <= set(before)


def test_calibration_rows_are_seeded_and_different(tmp_path: Path) -> None:
    rows = models.random_rows(20, 8)
    folder = models.write_corpus(tmp_path, rows)
    first = calibration_rows(folder, 6, seed=1)
    assert first.shape == (6, 8)
    assert (first == calibration_rows(folder, 6, seed=1)).all()
    assert (first != calibration_rows(folder, 6, seed=2)).any()
    every = {tuple(row) for row in rows.tolist()}
    chosen = {tuple(row) for row in first.tolist()}
    assert len(chosen) == 6 and chosen <= every

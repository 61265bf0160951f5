"""Generation that can be trusted: start tokens, lengths, padding, sampling, real text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_fixture import SAMPLED, TEXT, nano_tokenizer, request, small_hybrid, small_model
from models_fixture import MIXERS, tokens
from scipy.stats import chi2_contingency, chisquare
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

from rad.evaluation.bridge import HarnessModel, TruncationError
from rad.evaluation.decoding import Decoding
from rad.evaluation.sampling import SeededSampling, seed_of

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K-hf"
GSM8K = SHARED / "data" / "gsm8k" / "test.jsonl"
CRUX = SHARED / "data" / "cruxeval" / "cruxeval.jsonl"
GREEDY = {"until": [], "max_gen_toks": 12, "do_sample": False}
PROMPTS = [TEXT[start : start + length] for start in (0, 4, 9, 15) for length in (30, 3, 22, 11)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return nano_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


def asked(prompts: list[str], options: dict[str, Any], **fields: Any) -> list[Any]:
    return [request(text, options, doc_id=i, **fields) for i, text in enumerate(prompts)]


def said(model: Any, tokenizer: Any, size: int, requests: list[Any]) -> list[str]:
    return HarnessModel(model, tokenizer, size).generate_until(requests)


def test_long_prompts_meet_fewer_others(model: Any, tokenizer: Any) -> None:
    sizes: list[int] = []
    lm = HarnessModel(
        model, tokenizer, 4, None, lambda places, new: sizes.append(len(places)), batch_tokens=64
    )
    assert lm.generate_until(asked(PROMPTS, GREEDY)) == said(
        model, tokenizer, 16, asked(PROMPTS, GREEDY)
    )
    lengths = sorted((len(lm.tok_encode(text)) for text in PROMPTS), reverse=True)
    start = 0
    for size in sizes:
        assert size <= 4 and (size == 1 or size * (lengths[start] + 12) <= 64)
        start += size
    assert start == len(PROMPTS) and max(sizes) > min(sizes)
    sizes.clear()
    alone = HarnessModel(model, tokenizer, 4, None, lm._report, batch_tokens=1)
    alone.generate_until(asked(PROMPTS[:3], GREEDY))
    assert sizes == [1, 1, 1], "a prompt that is longer by itself is alone"


# --- tokens ---------------------------------------------------------------------------------


def test_the_start_token_is_decided_text_by_text(model: Any, tokenizer: Any) -> None:
    lm = HarnessModel(model, tokenizer, 4)
    start, plain = tokenizer.bos_token_id, tokenizer.encode("Ann has", add_special_tokens=False)
    assert tokenizer.encode("Ann has") == [start, *plain]
    assert lm.tok_encode("Ann has") == [start, *plain]
    assert lm.tok_encode("<s>Ann has") == [start, *plain]
    assert lm.tok_encode("<s><s>Ann has") == [start, start, *plain], "double on purpose"
    assert lm.tok_encode("Ann has", add_special_tokens=False) == plain


def test_texts_with_and_without_a_start_token_share_a_batch(model: Any, tokenizer: Any) -> None:
    prompts = ["Ann has", "<s>Ann has", "<s><s>Ann has", "Ann has 12 hats"]
    plain, marked, double, longer = said(model, tokenizer, 4, asked(prompts, GREEDY))
    assert plain == marked != double
    assert said(model, tokenizer, 4, asked(prompts[::-1], GREEDY)) == [longer, double, plain, plain]
    assert said(model, tokenizer, 1, asked(prompts, GREEDY)) == [plain, plain, double, longer]


def test_nothing_is_ever_cut(model: Any, tokenizer: Any) -> None:
    lm = HarnessModel(model, tokenizer, 2, max_length=20)
    length = len(lm.tok_encode(TEXT))
    few, many = request("Ann", GREEDY), request(TEXT, GREEDY, task="gsm", doc_id=7)
    said = rf"task gsm, document 7: a prompt of {length} .* needs {length + 12} .* limit is 20"
    with pytest.raises(TruncationError, match=said):
        lm.generate_until([few, many])
    assert not lm.answers, "refused before any work"
    short = HarnessModel(model, tokenizer, 2, max_length=length - 1)
    with pytest.raises(TruncationError, match="task gsm, document 7"):
        short.loglikelihood([request(TEXT, " hats", task="gsm", doc_id=7)])
    exact = HarnessModel(model, tokenizer, 2, max_length=length + 12)
    assert exact.generate_until([many])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": []}, "max_gen_toks is missing"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0"),
        ({"max_gen_toks": 4, "num_beams": 2}, "unknown 'num_beams'"),
        ({"max_gen_toks": 4, "temperature": 0.7}, "do_sample: true"),
        ({"max_gen_toks": 4, "do_sample": True}, "temperature above 0"),
        ({"max_gen_toks": 4, **SAMPLED, "top_p": 0}, "top_p lies in"),
        ({"max_gen_toks": 4, "until": [""]}, "empty text"),
    ],
)
def test_a_request_that_leaves_something_open_is_refused(
    model: Any, tokenizer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"task gsm: .*{message}"):
        said(model, tokenizer, 1, asked(["Ann"], options, task="gsm"))


def test_lengths_and_ends_are_known(model: Any, tokenizer: Any) -> None:
    lm = HarnessModel(model, tokenizer, 4)
    full = lm.generate_until(asked(PROMPTS, GREEDY))
    stop = full[0][2:4]
    other = HarnessModel(model, tokenizer, 4)
    cut = other.generate_until(asked(PROMPTS, {**GREEDY, "until": [stop]}))
    assert cut == [text.split(stop)[0] for text in full]
    ended = 0
    for index, (text, short) in enumerate(zip(full, cut, strict=True)):
        (first,), (second,) = lm.answers["t", index], other.answers["t", index]
        assert first.truncated and first.new_tokens == 12
        assert second.truncated == (stop not in text)
        if stop in text:
            ended += 1
            assert second.new_tokens <= first.new_tokens
            known = tokenizer.encode(short + stop, add_special_tokens=False)
            assert second.new_tokens <= max(len(known), 1) + 2
    assert 0 < ended < len(PROMPTS)


# --- padding --------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_left_padding_changes_no_logits(mixer: str) -> None:
    """Prefill, and one step from its cache, of rows of three lengths in one batch."""
    hybrid = small_hybrid(mixer)
    rows = [tokens(rows=1, length=length, seed=length) for length in (4, 13, 26)]
    batch = torch.cat([pad(row, (26 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([pad(torch.ones_like(row), (26 - row.shape[1], 0)) for row in rows])
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        together = hybrid(batch, attention_mask=mask, position_ids=positions, use_cache=True)
        after = hybrid(
            torch.full((3, 1), 9),
            attention_mask=pad(mask, (0, 1), value=1),
            position_ids=positions[:, -1:] + 1,
            past_key_values=together.past_key_values,
        ).logits
        for index, row in enumerate(rows):
            alone = hybrid(row, use_cache=True)
            step = hybrid(torch.full((1, 1), 9), past_key_values=alone.past_key_values).logits
            length = row.shape[1]
            found = together.logits[index, -length:]
            torch.testing.assert_close(found, alone.logits[0], atol=1e-4, rtol=0)
            torch.testing.assert_close(after[index], step[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mixer", list(MIXERS))
def test_a_batch_of_sixteen_says_what_one_says(mixer: str, tokenizer: Any) -> None:
    hybrid = small_hybrid(mixer)
    single = said(hybrid, tokenizer, 1, asked(PROMPTS, GREEDY))
    assert len(set(single)) > 8
    assert said(hybrid, tokenizer, 16, asked(PROMPTS, GREEDY)) == single
    sampled = {**GREEDY, **SAMPLED}
    alone = said(hybrid, tokenizer, 1, asked(PROMPTS, sampled))
    assert alone != single
    assert said(hybrid, tokenizer, 16, asked(PROMPTS, sampled)) == alone


# --- sampling -------------------------------------------------------------------------------

LOGITS = torch.tensor([1.2, 0.3, -0.5, 2.0, 0.0, -1.5, 1.1])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, LOGITS.softmax(-1)),
        ({"temperature": 0.5}, (LOGITS / 0.5).softmax(-1)),
        # 0.44, 0.20 and 0.18 are the nucleus of 0.8
        ({"top_p": 0.8}, torch.where(LOGITS > 1, LOGITS, -torch.inf).softmax(-1)),
        ({"top_k": 2}, torch.where(LOGITS > 1.15, LOGITS, -torch.inf).softmax(-1)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_samples_have_the_distribution_of_the_model(
    options: dict[str, Any], expected: torch.Tensor
) -> None:
    draws = 20_000
    sampling = SeededSampling([seed_of("row", row) for row in range(draws)], **options)
    scores = LOGITS.expand(draws, -1)
    first, second = (sampling(torch.zeros(draws, 1), scores).argmax(-1) for _ in range(2))
    possible = expected > 0
    for drawn in (first, second):
        counts = torch.bincount(drawn, minlength=len(LOGITS))
        assert counts[~possible].sum() == 0
        found, wanted = counts[possible].numpy(), (expected[possible].double() * draws).numpy()
        assert chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 0.01
    table = torch.zeros(len(LOGITS), len(LOGITS))
    table.index_put_((first, second), torch.ones(draws), accumulate=True)
    often = expected * draws > 300
    kept = table[often][:, often]
    assert chi2_contingency(kept.numpy()).pvalue > 0.01, "steps are independent"


def test_samples_belong_to_their_document(model: Any, tokenizer: Any) -> None:
    """Not to the batch, the order, or what else is asked."""
    options = {**GREEDY, **SAMPLED}
    requests = [
        request(text, options, doc_id=i, id=f"d{i}") for i, text in enumerate(PROMPTS) for _ in "x"
    ]
    whole = said(model, tokenizer, 16, requests)
    assert said(model, tokenizer, 3, requests) == whole
    assert said(model, tokenizer, 5, requests[::-1]) == whole[::-1]
    assert said(model, tokenizer, 2, requests[4:7]) == whole[4:7]
    moved = [request(text, options, doc_id=99, id=f"d{i}") for i, text in enumerate(PROMPTS)]
    assert said(model, tokenizer, 4, moved) == whole, "the document's id counts, not its place"
    torch.manual_seed(1)
    assert said(model, tokenizer, 16, requests) == whole


def test_samples_differ_by_document_task_seed_and_turn(model: Any, tokenizer: Any) -> None:
    options = {**GREEDY, **SAMPLED}
    same = request(TEXT, options)
    requests = [
        *[same] * 3,  # as lm-eval repeats a request
        request(TEXT, options, doc_id=1),
        request(TEXT, options, task="other"),
        request(TEXT, {**options, "seed": 1}),
    ]
    found = said(model, tokenizer, 4, requests)
    assert len(set(found)) == len(found)
    assert said(model, tokenizer, 4, [same]) == found[:1]
    greedy = [request(TEXT, GREEDY)] * 3
    assert len(set(said(model, tokenizer, 4, greedy))) == 1


def test_greedy_is_the_limit_of_sampling(model: Any, tokenizer: Any) -> None:
    cold = {**GREEDY, "do_sample": True, "temperature": 1e-4}
    greedy = said(model, tokenizer, 8, asked(PROMPTS, GREEDY))
    assert said(model, tokenizer, 8, asked(PROMPTS, cold)) == greedy
    one = {**GREEDY, **SAMPLED, "top_k": 1}
    assert said(model, tokenizer, 8, asked(PROMPTS, one)) == greedy


def test_decoding_is_read_as_tasks_write_it() -> None:
    stock = {"until": "\n", "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    assert Decoding.read("t", stock) == Decoding(9, ("\n",))
    assert Decoding.read("t", {**SAMPLED, "max_gen_toks": 9, "seed": 4}) == Decoding(
        9, (), True, 1.0, 0.95, 0, 4
    )


# --- real text ------------------------------------------------------------------------------


def real_requests() -> list[Any]:
    with open(GSM8K, encoding="utf-8") as lines:
        gsm = [json.loads(line)["question"] for line, _ in zip(lines, range(8), strict=False)]
    with open(CRUX, encoding="utf-8") as lines:
        crux = [json.loads(line) for line, _ in zip(lines, range(8), strict=False)]
    word = {"until": ["Question:", "</s>"], "max_gen_toks": 24, "do_sample": False}
    code = {"until": ["\n", "the"], "max_gen_toks": 16, "do_sample": False}
    requests = [
        request(f"Question: {question}\nAnswer:", word, task="gsm", doc_id=i)
        for i, question in enumerate(gsm)
    ]
    return requests + [
        request(f"{row['code']}\nassert f({row['input']}) ==", code, task="crux", doc_id=i)
        for i, row in enumerate(crux)
    ]


@pytest.mark.skipif(
    not all(path.exists() for path in (STORIES, GSM8K, CRUX)),
    reason=f"no model or data below {SHARED} (set RAD_SHARED)",
)
def test_a_trained_model_on_real_questions_says_the_same_in_every_batch_and_in_hflm() -> None:
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(str(STORIES))
    trained = AutoModelForCausalLM.from_pretrained(str(STORIES), dtype=torch.float32)
    single = said(trained, tokenizer, 1, real_requests())
    assert len(set(single)) > 4
    assert said(trained, tokenizer, 16, real_requests()) == single
    stock = HFLM(pretrained=trained, tokenizer=tokenizer, batch_size=1, max_length=2048)
    assert stock.generate_until(real_requests(), disable_tqdm=True) == single
    pairs = [request(item.args[0], " She was happy.") for item in real_requests()[:6]]
    # choices of one token share their prompt, and one pass of the model
    pairs += [request("They took off their", choice) for choice in ("a", "b", "c")]
    ours = HarnessModel(trained, tokenizer, 4).loglikelihood(pairs)
    for mine, theirs in zip(ours, stock.loglikelihood(pairs, disable_tqdm=True), strict=True):
        assert mine[0] == pytest.approx(theirs[0], abs=1e-3) and mine[1] == theirs[1]

"""Scoring a model: oracle answers, padding, determinism, the files written, and the probes."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_fixture import handmade_tasks, request
from test_evaluation_build import NANO, book
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from rad.evaluation import cost, probe
from rad.evaluation.bridge import HarnessModel, TruncationError, stop_ids
from rad.evaluation.build import build_tasks
from rad.evaluation.efficiency import cache_bytes, measure
from rad.evaluation.harness import evaluate
from rad.evaluation.loading import load_manifest, read_documents
from rad.evaluation.probe import ProbeItem, build_probe, probe_accuracy, probe_of, shares
from rad.files import write_json
from rad.settings import EvaluationSettings, Mamba2Settings

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models" / "stories260K-hf"
TEXT = "Ann has 12 hats. Ann gets 3. How many hats has Ann?\n"
PROMPTS = [TEXT[:cut] for cut in (52, 9, 30, 17, 44)]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(NANO))


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.4,  # spread logits: no near ties
    )
    return LlamaForCausalLM(config).eval()


def hybrid(model: LlamaForCausalLM, mixer: dict[str, Any]) -> Any:
    """A hybrid with a mixed layer and a layer without attention."""
    from rad.models.convert import convert
    from rad.placement import Placement

    placement = Placement(
        base="b", layers=2, heads=4, kv_heads=2, softmax=[(0, 1), (0, 2)], selector="x", schema=1
    )
    return convert(model, placement, mixer, "qkvo").eval()


MAMBA2: dict[str, Any] = Mamba2Settings(chunk=16).model_dump()


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder with every kind of task."""
    root = tmp_path_factory.mktemp("evaluation")
    book(root / "book.txt")
    rows = [{"question": f"What is {n} + 1?", "answer": f"So.\n#### {n + 1}"} for n in range(9)]
    (root / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = "def f(x):\n    return x"
    code = [{"code": source, "input": str(n), "output": str(n)} for n in range(9)]
    (root / "crux.jsonl").write_text("".join(json.dumps(row) + "\n" for row in code))
    settings = EvaluationSettings.model_validate(
        {
            "max_length": 640,
            "probe_samples": 6,
            "tasks": {
                "gsm_nano": {"kind": "gsm_nano", "samples": 5, "max_new_tokens": 6},
                "crux_nano": {"kind": "crux_nano", "samples": 5, "max_new_tokens": 6},
                "find": {
                    "kind": "ruler_nano",
                    "samples": 2,
                    "subtasks": ["single", "vt"],
                    "lengths": [64],
                    "max_new_tokens": 4,
                },
                "gsm8k": {
                    "kind": "gsm8k",
                    "samples": 3,
                    "files": ["gsm.jsonl"],
                    "shot_files": ["gsm.jsonl"],
                    "shots": 1,
                    "max_new_tokens": 5,
                },
                "crux": {
                    "kind": "crux",
                    "samples": 3,
                    "files": ["crux.jsonl"],
                    "max_new_tokens": 5,
                },
                "books": {
                    "kind": "ruler_text",
                    "samples": 2,
                    "files": ["book.txt"],
                    "subtasks": ["multikey"],
                    "lengths": [600],
                    "max_new_tokens": 5,
                },
                "text": {
                    "kind": "perplexity",
                    "samples": 3,
                    "files": ["book.txt"],
                    "lengths": [96],
                },
            },
        }
    )
    build_tasks(settings, str(NANO), root / "tasks", root)
    return root / "tasks"


def run(model: Any, tokenizer: Any, tasks: Path, output: Path, **options: Any) -> dict[str, Any]:
    values = {"run": "r", "batch_size": 4, "max_length": None, "progress": False, **options}
    return evaluate(model, tokenizer, tasks, output=output, **values)


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def generate(model: Any, tokenizer: Any, size: int, stops: tuple[str, ...] = ()) -> list[str]:
    options = {"until": list(stops), "max_gen_toks": 24, "do_sample": False}
    lm = HarnessModel(model, tokenizer, size)
    return lm.generate_until([request(prompt, options) for prompt in PROMPTS])


# --- lm-eval's results ----------------------------------------------------------------------


def test_gold_answers_score_one_and_wrong_ones_zero(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, say in ((1.0, lambda doc: doc["target"]), (0.0, lambda doc: " nothing")):
        monkeypatch.setattr(
            HarnessModel,
            "generate_until",
            lambda self, requests, say=say: [say(item.doc) for item in requests],
        )
        result = run(model, tokenizer, tasks, tmp_path)
        described = result["rad"]["tasks"]
        assert len(described) == 8
        for name, task in described.items():
            if task["family"] != "perplexity":
                assert result["results"][name][f"{task['metric']},none"] == value, name


def test_the_files_follow_the_contract(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path
) -> None:
    result = run(model, tokenizer, tasks, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert {"results", "configs", "versions", "n-samples", "higher_is_better"} <= set(result)
    about = result["rad"]
    assert about["run"] == "r" and about["batch_size"] == 4 and about["max_length"] == 640
    assert about["dtype"] == "float32" and about["seconds"] > 0
    assert about["tasks"]["find_vt_64"] == {
        "metric": "exact_match",
        "metrics": ["exact_match", "string_match"],
        "higher_is_better": True,
        "family": "ruler",
        "task": "find",
        "subtask": "vt",
        "length": 64,
        "n": 2,
        "truncation_rate": about["tasks"]["find_vt_64"]["truncation_rate"],
    }
    assert about["missing"] == {} and about["processes"] == 1
    assert str(tasks) not in json.dumps(result), "results name no folder of this machine"

    records = samples(tmp_path)
    keys = {"task", "family", "doc_id", "metric", "score", "prompt", "target", "response"}
    for record in records:
        assert keys | {"subtask", "length"} <= set(record)
    for name in about["tasks"]:
        mine = [record for record in records if record["task"] == name]
        assert [record["doc_id"] for record in mine] == list(range(len(mine)))
        documents = [json.loads(line) for line in (tasks / f"data/{name}.jsonl").open()]
        if about["tasks"][name]["family"] != "perplexity":  # what lm-eval asked is what was built
            assert [record["prompt"] for record in mine] == [doc["prompt"] for doc in documents]
        metric = f"{about['tasks'][name]['metric']},none"
        assert [record["id"] for record in mine] == [
            doc.get("id", str(index)) for index, doc in enumerate(documents)
        ]
        mean = sum(record["score"] for record in mine) / len(mine)
        assert result["results"][name][metric] == pytest.approx(mean)
        for other, value in mine[0]["metrics"].items():  # not the headline alone
            assert f"{other},none" in result["results"][name] and isinstance(value, float)
        if "truncation_rate" in about["tasks"][name]:
            rate = sum(record["truncated"] for record in mine) / len(mine)
            assert about["tasks"][name]["truncation_rate"] == rate
            most = result["configs"][name]["generation_kwargs"]["max_gen_toks"]
            assert all(0 < record["new_tokens"] <= most for record in mine)
        else:
            assert about["tasks"][name]["family"] == "perplexity"


def test_repeats_choices_and_missing_data(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = handmade_tasks(tmp_path / "tasks")
    result = run(model, tokenizer, folder, tmp_path / "a")
    again = run(model, tokenizer, folder, tmp_path / "b", batch_size=7)
    assert result["rad"]["missing"] == {"absent": "no file absent.jsonl"}
    assert result["rad"]["tasks"]["absent"]["n"] == 0 and "absent" not in result["results"]
    records = samples(tmp_path / "a")
    assert [record["task"] for record in records] == ["sampled"] * 5 + ["choice"] * 5
    for record in records[:5]:
        assert len(record["responses"]) == 3 and record["response"] == record["responses"][0]
        assert len(set(record["responses"])) > 1, "sampled anew each time"
        assert record["metrics"]["different"] > 1 / 3
        assert 3 <= record["new_tokens"] <= 36
    assert result["results"]["sampled"]["hit,all"] == pytest.approx(
        sum(record["score"] for record in records[:5]) / 5
    )
    lm = HarnessModel(model, tokenizer, 1)
    for record in records[5:]:
        assert set(record["metrics"]) == {"acc", "acc_norm"}
        choices = [" hats", " Ann has", " 3"]
        values = lm.loglikelihood([request(record["prompt"], choice) for choice in choices])
        assert record["loglikelihoods"] == pytest.approx([value for value, _ in values], abs=1e-4)
        assert record["response"] == choices[max(range(3), key=lambda i: values[i][0])]
        assert record["target"] == " Ann has"
        assert record["score"] == (record["response"] == record["target"])
    other = samples(tmp_path / "b")
    assert [record["responses"] for record in other[:5]] == [r["responses"] for r in records[:5]]
    assert again["results"]["choice"] == result["results"]["choice"]


def test_a_suite_without_any_data_says_so(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = handmade_tasks(tmp_path / "tasks")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tasks"] = manifest["tasks"][2:]
    write_json(folder / "manifest.json", manifest)
    result = run(model, tokenizer, folder, tmp_path / "a")
    assert result["results"] == {} and samples(tmp_path / "a") == []
    assert list(result["rad"]["missing"]) == ["absent"]
    write_json(folder / "manifest.json", {**manifest, "tasks": []})
    with pytest.raises(ValueError, match="no tasks"):
        run(model, tokenizer, folder, tmp_path / "a")


@pytest.mark.parametrize("content", ["{", '{"id": "c0"}\n{"id": "c', "[1]"])
def test_half_written_files_are_named(
    model: Any, tokenizer: Any, tmp_path: Path, content: str
) -> None:
    folder = handmade_tasks(tmp_path / "tasks")
    data = folder / "data" / "choice.jsonl"
    data.write_text(content)
    with pytest.raises(ValueError, match=r"choice\.jsonl, line \d: .*run `rad tasks` again"):
        run(model, tokenizer, folder, tmp_path)
    data.unlink()
    with pytest.raises(ValueError, match=r"choice\.jsonl: cannot read"):
        run(model, tokenizer, folder, tmp_path)
    (folder / "manifest.json").write_text('{"tasks": [')
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON"):
        run(model, tokenizer, folder, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()


def test_fields_may_differ_between_documents(tmp_path: Path) -> None:
    rows = [{"id": "a", "gold": 1}, {"id": "b", "gold": "x\u2028y", "more": [1, "2"]}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    found = read_documents({"test": str(path)})["test"]
    assert list(found) == rows and list(found.features) == ["id", "gold", "more"]


def test_the_cost_is_known_before_and_met(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(tasks)
    rows, total = cost.summary(manifest)
    result = run(model, tokenizer, tasks, tmp_path, progress=True)
    records = samples(tmp_path)
    assert total.documents == total.prompts == len(records)
    generated = [record for record in records if "new_tokens" in record]
    assert sum(record["new_tokens"] for record in generated) <= total.new_tokens
    assert result["rad"]["cost"] == {
        "documents": len(records),
        "prompts": len(records),
        "prompt_tokens": total.prompt_tokens,
        "new_tokens": total.new_tokens,
    }
    lm = HarnessModel(model, tokenizer, 1)
    for row in rows:
        mine = [record for record in records if record["task"] == row.task]
        if row.new_tokens:
            assert row.prompt_tokens == sum(len(lm.tok_encode(r["prompt"])) for r in mine)
    shown = capsys.readouterr().err
    assert shown.startswith(cost.text(manifest))
    assert f"{total.prompts}/{total.prompts}" in shown.splitlines()[-1]
    assert f"new tokens of at most {total.new_tokens:,}" in shown


def test_the_cost_of_repeats_and_choices(tmp_path: Path) -> None:
    manifest = load_manifest(handmade_tasks(tmp_path))
    rows, total = cost.summary(manifest)
    assert rows == [
        cost.Cost("sampled", 5, 15, 300, 15 * 12),
        cost.Cost("choice", 5, 15, 300, 0),
    ]
    assert total == cost.Cost("total", 10, 30, 600, 180)
    assert cost.text(manifest).splitlines()[-1].split() == ["total", "10", "30", "600", "180"]


def test_same_again_and_for_any_folder(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path
) -> None:
    import shutil

    moved = shutil.copytree(tasks, tmp_path / "moved")
    run(model, tokenizer, tasks, tmp_path / "a")
    run(model, tokenizer, moved, tmp_path / "b", batch_size=3)
    first, second = samples(tmp_path / "a"), samples(tmp_path / "b")
    for one, two in zip(first, second, strict=True):
        assert one["response"] == two["response"]
        assert one["score"] == pytest.approx(two["score"])


def test_perplexity_is_that_of_the_model(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path
) -> None:
    result = run(model, tokenizer, tasks, tmp_path)
    total = count = 0.0
    for record in (item for item in samples(tmp_path) if item["task"] == "text"):
        tokens = torch.tensor([tokenizer.encode(record["target"])])
        assert tokens[0, 0] == tokenizer.bos_token_id
        with torch.no_grad():
            loss = model(tokens, labels=tokens).loss.item()
        assert record["score"] == pytest.approx(loss, rel=1e-4)
        assert record["tokens"] == tokens.shape[1] - 1
        total += loss * record["tokens"]
        count += record["tokens"]
    found = result["results"]["text"]
    assert found["perplexity,none"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert found["byte_perplexity,none"] < found["perplexity,none"] < found["word_perplexity,none"]


def test_without_network_or_home(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the evaluation opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    run(model, tokenizer, tasks, tmp_path)


def test_a_prompt_that_does_not_fit_is_an_error(
    model: Any, tokenizer: Any, tasks: Path, tmp_path: Path
) -> None:
    for limit in (40, 6):  # at 6 an answer alone takes everything
        with pytest.raises(TruncationError, match=rf"needs \d+ tokens.*limit is {limit}:.*max_l"):
            run(model, tokenizer, tasks, tmp_path, max_length=limit)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"no model at {STORIES} (set RAD_SHARED)")
def test_a_trained_model_knows_its_own_stories(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(STORIES))
    trained = LlamaForCausalLM.from_pretrained(str(STORIES))
    (tmp_path / "story.txt").write_text(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )
    task = {"kind": "perplexity", "files": ["story.txt"]}
    settings = EvaluationSettings.model_validate({"tasks": {"story": task}})
    build_tasks(settings, str(STORIES), tmp_path / "tasks", tmp_path)
    found = run(trained, tokenizer, tmp_path / "tasks", tmp_path / "out")["results"]["story"]
    assert 1 < found["perplexity,none"] < 4


# --- generation -----------------------------------------------------------------------------


def test_padding_changes_nothing(model: Any, tokenizer: Any) -> None:
    single = generate(model, tokenizer, 1)
    assert len(set(single)) > 1 and all(single)
    assert generate(model, tokenizer, 5) == single
    assert generate(model, tokenizer, 3) == single


def test_answers_end_before_stop_strings(model: Any, tokenizer: Any) -> None:
    full = generate(model, tokenizer, 5)
    stop = full[0][4:7]
    assert stop
    expected = [text.split(stop)[0] for text in full]
    assert generate(model, tokenizer, 5, (stop,)) == expected
    assert generate(model, tokenizer, 1, (stop,)) == expected


def test_answers_end_at_end_of_text(model: Any, tokenizer: Any) -> None:
    full = generate(model, tokenizer, 5)
    prompt = torch.tensor([tokenizer.encode(PROMPTS[0])])
    output = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    end = output[0, prompt.shape[1] + 5].item()
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    assert other.eos_token_id == end and other.encode(TEXT) == tokenizer.encode(TEXT)
    # the checkpoint names another token; both end an answer
    assert stop_ids(model, other) == sorted({tokenizer.eos_token_id, end})
    expected = [text.split(tokenizer.decode(end))[0] for text in full]
    assert expected[0] and expected != full
    assert generate(model, other, 5) == expected
    assert generate(model, other, 1) == expected


def test_settings_of_the_checkpoint_change_nothing(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = generate(model, tokenizer, 5)
    shipped = GenerationConfig(
        do_sample=True,
        temperature=3.0,
        top_p=0.9,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        max_new_tokens=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    monkeypatch.setattr(model, "generation_config", shipped)
    assert generate(model, tokenizer, 5) == plain
    assert model.generation_config is shipped


def test_the_tokenizer_is_left_alone(model: Any, tokenizer: Any) -> None:
    mine = copy.deepcopy(tokenizer)
    mine.padding_side, mine.pad_token = "right", None
    expected = generate(model, tokenizer, 5)
    assert generate(model, mine, 5) == expected
    assert mine.padding_side == "right" and mine.pad_token is None


def test_exactly_one_start_of_text(model: Any, tokenizer: Any) -> None:
    start = tokenizer.bos_token_id
    lm = HarnessModel(model, tokenizer, 2)
    for text in ("Ann has", "<s>Ann has"):
        for tokens in (probe.encode(tokenizer, text), lm.tok_encode(text)):
            assert tokens[0] == start and tokens.count(start) == 1
    before, after = probe.encode_pair(tokenizer, "assert f(1) == ", "[1, 2]")
    assert before.count(start) == 1 and start not in after
    assert tokenizer.decode(before[1:] + after) == "assert f(1) == [1, 2]"


def test_loglikelihood_knows_the_greedy_answer(model: Any, tokenizer: Any) -> None:
    lm = HarnessModel(model, tokenizer, 3)
    text = TEXT.rstrip()
    before = tokenizer.encode(text)
    after = tokenizer.encode(" hats", add_special_tokens=False)
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    want = sum(float(logits[len(before) - 1 + i, token]) for i, token in enumerate(after))
    value, greedy = lm.loglikelihood([request(text, " hats"), request("Ann", " has")])[0]
    assert value == pytest.approx(want, rel=1e-4) and not greedy


# --- probes ---------------------------------------------------------------------------------


def test_the_probe_is_greedy_exact_match(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # targets are token numbers, because a random model's tokens are not text
    monkeypatch.setattr(
        probe, "encode_pair", lambda tokenizer, p, t: (probe.encode(tokenizer, p), json.loads(t))
    )
    items = []
    for prompt in PROMPTS:
        tokens = torch.tensor([probe.encode(tokenizer, prompt)])
        output = model.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=None)
        answer = output[0, tokens.shape[1] :].tolist()
        items.append(ProbeItem("right", prompt, json.dumps(answer), False))
        answer[-1] = (answer[-1] + 1) % 512
        items.append(ProbeItem("wrong", prompt, json.dumps(answer), False))
    found = probe_accuracy(model, tokenizer, items, batch_size=3)
    assert found == {"right": 1.0, "wrong": 0.0}


def test_probe_of_built_tasks(model: Any, tokenizer: Any, tasks: Path) -> None:
    items = build_probe(tasks, 4)
    counts = {task: sum(item.task == task for item in items) for task in {i.task for i in items}}
    assert counts == {"gsm_nano": 4, "crux_nano": 4, "find": 4, "gsm8k": 4, "crux": 4, "books": 4}
    model.train()
    found = shares(probe_of(tasks, 4)(tokenizer)(model))
    assert model.training
    model.eval()
    assert found == probe_accuracy(model, tokenizer, items)
    assert set(found) == set(counts) and all(0 <= value <= 1 for value in found.values())
    assert build_probe(tasks, 0) == []
    with pytest.raises(ValueError, match=r"probe\.jsonl"):
        build_probe(tasks / "nowhere", 4)


def test_efficiency_measures_the_cache(model: Any) -> None:
    found = measure(model, run="r", contexts=[32, 16], decode_tokens=2, batch_size=2)
    # layers x (keys and values) x kv heads x head dim x float32
    per_token = 2 * 2 * 2 * 8 * 4
    assert found["kv_bytes_per_token"] == per_token and found["state_bytes"] == 0
    assert [point["context"] for point in found["points"]] == [16, 32]
    assert [point["cache_bytes"] for point in found["points"]] == [16 * per_token, 32 * per_token]
    assert all(point["decode_tokens_per_second"] > 0 for point in found["points"])
    weights = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    assert found["parameters"] == weights
    # 2 per weight, and 4 x heads x head dim x context in both layers
    assert found["flops_per_token"] == 2 * (weights - embedding) + 2 * 4 * 4 * 8 * 32
    single = measure(model, run="r", contexts=[32], decode_tokens=1, batch_size=1)
    assert single["kv_bytes_per_token"] == per_token


def test_efficiency_of_a_hybrid_has_a_state(model: Any) -> None:
    student = hybrid(model, MAMBA2)
    found = measure(student, run="r", contexts=[16, 32], decode_tokens=2, batch_size=1)
    # two kept heads with keys and values of their own in one layer
    assert found["kv_bytes_per_token"] == 2 * 2 * 8 * 4
    assert found["state_bytes"] > 0
    with torch.no_grad():
        cache = student(torch.ones(1, 16, dtype=torch.long), use_cache=True).past_key_values
    assert cache_bytes(cache) == found["points"][0]["cache_bytes"]

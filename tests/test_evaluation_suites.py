"""Recall, multiple choice and the forms of GSM8K: prompts equal to lm-eval's, gold scores one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rad.evaluation.build import build_tasks
from rad.evaluation.data import DATASETS, MissingData, Place, read_dataset
from rad.evaluation.kinds import KINDS
from rad.settings import EvaluationSettings

NANO = Path(__file__).parents[1] / "rad" / "assets" / "nano" / "base"
DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data on this machine")

_ARC = {
    "id": "Mercury_1",
    "question": "Which of these is a metal?",
    "choices": {"text": ["iron", "wood", "wool", "clay"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
_TRUTHFUL = {
    "question": "Is the moon made of cheese?",
    "mc1_targets": {"choices": ["No, of rock.", "Yes, of cheese."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["No, of rock.", "No.", "Yes."], "labels": [1, 1, 0]},
}
_RACE = {
    "article": "Ann has a cat.",
    "problems": str(
        [
            {"question": "Who has a cat?", "answer": "B", "options": ["Bo", "Ann", "Cy", "Di"]},
            {"question": "The cat  _  .", "answer": "C", "options": ["a", "b", "sleeps", "d"]},
            {"question": "What has Ann?", "answer": "A", "options": ["a cat", "x", "y", "z"]},
        ]
    ),
}
# kind -> (a row as the hub has it, lm-eval's own task file)
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "arc_easy": (_ARC, "arc/arc_easy.yaml"),
    "arc_challenge": (_ARC, "arc/arc_easy.yaml"),
    "hellaswag": (
        {
            "ind": 4,
            "activity_label": "Making tea",
            "ctx_a": "A man boils water. [header] The tea",
            "ctx_b": "he",
            "endings": ["drinks it. [title] Then rests", "flies", "sings", "runs"],
            "label": "0",
        },
        "hellaswag/hellaswag.yaml",
    ),
    "piqa": (
        {"goal": "Cut bread", "sol1": "with a knife", "sol2": "with a cup", "label": 0},
        "piqa/piqa.yaml",
    ),
    "winogrande": (
        {
            "sentence": "The cup fell off the table because _ was unstable.",
            "option1": "the cup",
            "option2": "the table",
            "answer": "2",
        },
        "winogrande/default.yaml",
    ),
    "openbookqa": (
        {
            "id": "7-1",
            "question_stem": "The sun is a",
            "choices": {"text": ["star", "rock"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "openbookqa/openbookqa.yaml",
    ),
    "mmlu": (
        {
            "question": " What is 2+2? ",
            "subject": "anatomy",
            "choices": ["4", "5", "6", "7"],
            "answer": 0,
        },
        "mmlu/default/mmlu_anatomy.yaml",
    ),
    "pubmedqa": (
        {
            "QUESTION": "Does it work?",
            "CONTEXTS": ["We tried.", "It did."],
            "final_decision": "yes",
        },
        "pubmedqa/pubmedqa.yaml",
    ),
    "race": (_RACE, "race/race.yaml"),
    "truthfulqa_mc1": (_TRUTHFUL, "truthfulqa/truthfulqa_mc1.yaml"),
    "truthfulqa_mc2": (_TRUTHFUL, "truthfulqa/truthfulqa_mc2.yaml"),
    "lambada": ({"text": "he opened the old door"}, "lambada/lambada_openai.yaml"),
}


def requests(task: Any) -> list[tuple[str, ...]]:
    """(context, continuation) of every request of an lm-eval task."""
    task.build_all_requests(rank=0, world_size=1)
    return [instance.args for instance in task.instances]


def theirs(file: str, row: dict[str, Any], split: str) -> Any:
    """lm-eval's own task over one row."""
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    content = load_yaml(Path(lm_eval.tasks.__file__).parent / file, resolve_func=True)
    for key in ("dataset_path", "dataset_name", "training_split", "fewshot_split", "tag"):
        content.pop(key, None)
    if content.get("test_split"):
        content.pop("validation_split", None)
    content["custom_dataset"] = lambda **unused: {split: Dataset.from_list([row])}
    return ConfigurableTask(config=content)


def ours(folder: Path, name: str) -> Any:
    from lm_eval.tasks import TaskManager

    from rad.evaluation.loading import task_configuration

    loaded = TaskManager(include_defaults=False).load([task_configuration(folder, name)])
    return next(iter(loaded["tasks"].values()))


def build(kind: str, tmp_path: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = {"kind": kind, "files": [str(file)], **options}
    settings = EvaluationSettings.model_validate({"tasks": {"it": task}, "max_length": 8192})
    (entry,) = build_tasks(settings, str(NANO), tmp_path / "out")["tasks"]
    return dict(entry)


@pytest.mark.parametrize("kind", ROWS)
def test_requests_equal_lm_evals_own(kind: str, tmp_path: Path) -> None:
    row, file = ROWS[kind]
    entry = build(kind, tmp_path, [row])
    task = ours(tmp_path / "out", "it")
    reference = theirs(file, row, DATASETS[kind.partition("_mc")[0]].split)
    assert requests(task) == requests(reference)
    document = task.test_docs()[0]
    # the right choice most likely, then the second one
    for winner in (0, 1):
        count = entry["prompts"]
        values = [(-1.0 if index == winner else -9.0, index == winner) for index in range(count)]
        mine = task.process_results(document, values)
        if reference.config.test_split:
            their_document = reference.test_docs()[0]
        else:
            their_document = reference.validation_docs()[0]
        other = reference.process_results(their_document, values)
        for metric in KINDS[kind].metrics:
            if metric in other and metric != "perplexity":
                assert mine[metric] == pytest.approx(other[metric])


def test_acc_norm_counts_characters_as_lm_eval_does(tmp_path: Path) -> None:
    row = {"goal": "Say:", "sol1": "éé", "sol2": "abc", "label": 0}
    build("piqa", tmp_path, [row])
    task = ours(tmp_path / "out", "it")
    reference = theirs("piqa/piqa.yaml", row, DATASETS["piqa"].split)
    # per character the second is likelier, per byte the first
    values = [(-2.4, False), (-3.3, False)]
    other = reference.process_results(reference.validation_docs()[0], values)
    mine = task.process_results(task.test_docs()[0], values)
    assert mine["acc_norm"] == other["acc_norm"] == 0.0 and mine["acc"] == other["acc"] == 1.0


@pytest.mark.parametrize("kind", ["arc_easy", "hellaswag", "mmlu", "race", "winogrande"])
def test_a_row_of_another_layout_is_named(kind: str, tmp_path: Path) -> None:
    row = {field: "x" for field in DATASETS[kind].fields} | {"id": "odd-7"}
    with pytest.raises(ValueError, match=r"row odd-7 of .* is not as lm-eval's"):
        build(kind, tmp_path, [row])


@pytest.mark.parametrize("kind", ["swde", "fda"])
def test_extraction_sets_end_before_the_value(kind: str, tmp_path: Path) -> None:
    row = {"text": " Name: Ada\nBorn: ", "key": "Born", "value": " 1815 ", "doc_id": "d"}
    build(kind, tmp_path, [row])
    document = json.loads((tmp_path / "out" / "data" / "it.jsonl").read_text("utf-8"))
    assert document["prompt"] == "Name: Ada\nBorn:" and document["target"] == "1815"
    score = KINDS[kind].score
    assert score(document, [" In 1815, they say"]) == {"contains": 1.0, "exact_match": 0.0}
    assert score(document, [" 1815."]) == {"contains": 1.0, "exact_match": 1.0}
    assert score(document, [""]) == {"contains": 0.0, "exact_match": 0.0}


@pytest.mark.parametrize("kind", ["kv_retrieval", "record_recall"])
def test_made_recall_tasks_have_one_answer(kind: str, tmp_path: Path) -> None:
    built = {}
    for name, options in {
        "first": {"samples": 6},
        "more": {"samples": 9},
        "other": {"samples": 6, "seed": 5},
    }.items():
        folder = tmp_path / name
        task = {"kind": kind, "pairs": 20, **options}
        settings = EvaluationSettings.model_validate({"tasks": {"it": task}, "max_length": 8192})
        (entry,) = build_tasks(settings, str(NANO), folder)["tasks"]
        assert entry["facts"]["synthetic"] is True
        built[name] = (folder / "data" / "it.jsonl").read_text("utf-8").splitlines()
    assert built["more"][:6] == built["first"] and not set(built["other"]) & set(built["first"])
    for line in built["first"]:
        document = json.loads(line)
        pairs = [row for row in document["prompt"].splitlines() if ":" in row]
        values = [row.partition(":")[2].strip() for row in pairs if row.partition(":")[2].strip()]
        assert len(values) == len(set(values)) == 20
        assert values.count(document["target"]) == 1
        assert KINDS[kind].score(document, [f" {document['target']}\n"])["exact_match"] == 1
    if kind == "kv_retrieval":
        # 7 is within 17, but is another value
        assert KINDS[kind].score({"references": ["7"]}, [" 17"])["exact_match"] == 0


@needs_data
def test_questions_on_paragraphs_stand_in(tmp_path: Path) -> None:
    task = {"kind": "qa_recall", "samples": 40}
    settings = EvaluationSettings.model_validate(
        {"data": str(DATA), "tasks": {"it": task}, "max_length": 8192}
    )
    (entry,) = build_tasks(settings, str(NANO), tmp_path)["tasks"]
    assert entry["facts"]["stand_in"] == "SQuAD completion" and entry["samples"] == 40
    for line in (tmp_path / "data" / "it.jsonl").read_text("utf-8").splitlines():
        document = json.loads(line)
        assert document["target"] in document["prompt"]
        assert KINDS["qa_recall"].score(document, [document["target"]])["contains"] == 1


def test_a_published_set_that_is_missing_is_a_row(tmp_path: Path) -> None:
    settings = EvaluationSettings.model_validate(
        {"suites": ["retrieval"], "offline": True, "data": "nowhere", "max_length": 8192}
    )
    entries = {
        entry["name"]: entry for entry in build_tasks(settings, str(NANO), tmp_path)["tasks"]
    }
    for name in ("swde", "fda", "squad_completion", "qa_recall"):
        assert entries[name]["status"] == "missing" and "nowhere/" in entries[name]["reason"]
    for name in ("kv_retrieval", "record_recall"):
        assert entries[name]["status"] == "ready"


# --- GSM8K ----------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("kind", ["gsm8k", "gsm8k_cot"])
def test_prompts_of_gsm8k_equal_lm_evals(kind: str, tmp_path: Path) -> None:
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    settings = EvaluationSettings.model_validate(
        {"data": str(DATA), "tasks": {"it": {"kind": kind, "samples": 3}}, "max_length": 8192}
    )
    build_tasks(settings, str(NANO), tmp_path)
    task = ours(tmp_path, "it")
    file = f"gsm8k/{kind.replace('_', '-')}.yaml"
    content = load_yaml(Path(lm_eval.tasks.__file__).parent / file, resolve_func=True)
    for key in ("dataset_path", "dataset_name", "tag"):
        content.pop(key, None)

    def rows(part: str, count: int) -> Dataset:
        lines = (DATA / "gsm8k" / f"{part}.jsonl").read_text("utf-8").splitlines()[:count]
        return Dataset.from_list([json.loads(line) for line in lines])

    content["custom_dataset"] = lambda **unused: {
        "test": rows("test", 3),
        "train": rows("train", 5),
    }
    # the first rows of the training file in their order, where lm-eval draws at random
    content["fewshot_config"] = {**content.get("fewshot_config", {}), "sampler": "first_n"}
    reference = ConfigurableTask(config=content)
    mine, other = requests(task), requests(reference)
    assert [args[0] for args in mine] == [args[0] for args in other]
    assert mine[0][1]["until"] == other[0][1]["until"]
    assert mine[0][1]["max_gen_toks"] == 512


@needs_data
def test_gold_answers_of_the_reasoning_forms_score_one(tmp_path: Path) -> None:
    endings = {"gsm8k_cot": "The answer is {}.", "gsm8k_cot_llama": "The final answer is {}"}
    lines = (DATA / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    for line in lines:
        answer = json.loads(line)["answer"]
        steps, _, number = answer.rpartition("#### ")
        for kind, ending in endings.items():
            scores = KINDS[kind].score({"target": answer}, [steps + ending.format(number)])
            assert scores["exact_match"] == scores["flexible_match"] == 1
            assert scores["semantic_match"] == 1 and scores["no_answer"] == 0


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}]
    for kind in ("gsm8k_cot_llama", "gsm_zeroeval"):
        with pytest.raises(
            ValueError, match=r"tasks\.it\.chat: .*chat_template or set chat: false"
        ):
            build(kind, tmp_path, rows)


def test_a_chat_template_wraps_every_turn(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"
    )
    tasks = {
        "chat": {"kind": "gsm8k_cot_llama", "files": [str(tmp_path / "rows.jsonl")]},
        "json": {"kind": "gsm_zeroeval", "files": [str(tmp_path / "rows.jsonl")]},
        "twice": {
            "kind": "gsm_zeroeval",
            "files": [str(tmp_path / "rows.jsonl")],
            "double_bos": True,
        },
    }
    settings = EvaluationSettings.model_validate(
        {"tasks": tasks, "max_length": 20000, "chat_template": str(template)}
    )
    manifest = build_tasks(settings, str(NANO), tmp_path / "out")
    prompts = {
        name: json.loads((tmp_path / "out" / "data" / f"{name}.jsonl").read_text("utf-8"))["prompt"]
        for name in tasks
    }
    assert prompts["chat"].count("<user>") == 9 and prompts["chat"].count("</assistant>") == 8
    assert prompts["chat"].endswith("</user><assistant>")
    assert prompts["json"].startswith("<s><user>\n## Question: \n")
    assert prompts["twice"] == "<s>" + prompts["json"]
    one, two = (next(e for e in manifest["tasks"] if e["name"] == n) for n in ("json", "twice"))
    assert two["prompt_tokens"] == one["prompt_tokens"] + 1, "one <s>, and two"


def test_the_shipped_examples_are_eight() -> None:
    from rad.evaluation.documents.gsm8k import cot_shots

    assert len(cot_shots()) == 8 and all(row["answer"] in row["steps"] for row in cot_shots())


def test_every_suite_file_says_what_it_is() -> None:
    import rad.evaluation

    for path in (Path(rad.evaluation.__file__).parent / "suites").glob("*.yaml"):
        text = path.read_text("utf-8")
        assert text.startswith("# ") and list(yaml.safe_load(text)) == ["tasks"]


# --- the hub --------------------------------------------------------------------------------


def from_hub(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `read_dataset` gives for GSM8K when no file is there and the hub has `place`."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(DATASETS, "gsm8k", place)
    return read_dataset("it", "gsm8k", [], tmp_path, Path("nowhere"), False, None)


def test_the_hub_gives_the_rows_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    repository = tmp_path / "repository"
    repository.mkdir()
    file = repository / "test.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    place = Place("gsm8k/test.jsonl", ("question", "answer"), str(repository))
    found = from_hub(place, tmp_path, monkeypatch)
    direct = read_dataset("it", "gsm8k", [str(file)], tmp_path, Path("nowhere"), True, None)
    assert found.rows == direct.rows == rows
    assert found.facts["dataset"] == str(repository) and len(found.facts["sha256"]) == 64
    lacking = Place("gsm8k/test.jsonl", ("question", "steps"), str(repository))
    with pytest.raises(ValueError, match="lacks the field 'steps'; it has question, answer"):
        from_hub(lacking, tmp_path, monkeypatch)


def test_a_hub_that_does_not_answer_is_missing_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("gsm8k/test.jsonl", ("question",), str(tmp_path / "no_such_repository"))
    with pytest.raises(
        MissingData, match=r"no file gsm8k/test\.jsonl in evaluation\.data"
    ) as caught:
        from_hub(place, tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)

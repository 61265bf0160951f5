"""A model, its tokenizer and hand-made tasks that several evaluation tests build on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from models_fixture import MIXERS, base_model, placement
from transformers import AutoTokenizer

from rad.files import write_json

NANO = Path(__file__).parents[1] / "rad" / "assets" / "nano" / "base"
TEXT = "Ann has 12 hats. Ann gets 3. How many hats has Ann?\n"
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}


def nano_tokenizer() -> Any:
    """The tokenizer of the embedded models."""
    return AutoTokenizer.from_pretrained(str(NANO))


def small_model() -> Any:
    """A random Llama for the nano tokenizer, with spread logits."""
    tokenizer = nano_tokenizer()
    return base_model(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,  # tied, it would only repeat its last token
    )


def small_hybrid(mixer: str, kind: str = "mixed") -> Any:
    """That model with softmax attention in some heads, `mixer` in the others."""
    from rad.models.convert import convert

    return convert(small_model(), placement(kind), MIXERS[mixer], "qkvo").eval()


def request(*arguments: Any, task: str = "t", doc_id: int = 0, **document: Any) -> Any:
    """What lm-eval hands to a model."""
    return SimpleNamespace(args=arguments, task_name=task, doc_id=doc_id, doc=document)


def said_twice(document: Mapping[str, Any], responses: Sequence[Any]) -> dict[str, float]:
    """A scorer of several answers: the share with the target, the share of different ones."""
    texts = responses[0]
    return {
        "hit": sum(document["target"] in text for text in texts) / len(texts),
        "different": len(set(texts)) / len(texts),
    }


def handmade_tasks(folder: Path) -> Path:
    """`sampled` (3 answers per document), `choice` (multiple choice), `absent` (no data)."""
    prompts = [TEXT[:cut] for cut in (52, 9, 30, 17, 44)]
    sampled = [
        {"id": f"s{index}", "prompt": prompt, "target": "a"} for index, prompt in enumerate(prompts)
    ]
    choice = [
        {"id": f"c{index}", "prompt": prompt, "choices": [" hats", " Ann has", " 3"], "gold": 1}
        for index, prompt in enumerate(prompts)
    ]
    shared = {
        "dataset_path": "json",
        "test_split": "test",
        "doc_to_text": "prompt",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    configurations: dict[str, dict[str, Any]] = {
        "sampled": {
            "output_type": "generate_until",
            "doc_to_target": "target",
            "process_results": "FUNCTION",
            "repeats": 3,
            "generation_kwargs": {"until": ["?"], "max_gen_toks": 12, **SAMPLED},
            "filter_list": [{"name": "all", "filter": [{"function": "take_first_k", "k": 3}]}],
            "metric_list": [_mean("hit"), _mean("different")],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [_mean("acc"), _mean("acc_norm")],
        },
    }
    for (name, configuration), rows in zip(configurations.items(), (sampled, choice), strict=True):
        files = {"data_files": {"test": f"data/{name}.jsonl"}}
        content = yaml.safe_dump(
            {"task": name, **shared, **configuration, "dataset_kwargs": files}, sort_keys=False
        )
        for part in ("data", "yaml"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        function = "!function evaluation_fixture.said_twice"
        (folder / f"yaml/{name}.yaml").write_text(content.replace("FUNCTION", function))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"data/{name}.jsonl").write_text(lines)
    tasks = [
        _entry("sampled", "hit", output_type="generate_until", repeats=3, prompts=15),
        _entry("choice", "acc", output_type="multiple_choice", repeats=1, prompts=15),
        _entry("absent", "contains", status="missing", reason="no file absent.jsonl"),
    ]
    write_json(folder / "manifest.json", {"schema": 2, "max_length": 200, "tasks": tasks})
    return folder


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _entry(name: str, metric: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "task": name,
        "kind": name,
        "family": name,
        "metric": metric,
        "metrics": [metric],
        "facts": {},
        "higher_is_better": True,
        "subtask": None,
        "length": None,
        "status": "ready",
        "samples": 5,
        "max_new_tokens": 12,
        "prompt_tokens": 30,
        "prompt_tokens_total": 300,
        **changes,
    }

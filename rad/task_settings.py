"""Settings of evaluation tasks: one class per group of kinds, found by the key `kind`.

A *suite* is a shipped file in `rad/evaluation/suites`: task names with their settings. A study
names suites, and what it says about one of their tasks is laid over the suite's settings. No torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from rad.mixer_settings import Settings


class TaskSettings(Settings):
    """What every task has."""

    kind: str
    samples: int | None = Field(
        None, ge=1, description="documents (per length and sub-task); default: all there are"
    )
    files: list[str] = Field(
        default_factory=list,
        description="data files; default: the standard place below `evaluation.data`, else the hub",
    )
    revision: str | None = Field(
        None, description="hub revision (commit) of the data, when no file is found"
    )
    missing: Literal["error", "row"] = Field(
        "error", description="when there are no data: refuse, or a row that says so in every table"
    )
    family: str | None = Field(
        None, description="tasks of one family are averaged in tables; default: that of the kind"
    )
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer")
    seed: int = 1234


class NanoTaskSettings(TaskSettings):
    kind: Literal["gsm_nano", "crux_nano"]
    samples: int = Field(100, ge=1, description="documents")
    split: Literal["test", "hard"] = Field("test", description="split of the nano family")


class RulerNanoSettings(TaskSettings):
    kind: Literal["ruler_nano"]
    samples: int = Field(100, ge=1, description="documents per length and sub-task")
    split: Literal["test", "hard"] = Field("test", description="split of the nano family")
    subtasks: list[str] = Field(
        default_factory=list, description="single, multikey, vt, cwe; default: all"
    )
    lengths: list[int] = Field(default_factory=list, description="contexts in tokens")


class RulerTextSettings(TaskSettings):
    kind: Literal["ruler_text"]
    samples: int = Field(100, ge=1, description="documents per length and sub-task")
    subtasks: list[str] = Field(
        default_factory=list, description="single, multikey, vt, cwe; default: all"
    )
    lengths: list[int] = Field(default_factory=list, description="prompt + answer in tokens")


class RulerSettings(TaskSettings):
    kind: Literal["ruler"]
    samples: int = Field(100, ge=1, description="documents per length and sub-task")
    subtasks: list[str] = Field(default_factory=list, description="of RULER's 13; default: all")
    lengths: list[int] = Field(
        default_factory=lambda: [4096], description="prompt + answer in tokens, 512 to 131072"
    )
    questions: list[str] = Field(
        default_factory=list,
        description="files of qa_1 and qa_2 (SQuAD or HotpotQA layout); default: `evaluation.data`",
    )
    chat: bool = Field(False, description="wrap prompts by the tokenizer's chat template")
    missing: Literal["error", "row"] = "row"
    max_new_tokens: int = Field(128, ge=1, description="no effect: RULER fixes it per sub-task")


class Gsm8kSettings(TaskSettings):
    kind: Literal["gsm8k", "gsm8k_cot", "gsm8k_cot_llama"]
    shots: int | None = Field(
        None, ge=0, description="worked examples in the prompt; default: 5, of both cot kinds 8"
    )
    shot_files: list[str] = Field(
        default_factory=list, description="of gsm8k: where its worked examples come from"
    )
    chat: bool | None = Field(
        None, description="chat template, one turn per example; default: of gsm8k_cot_llama alone"
    )
    max_new_tokens: int = Field(512, ge=1, description="longest generated answer")


class CruxSettings(TaskSettings):
    kind: Literal["crux"]
    shots: int = Field(0, ge=0, description="worked examples in the prompt, up to 2")


class CruxevalSettings(TaskSettings):
    kind: Literal["cruxeval_output", "cruxeval_input"]
    cot: bool = Field(False, description="reason first, after one worked example (max 2048 tokens)")
    generations: int = Field(
        1, ge=1, description="answers per document, for pass@k; more than one are sampled"
    )
    temperature: float = Field(0.2, gt=0, description="of sampled answers")
    top_p: float = Field(0.95, gt=0, le=1, description="of sampled answers")
    max_new_tokens: int = Field(256, ge=1, description="longest generated answer")


class ZeroEvalSettings(TaskSettings):
    kind: Literal["gsm_zeroeval", "crux_zeroeval"]
    rules: Literal["original", "upstream"] = Field(
        "original",
        description="what exact_match compares: as MambaInLlama's fork, or as ZeroEval since 2025",
    )
    boxed: bool = Field(
        False, description=r"take \boxed{...} where no answer field is found (original: Llama-3.1)"
    )
    double_bos: bool = Field(False, description="start with two <s>, as the original did")
    chat: bool = Field(True, description="wrap prompts by the tokenizer's chat template")
    max_new_tokens: int = Field(
        1024, ge=1, description="longest generated answer (the original allows 4096)"
    )


class RecallSettings(TaskSettings):
    kind: Literal["swde", "fda", "squad_completion", "kv_retrieval", "record_recall", "qa_recall"]
    missing: Literal["error", "row"] = "row"
    pairs: int = Field(
        64, ge=2, description="of kv_retrieval and record_recall: entries per prompt"
    )
    max_new_tokens: int = Field(48, ge=1, description="longest generated answer")


class ChoiceSettings(TaskSettings):
    kind: Literal[
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "piqa",
        "winogrande",
        "openbookqa",
        "mmlu",
        "pubmedqa",
        "race",
        "truthfulqa_mc1",
        "truthfulqa_mc2",
        "lambada",
    ]
    shots: Literal[0] = Field(0, description="zero-shot")


class PerplexitySettings(TaskSettings):
    kind: Literal["perplexity"]
    samples: int | None = Field(
        100, ge=1, description="blocks of text, spread evenly; null: all there are"
    )
    lengths: list[int] = Field(
        default_factory=list, description="longest block in tokens; default: the trained context"
    )


AnyTask = Annotated[
    NanoTaskSettings
    | RulerNanoSettings
    | RulerTextSettings
    | RulerSettings
    | Gsm8kSettings
    | CruxSettings
    | CruxevalSettings
    | ZeroEvalSettings
    | RecallSettings
    | ChoiceSettings
    | PerplexitySettings,
    Field(discriminator="kind"),
]
_CLASSES: tuple[type[TaskSettings], ...] = get_args(get_args(AnyTask)[0])
# kind -> its settings
TASK_SETTINGS: dict[str, type[TaskSettings]] = {
    kind: each
    for each in _CLASSES
    for kind in each.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
}


# --- suites ---------------------------------------------------------------------------------


def suite_names() -> list[str]:
    """The suites that are shipped."""
    folder = resources.files("rad.evaluation").joinpath("suites")
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".yaml"))


def suite(name: str) -> dict[str, dict[str, Any]]:
    """Task name -> raw settings of a shipped suite; `ValueError` offers the closest names."""
    if name not in suite_names():
        raise ValueError(f"unknown suite {name!r}{closest(name, suite_names())}")
    file = resources.files("rad.evaluation").joinpath("suites", f"{name}.yaml")
    content: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
    return dict(content["tasks"])


def closest(name: str, known: list[str]) -> str:
    """`; did you mean ...? known: ...` for an unknown name."""
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{hint}; known: {', '.join(known)}"


def expand(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Raw evaluation settings with the tasks of their suites, and kinds known to exist.

    A task of a suite takes over what `tasks` says under its name; null leaves it out.
    """
    values = dict(raw)
    suites = values.get("suites") or []
    if not isinstance(suites, list):
        raise ValueError("evaluation.suites: a list of suite names is expected")
    stated = values.get("tasks") or {}
    tasks: dict[str, Any] = {}
    for name in suites:
        tasks.update(suite(str(name)))
    for name, options in stated.items():
        if options is None:
            # of a suite, or of a file that this one was laid over
            if name not in tasks and difflib.get_close_matches(name, list(tasks)):
                raise ValueError(
                    f"evaluation.tasks.{name}: null leaves a task out, but no suite has it"
                    f"{closest(name, list(tasks))}"
                )
            tasks.pop(name, None)
        elif isinstance(options, Mapping):
            if "kind" not in options and name not in tasks:
                raise ValueError(
                    f"evaluation.tasks.{name}: the key `kind` is missing, and no suite of this "
                    f"study has a task of that name{closest(name, [*tasks, *TASK_SETTINGS])}"
                )
            replaces = "kind" in options and options["kind"] != tasks.get(name, {}).get("kind")
            tasks[name] = dict(options) if replaces else {**tasks.get(name, {}), **options}
        else:
            tasks[name] = options
    for name, options in tasks.items():
        kind = options.get("kind") if isinstance(options, Mapping) else None
        if isinstance(kind, str) and kind not in TASK_SETTINGS:
            raise ValueError(
                f"evaluation.tasks.{name}.kind: unknown kind {kind!r}"
                f"{closest(kind, list(TASK_SETTINGS))}"
            )
    # expanded once: read again, what was left out must not come back
    values["suites"], values["tasks"] = [], tasks
    return values


class TaskTable(Settings):
    """The part of the evaluation settings that says what is scored."""

    data: str = Field(
        "data", description="folder with data files in their standard places (docs/evaluation.md)"
    )
    offline: bool = Field(
        False, description="never ask the hub for data, as the variable HF_HUB_OFFLINE=1 does"
    )
    suites: list[str] = Field(
        default_factory=list, description="shipped groups of tasks (`rad suites` lists them)"
    )
    tasks: dict[str, AnyTask] = Field(
        default_factory=dict,
        description="task name -> task; of a suite's task only what differs, null leaves one out",
    )
    samples: int | None = Field(
        None, ge=1, description="at most so many documents of every task, for a first run"
    )
    chat_template: str | None = Field(
        None, description="file with a chat template; default: the tokenizer's"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, raw: Any) -> Any:
        return expand(raw) if isinstance(raw, Mapping) else raw

    @model_validator(mode="after")
    def _some(self) -> TaskTable:
        if not self.tasks:
            raise ValueError("evaluation: neither `suites` nor `tasks` names a task")
        return self

    def wanted(self, task: str) -> int | None:
        """Documents of a task, None for all."""
        own = self.tasks[task].samples
        limits = [limit for limit in (own, self.samples) if limit is not None]
        return min(limits, default=None)

"""The JSON schema of a study and the table of its keys, both generated from the settings models.

`rad schema --schema workflow/schemas/study.schema.json --table docs/config.md`; a test keeps the
committed files equal to what this module yields.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rad import settings as leaves
from rad.placement import Budget
from rad.study import GridEntry, ReportSettings, Study


def _by_class(registry: Mapping[str, type[Any]]) -> dict[type[Any], list[str]]:
    """Settings class -> the names that it configures."""
    classes: dict[type[Any], list[str]] = {}
    for name, kind in registry.items():
        classes.setdefault(kind, []).append(name)
    return classes


SECTIONS: list[tuple[str, str, type[BaseModel]]] = [
    ("", "Top level", Study),
    ("models.<name>", "A model", leaves.ModelSettings),
    ("corpora.<name>", "A token corpus", leaves.CorpusSettings),
    ("corpora.<name>.sources[]", "A source of a corpus", leaves.SourceSettings),
    *(("mixers.<name>", f"Mixer `{name}`", kind) for name, kind in leaves.MIXER_SETTINGS.items()),
    ("alignment", "Stage-1 alignment", leaves.AlignmentSettings),
    ("teacher_outputs.<model>", "Stored outputs of a teacher", leaves.TeacherOutputsSettings),
    *(
        (
            "selectors.<name>",
            "Selector " + ", ".join(f"`{name}`" for name in names),
            kind,
        )
        for kind, names in _by_class(leaves.SELECTOR_SETTINGS).items()
    ),
    ("recipes.<name>", "A recipe", leaves.RecipeSettings),
    ("recipes.<name>.stages[]", "A distillation stage", leaves.StageSettings),
    (
        "recipes.<name>.stages[].groups[]",
        "Parameters with a rate of their own",
        leaves.GroupSettings,
    ),
    ("grid[]", "A block of the grid", GridEntry),
    ("grid[].budget", "A budget", Budget),
    ("evaluation", "Evaluation", leaves.EvaluationSettings),
    *(
        ("evaluation.tasks.<name>", "Task " + ", ".join(f"`{name}`" for name in names), kind)
        for kind, names in _by_class(leaves.TASK_SETTINGS).items()
    ),
    ("evaluation.efficiency", "Efficiency probes", leaves.EfficiencySettings),
    ("report", "The report", ReportSettings),
]

INTRODUCTION = """\
# Configuration

One YAML file is one study. `snakemake --cores all` runs `nano.yaml`; another study is
`snakemake --cores all --configfile config/stories260k.yaml`. Several files are merged from left to
right (keys are merged, lists are replaced), which is how overlays such as `smoke.yaml` work:
`snakemake --cores all --configfile config/nano.yaml config/smoke.yaml`. Numbers given with
`--config` arrive as text and are converted.

`rad check FILE...` checks a study without running it and `rad plan FILE...` lists its runs. Editors
validate against `workflow/schemas/study.schema.json`.

This file is generated from the settings models by `rad schema`; do not edit it by hand.
"""


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a study file."""
    schema = Study.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    del schema["properties"]["external_selectors"]
    return schema


def key_table() -> str:
    """Markdown: every key with its type, default and meaning."""
    lines = [INTRODUCTION]
    for path, title, model in SECTIONS:
        lines.append(f"\n## {title}{f' (`{path}`)' if path else ''}\n")
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            if name == "external_selectors":
                continue
            cells = [f"`{name}`", _type_name(field.annotation), _default(field)]
            lines.append(f"| {' | '.join(cells)} | {field.description or ''} |")
    return "\n".join(lines) + "\n"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value}`" if not isinstance(value, BaseModel) else "see below"


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in arguments if part is not type(None))
    if origin in (list, tuple):
        return f"{origin.__name__} of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type_name(arguments[1])}"
    return getattr(annotation, "__name__", str(annotation))

"""Study: one configuration -> the runs of the grid, validated before any work starts.

`load(files)` merges YAML files from left to right (later ones win, lists are replaced) and
`Study.from_config(mapping)` checks them; `study.runs()` expands the grid. Imports no torch.

Try it: `rad plan config/nano.yaml`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from rad.files import digest
from rad.placement import Budget, first_error
from rad.settings import (
    SELECTOR_SETTINGS,
    AlignmentSettings,
    CorpusSettings,
    EvaluationSettings,
    ExternalSettings,
    Initialisation,
    MixerSettings,
    ModelSettings,
    RecipeSettings,
    Settings,
    TeacherOutputsSettings,
    needs_of,
)

RECIPE_VERSION = 2  # raised by hand when the meaning of a spec changes: every run is redone
NAME = re.compile(r"[a-z0-9][a-z0-9_.]*")
View = Literal["controlled", "faithful", "reference"]


class StudyError(ValueError):
    """A study that cannot run; the message is one line that names the key and the remedy."""


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class GridEntry(Settings):
    """A block of the grid: the product of its lists, one run per element."""

    view: View = Field(description="table that the runs belong to")
    base: str = Field("base", description="a key of `models`")
    selector: list[str] = Field(description="keys of `selectors`")
    budget: list[Budget] = Field(description="how much attention stays")
    mixer: str = Field("mamba2", description="a key of `mixers`")
    initialisation: Initialisation = Field("qkvo", description="how the mixers start")
    recipe: str = Field(description="a key of `recipes`")
    teacher: list[str] = Field(default_factory=lambda: ["self"], description="`self` or a model")
    seed: list[int] = Field(default_factory=lambda: [0])
    label: str | None = Field(
        None, description="row title in tables; default: selector and teacher"
    )

    _lists = field_validator("selector", "budget", "teacher", "seed", mode="before")(_listed)


class Run(Settings):
    """One cell of the grid."""

    id: str
    views: list[View]
    base: str
    selector: str
    budget: Budget
    mixer: str
    initialisation: Initialisation
    recipe: str
    teacher: str
    seed: int
    label: str | None = None


class ReportSettings(Settings):
    """How the report compares."""

    reference: str = Field(
        "uniform", description="selector, or method, that every other one is compared with"
    )


class Study(Settings):
    """The whole configuration of a study."""

    name: str = Field(description="results go to `results/<name>/`")
    variant: str | None = Field(None, description="set by overlays: `results/<name>-<variant>/`")
    title: str = Field("", description="heading of the report")
    offline: bool = Field(
        False,
        description="never ask the hub, for models or data: folders and the local cache alone, as "
        "the variable HF_HUB_OFFLINE=1 does",
    )
    models: dict[str, ModelSettings] = Field(description="name -> checkpoint")
    corpora: dict[str, CorpusSettings] = Field(description="name -> token corpus")
    corpus: str = Field("distil", description="corpus that runs are distilled on")
    calibration: str = Field("distil", description="corpus that selectors calibrate on")
    mixers: dict[str, MixerSettings] = Field(description="name -> mixer")
    alignment: AlignmentSettings | None = Field(None, description="stage 1, shared by all runs")
    teacher_outputs: dict[str, TeacherOutputsSettings] = Field(
        default_factory=dict,
        description="teachers that run over the corpus once, in a job of their own: their students "
        "read what was stored and never load them (a key of `models` -> what to store)",
    )
    selectors: dict[str, dict[str, Any]] = Field(description="name -> `method` and its settings")
    recipes: dict[str, RecipeSettings] = Field(description="name -> distillation stages")
    grid: list[GridEntry] = Field(description="what is compared")
    references: list[str] = Field(default_factory=list, description="models scored as they are")
    evaluation: EvaluationSettings = Field(description="tasks and efficiency probes")
    report: ReportSettings = Field(default_factory=ReportSettings)
    external_selectors: list[str] = Field(
        default_factory=list,
        description="filled by the workflow: methods that exist as a rule file only",
    )

    @model_validator(mode="after")
    def _names_resolve(self) -> Study:
        tables = ("models", "corpora", "mixers", "selectors", "recipes")
        for table in tables:
            for name in getattr(self, table):
                if not NAME.fullmatch(name):
                    raise ValueError(
                        f"{table}.{name}: names use a-z, 0-9, '_' and '.', they become file names"
                    )

        def need(table: str, name: str, where: str) -> None:
            known = getattr(self, table)
            if name not in known:
                raise ValueError(f"{where}: unknown {table[:-1]} {name!r}; known: {_join(known)}")

        need_corpus = [(self.corpus, "corpus"), (self.calibration, "calibration")]
        if self.alignment:
            need_corpus.append((self.alignment.corpus, "alignment.corpus"))
        for name, where in need_corpus:
            if name not in self.corpora:
                raise ValueError(f"{where}: unknown corpus {name!r}; known: {_join(self.corpora)}")
        for name in self.teacher_outputs:
            need("models", name, "teacher_outputs")
        for name in self.references:
            need("models", name, "references")
        methods = {settings.method for settings in self.selector_settings.values()}  # type: ignore[attr-defined]
        if self.report.reference not in {"uniform", *self.selectors, *methods}:
            raise ValueError(
                f"report.reference: no selector {self.report.reference!r}; "
                f"known: {_join(self.selectors)}"
            )
        for name, selector in self.selector_settings.items():
            needs = needs_of(selector)
            mixer = getattr(selector, "mixer", None)
            if "mixer" in needs and mixer is not None:
                need("mixers", mixer, f"selectors.{name}.mixer")
            if "aligned" in needs and self.alignment is None:
                raise ValueError(
                    f"selectors.{name}: {selector.method} needs the key `alignment`"  # type: ignore[attr-defined]
                )
        for index, entry in enumerate(self.grid):
            where = f"grid.{index}"
            need("models", entry.base, f"{where}.base")
            need("mixers", entry.mixer, f"{where}.mixer")
            need("recipes", entry.recipe, f"{where}.recipe")
            for name in entry.selector:
                need("selectors", name, f"{where}.selector")
            for name in entry.teacher:
                if name != "self":
                    need("models", name, f"{where}.teacher")
            if entry.initialisation == "aligned" and self.alignment is None:
                raise ValueError(f"{where}.initialisation: aligned needs the key `alignment`")
            starts = self.mixers[entry.mixer].starts
            if entry.initialisation not in starts:
                raise ValueError(
                    f"{where}.initialisation: mixer {entry.mixer} cannot start from "
                    f"{entry.initialisation}; it accepts {_join(starts)}"
                )
        return self

    @cached_property
    def selector_settings(self) -> dict[str, Settings]:
        """Selector name -> its checked settings; raises `ValueError` naming the key."""
        result: dict[str, Settings] = {}
        for name, raw in self.selectors.items():
            method = raw.get("method", name)
            if method in SELECTOR_SETTINGS:
                model: type[Settings] = SELECTOR_SETTINGS[method]
            elif method in self.external_selectors:
                model = ExternalSettings
            else:
                known = sorted({*SELECTOR_SETTINGS, *self.external_selectors})
                raise ValueError(
                    f"selectors.{name}.method: unknown method {method!r}; known: {_join(known)} "
                    f"(a rule file workflow/rules/selection/{method}.smk would add it)"
                )
            try:
                result[name] = model.model_validate({**raw, "method": method})
            except ValidationError as error:
                raise ValueError(f"selectors.{name}.{first_error(error)}") from error
        return result

    @property
    def folder(self) -> str:
        """Folder name under `results/`, `state/` and `logs/`."""
        return f"{self.name}-{self.variant}" if self.variant else self.name

    @cached_property
    def run_table(self) -> dict[str, Run]:
        """Run id -> run, in grid order; a cell named by several views is one run."""
        runs: dict[str, Run] = {}
        for entry in self.grid:
            cells = itertools.product(entry.selector, entry.budget, entry.teacher, entry.seed)
            for selector, budget, teacher, seed in cells:
                identity = "-".join(
                    [
                        *(entry.base, selector, budget.slug, entry.mixer, entry.initialisation),
                        *(entry.recipe, teacher, f"s{seed}"),
                    ]
                )
                views = [entry.view]
                if identity in runs:
                    views = list(dict.fromkeys([*runs[identity].views, entry.view]))
                runs[identity] = Run(
                    id=identity,
                    views=views,
                    base=entry.base,
                    selector=selector,
                    budget=budget,
                    mixer=entry.mixer,
                    initialisation=entry.initialisation,
                    recipe=entry.recipe,
                    teacher=teacher,
                    seed=seed,
                    label=entry.label,
                )
        return runs

    def spec(self, run: str) -> dict[str, Any]:
        """The run's complete specification, as written to `spec.json`."""
        cell = self.run_table[run]
        teacher = self.models[cell.base if cell.teacher == "self" else cell.teacher]
        content = {
            "schema": 1,
            "recipe_version": RECIPE_VERSION,
            "study": self.folder,
            "run": cell.id,
            "views": list(cell.views),
            "label": cell.label,
            "base": {"name": cell.base, **self.models[cell.base].model_dump(mode="json")},
            "teacher": {"name": cell.teacher, **teacher.model_dump(mode="json")},
            "selector": {
                "name": cell.selector,
                **self.selector_settings[cell.selector].model_dump(mode="json"),
            },
            "budget": cell.budget.model_dump(mode="json", exclude_none=True),
            "budget_slug": cell.budget.slug,
            "mixer": {"name": cell.mixer, **self.mixers[cell.mixer].model_dump(mode="json")},
            "initialisation": cell.initialisation,
            "recipe": {"name": cell.recipe, **self.recipes[cell.recipe].model_dump(mode="json")},
            "corpus": {"name": self.corpus, **self.corpora[self.corpus].model_dump(mode="json")},
            "seed": cell.seed,
        }
        if cell.teacher in self.teacher_outputs:
            stored = self.teacher_outputs[cell.teacher]
            content["teacher_outputs"] = stored.model_dump(mode="json")
        return content

    def spec_digest(self, run: str) -> str:
        """sha256 of what decides the run's weights (titles and views do not)."""
        return training_digest(self.spec(run))

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], external_selectors: Iterable[str] = ()
    ) -> Study:
        """Check a merged configuration; raises `StudyError` with one line."""
        raw = {**config, "external_selectors": sorted(external_selectors)}
        try:
            study = cls.model_validate(raw)
            _ = study.selector_settings, study.run_table
        except ValidationError as error:
            raise StudyError(f"config: {_with_suggestion(error, cls)}") from error
        except ValueError as error:
            raise StudyError(f"config: {error}") from error
        return study


def training_digest(spec: Mapping[str, Any]) -> str:
    """sha256 of the parts of a spec that decide the trained weights."""
    ignored = {"views", "label", "study"}
    return digest({key: value for key, value in spec.items() if key not in ignored})


def _join(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _with_suggestion(error: ValidationError, model: type[Settings]) -> str:
    """`first_error` plus the nearest known key when a key is misspelt."""
    import difflib

    fault = error.errors()[0]
    text = first_error(error)
    if fault["type"] == "extra_forbidden":
        wrong = str(fault["loc"][-1])
        close = difflib.get_close_matches(wrong, _all_keys(model), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        text = text.replace("Extra inputs are not permitted", f"unknown key{hint}")
    return text


def _all_keys(model: type[Any], seen: set[type[Any]] | None = None) -> list[str]:
    """Every key of a settings model and the models inside it."""
    seen = set() if seen is None else seen
    if model in seen or not hasattr(model, "model_fields"):
        return []
    seen.add(model)
    keys = []
    for name, field in model.model_fields.items():
        keys.append(name)
        pending = [field.annotation]
        while pending:
            annotation = pending.pop()
            pending.extend(get_args(annotation))
            if isinstance(annotation, type):
                keys.extend(_all_keys(annotation, seen))
    return keys


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge of two mappings; `second` wins, lists are replaced."""
    result = dict(first)
    for key, value in second.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def load(files: Iterable[Path | str], external_selectors: Iterable[str] = ()) -> Study:
    """Read, merge and check YAML files; raises `StudyError` naming the file and key."""
    config: dict[str, Any] = {}
    for file in files:
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise StudyError(f"{file}: cannot read ({error.strerror})") from error
        except yaml.YAMLError as error:
            raise StudyError(f"{file}: not YAML ({str(error).splitlines()[0]})") from error
        if not isinstance(content, Mapping):
            raise StudyError(f"{file}: expected keys and values at the top level")
        config = merge(config, content)
    return Study.from_config(config, external_selectors)

"""What the rules ask about the study: input files, parameters and wildcard patterns.

Every method that takes `wildcards` is an input or params function of a rule. Imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rad.evaluation.ruler import plan
from rad.selector_settings import shares_scores
from rad.settings import needs_of
from rad.study import Study


def use_own_environment() -> None:
    """Let jobs find the `rad` beside the running snakemake, activated environment or not."""
    folder = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([folder, os.environ["PATH"]])


def go_offline() -> None:
    """Let no job ask the hub for models or data."""
    os.environ["HF_HUB_OFFLINE"] = "1"


class Helpers:
    """The study seen from the workflow."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.ruler_tasks = plan.ruler_tasks(study.evaluation)
        self.scored = [*study.run_table, *(f"model-{name}" for name in study.references)]

    @staticmethod
    def either(names: Iterable[str]) -> str:
        """A pattern that matches exactly the given names; nothing when there are none."""
        return "|".join(re.escape(name) for name in names) or "(?!)"

    def selectors_of(self, method: str) -> str:
        """Pattern of the selectors of this study that use `method`."""
        settings = self.study.selector_settings
        return self.either(n for n, s in settings.items() if s.method == method)  # type: ignore[attr-defined]

    # --- parameters, as JSON ---

    def model(self, wildcards: Any) -> str:
        return _json(self.study.models[wildcards.model].model_dump(mode="json"))

    def corpus(self, wildcards: Any) -> str:
        return _json(self.study.corpora[wildcards.corpus].model_dump(mode="json"))

    def tasks(self, wildcards: Any) -> str:
        return _json(self.study.evaluation.model_dump(mode="json"))

    def mixer(self, wildcards: Any) -> str:
        return _json(self.study.mixers[wildcards.mixer].model_dump(mode="json"))

    def alignment(self, wildcards: Any) -> str:
        assert self.study.alignment is not None
        return _json(self.study.alignment.model_dump(mode="json"))

    def selector(self, wildcards: Any) -> str:
        return _json(self.study.selector_settings[wildcards.selector].model_dump(mode="json"))

    def selector_method(self, wildcards: Any) -> str:
        return str(self._method(wildcards))

    def selector_options(self, wildcards: Any) -> str:
        """What the method works from, as options of `rad select`."""
        needs = self._needs(wildcards)
        options = []
        if "corpus" in needs:
            options.append(f"--corpus {self._path('corpus', self.study.calibration)}")
        if "mixer" in needs:
            mixer = self._selector_mixer(wildcards)
            if "aligned" in needs:
                options.append(f"--aligned {self._path('alignment', wildcards.base, mixer)}")
            settings = _json(self.study.mixers[mixer].model_dump(mode="json"))
            options.append(f"--mixer {shlex.quote(settings)}")
        if "mixer" in needs or shares_scores(self.study.selector_settings[wildcards.selector]):
            options.append(
                f"--state {self.state(wildcards)}/select-{wildcards.base}-{wildcards.selector}"
            )
        return " ".join(options)

    def _needs(self, wildcards: Any) -> tuple[str, ...]:
        return needs_of(self.study.selector_settings[wildcards.selector])

    def _method(self, wildcards: Any) -> str:
        return self.study.selector_settings[wildcards.selector].method  # type: ignore[attr-defined,no-any-return]

    def _selector_mixer(self, wildcards: Any) -> str:
        """Key of `mixers` that the method's students have."""
        settings = self.study.selector_settings[wildcards.selector]
        return str(getattr(settings, "mixer", None) or next(iter(self.study.mixers)))

    def _path(self, *parts: str) -> str:
        return "/".join(["results", self.study.folder, *parts])

    def spec(self, wildcards: Any) -> str:
        return _json(self.study.spec(wildcards.run))

    def reference_spec(self, wildcards: Any) -> str:
        settings = self.study.models[wildcards.model].model_dump(mode="json")
        return _json(
            {
                "schema": 1,
                "run": f"model-{wildcards.model}",
                "reference": wildcards.model,
                "model": settings,
            }
        )

    def state(self, wildcards: Any) -> str:
        """Folder for the states of running jobs; undeclared, so that failed jobs keep theirs."""
        return f"state/{self.study.folder}"

    def report_files(self, kind: str, *endings: str) -> list[str]:
        """Tables or figures of the report with one of the file name endings."""
        from rad.reporting import outputs

        return [f"<results>/{file}" for file in outputs(self.study)[kind] if file.endswith(endings)]

    def whole_study(self, wildcards: Any) -> str:
        return _json(self.study.model_dump(mode="json"))

    def aligned_option(self, wildcards: Any) -> str:
        folder = self._alignment_folder(wildcards.run)
        return f"--aligned {folder}" if folder else ""

    def teacher_options(self, wildcards: Any) -> str:
        """Options of `rad distil` when the run's teacher has stored its outputs."""
        teacher = self._stored_teacher(wildcards.run)
        if not teacher:
            return ""
        model = self._path("models", teacher, "source.json")
        folder = self._path("teachers", teacher)
        options = f"--teacher-outputs {folder} --teacher-model {model}"
        settings = self.study.teacher_outputs[teacher]
        return f"{options} --teacher-wait {settings.wait_minutes:g}" if settings.stream else options

    def teacher_outputs_options(self, wildcards: Any) -> str:
        settings = self.study.teacher_outputs[wildcards.model]
        options = settings.model_dump(exclude_none=True, exclude={"order"})
        if settings.device_map is not None:
            options["device_map"] = settings.device_map
        if settings.order == "students":
            seeds = [
                run.seed for run in self.study.run_table.values() if run.teacher == wildcards.model
            ]
            options |= {"order_seed": seeds[0]} if seeds else {}
        return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in options.items())

    @property
    def teachers_in_steps(self) -> list[str]:
        """Teachers whose outputs come from several jobs, or are read while they are written."""
        stored = self.study.teacher_outputs
        return [name for name, each in stored.items() if each.parts > 1 or each.stream]

    @property
    def teachers_at_once(self) -> list[str]:
        """Teachers whose outputs one job writes."""
        return [name for name in self.study.teacher_outputs if name not in self.teachers_in_steps]

    def teacher_parts(self, wildcards: Any) -> list[str]:
        """Records of the parts of a teacher's outputs."""
        count = self.study.teacher_outputs[wildcards.model].parts
        folder = f"<results>/teachers/{wildcards.model}"
        return [f"{folder}/part-{part:05d}-of-{count:05d}.json" for part in range(count)]

    def _stored_teacher(self, name: str) -> str | None:
        run = self.study.run_table[name]
        return run.teacher if run.teacher in self.study.teacher_outputs else None

    # --- input files ---

    def tokenizer_model(self, wildcards: Any) -> str:
        """All models of a study share one vocabulary; the first one's tokenizer is used."""
        first = self.study.grid[0].base if self.study.grid else next(iter(self.study.models))
        return f"<results>/models/{first}/source.json"

    def corpus_files(self, wildcards: Any) -> list[str]:
        return list(self.study.corpora[wildcards.corpus].input_files)

    def task_files(self, wildcards: Any) -> list[str]:
        from rad.evaluation.data import input_files

        return input_files(self.study.evaluation)

    def ruler_files(self, wildcards: Any) -> list[str]:
        return plan.input_files(self.study.evaluation, wildcards.ruler, wildcards.subtask)

    def ruler_folder(self, wildcards: Any) -> str:
        return self._path("ruler")

    def ruler_options(self, wildcards: Any) -> str:
        return shlex.join(plan.options(self.study.evaluation, wildcards.ruler))

    def ruler_documents(self, wildcards: Any) -> list[str]:
        return [
            f"<results>/ruler/{name}/{subtask}/{length}.jsonl"
            for name in self.ruler_tasks
            for subtask, length in plan.planned(self.study.evaluation, name)
        ]

    def alignment_corpus(self, wildcards: Any) -> str:
        assert self.study.alignment is not None
        return f"<results>/corpus/{self.study.alignment.corpus}/manifest.json"

    def calibration_corpus(self, wildcards: Any) -> str:
        return f"<results>/corpus/{self.study.calibration}/manifest.json"

    def training_corpus(self, wildcards: Any) -> str:
        return f"<results>/corpus/{self.study.corpus}/manifest.json"

    def selector_corpus(self, wildcards: Any) -> list[str]:
        needed = "corpus" in self._needs(wildcards)
        return [self.calibration_corpus(wildcards)] if needed else []

    def selector_alignment(self, wildcards: Any) -> list[str]:
        if "aligned" not in self._needs(wildcards):
            return []
        mixer = self._selector_mixer(wildcards)
        return [f"<results>/alignment/{wildcards.base}/{mixer}/mixers.safetensors"]

    def placement(self, wildcards: Any) -> str:
        run = self.study.run_table[wildcards.run]
        return f"<results>/selection/{run.base}/{run.selector}/{run.budget.slug}/placement.json"

    def run_models(self, wildcards: Any) -> list[str]:
        run = self.study.run_table[wildcards.run]
        names = [run.base] if run.teacher == "self" else [run.base, run.teacher]
        return [f"<results>/models/{name}/source.json" for name in names]

    def run_teacher(self, wildcards: Any) -> list[str]:
        teacher = self._stored_teacher(wildcards.run)
        if not teacher:
            return []
        streams = self.study.teacher_outputs[teacher].stream
        return [f"<results>/teachers/{teacher}/{'start' if streams else 'manifest'}.json"]

    def run_alignment(self, wildcards: Any) -> list[str]:
        folder = self._alignment_folder(wildcards.run)
        return [f"{folder}/mixers.safetensors"] if folder else []

    def scored_model(self, wildcards: Any) -> str:
        if wildcards.scored.startswith("model-"):
            name = wildcards.scored.removeprefix("model-")
            return f"<results>/models/{name}/source.json"
        return f"<results>/runs/{wildcards.scored}/model/model.safetensors"

    def everything_scored(self, wildcards: Any) -> list[str]:
        """What the report reads, besides the study itself."""
        files = []
        for name in self.scored:
            folder = f"<results>/runs/{name}"
            files += [f"{folder}/{part}" for part in ("evaluation.json", "samples.jsonl")]
            files.append(f"{folder}/efficiency.json")
        for name in self.study.run_table:
            folder = f"<results>/runs/{name}"
            files += [f"{folder}/{part}" for part in ("curve.jsonl", "training.json")]
        # no student that reads shards as they appear asks for the jobs that write them
        used = {run.teacher for run in self.study.run_table.values()}
        for name, settings in self.study.teacher_outputs.items():
            if settings.stream and name in used:
                files.append(f"<results>/teachers/{name}/manifest.json")
        return files

    def _alignment_folder(self, name: str) -> str | None:
        run = self.study.run_table[name]
        if run.initialisation != "aligned":
            return None
        return f"results/{self.study.folder}/alignment/{run.base}/{run.mixer}"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)

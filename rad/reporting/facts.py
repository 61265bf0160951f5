"""What a report says about how it came about: versions, commit, machine, seeds, times."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rad
from rad.files import digest
from rad.reporting.collect import Results
from rad.reporting.plan import reference_name
from rad.reporting.writers import count

PACKAGES = ("rad", "torch", "transformers", "lm_eval", "python")
DISTRIBUTIONS = {"rad": "radbench", "lm_eval": "lm-eval"}


@dataclass(frozen=True)
class Fact:
    """One line of `what was run`."""

    name: str
    value: str


def versions(results: Results) -> dict[str, str]:
    """Package -> version that the runs recorded; what is installed where none was."""
    recorded: dict[str, dict[str, None]] = {name: {} for name in PACKAGES}
    for result in results.everything:
        own: dict[str, Any] = dict(result.training.get("versions") or {})
        own.setdefault("lm_eval", result.lm_eval.get("lm_eval_version"))
        for name in PACKAGES:
            value = own.get(name) or own.get(name.replace("_", "-"))
            if value:
                recorded[name][str(value)] = None
    return {name: ", ".join(found) or _installed(name) for name, found in recorded.items()}


def _installed(name: str) -> str:
    if name == "python":
        return platform.python_version()
    try:
        # reads metadata only: importing torch would take longer than the whole report
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def commit() -> str | None:
    """Commit of the source tree that `rad` runs from; None when it is not one."""
    folder = Path(rad.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # an installed package may lie inside somebody else's repository
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    identity = git("rev-parse", "--short=12", "HEAD")
    if identity is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{identity} with local changes" if changed else identity


def _distinct(values: list[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def facts(results: Results) -> list[Fact]:
    """Everything a reader needs to know to repeat the study."""
    study = results.study
    found = versions(results)
    listed = [Fact("study", study.folder)]
    listed.append(Fact("configuration digest", digest(study.model_dump(mode="json"))[:16]))
    identity = commit()
    if identity:
        listed.append(Fact("commit", identity))
    names = {"lm_eval": "lm-eval", "python": "Python"}
    listed += [Fact(names.get(name, name), value) for name, value in found.items()]
    threads = _distinct([result.training.get("threads") for result in results.runs.values()])
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    listed.append(Fact("machine of this report", machine))
    if threads:
        listed.append(Fact("threads per training job", threads))
    dtypes = _distinct([result.evaluation.get("dtype") for result in results.everything])
    if dtypes:
        listed.append(Fact("scored in", dtypes))
    seeds = _distinct([run.seed for run in study.run_table.values()])
    listed.append(Fact("seeds", seeds or "none"))
    listed.append(Fact("differences are to", reference_name(study)))
    for task in results.missing.values():
        listed.append(Fact(f"missing data: {task.name}", task.missing))
    models = [f"{name} = {model.source}" for name, model in study.models.items()]
    listed.append(Fact("models", "; ".join(models)))
    corpus = study.corpora[study.corpus]
    listed.append(
        Fact(
            "distillation corpus",
            f"{study.corpus}: {corpus.source}, {count(corpus.tokens)} tokens, "
            f"rows of {corpus.context}",
        )
    )
    return listed

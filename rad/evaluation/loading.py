"""lm-eval's tasks of a folder that `build_tasks` wrote: no index, no network, no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rad.files import read_json


class Documents(list[dict[str, Any]]):
    """A split of a data set as lm-eval reads it: rows, and the names of their fields."""

    @property
    def features(self) -> dict[str, None]:
        """Field names."""
        return dict.fromkeys(key for row in self for key in row)


def read_documents(data_files: dict[str, str], **unused: Any) -> dict[str, Documents]:
    """lm-eval `custom_dataset`: JSON Lines in memory, split name -> documents.

    Stands in for `dataset_path: json`, which converts and caches every file below the home folder;
    slower for the small files here, stale when two studies meet, and it makes one type of fields
    that differ between rows.
    """
    return {split: Documents(_rows(Path(path))) for split, path in data_files.items()}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON Lines file; raises `ValueError` naming file and line."""
    try:
        # only "\n" ends a record: JSON text may hold other characters that end lines
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror}); run `rad tasks` again") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON; run `rad tasks` again") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: no object; run `rad tasks` again")
        yield row


def load_manifest(tasks: Path) -> dict[str, Any]:
    """The manifest of a folder written by `build_tasks`; raises `ValueError` when there is none."""
    path = tasks / "manifest.json"
    manifest: dict[str, Any] = read_json(path)
    if any("status" not in entry for entry in manifest["tasks"]):
        raise ValueError(f"{path}: written by an older version; run `rad tasks` again")
    return manifest


def task_configuration(tasks: Path, name: str) -> dict[str, Any]:
    """The lm-eval configuration of one built task, its data file resolved against `tasks`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    content: dict[str, Any] = load_yaml(tasks / "yaml" / f"{name}.yaml", resolve_func=True)
    files = content["dataset_kwargs"]["data_files"]
    del content["dataset_path"]
    content["custom_dataset"] = read_documents
    content["dataset_kwargs"] = {
        "data_files": {split: str((tasks / file).resolve()) for split, file in files.items()}
    }
    return content


def load_tasks(tasks: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's tasks of a built folder, those that have data; imports no torch.

    Raises `ValueError` when the folder has no task at all.
    """
    if not manifest["tasks"]:
        raise ValueError(
            f"{tasks}: no tasks; name some under evaluation.tasks or evaluation.suites"
        )
    ready = [entry["name"] for entry in manifest["tasks"] if entry["status"] == "ready"]
    from lm_eval.tasks import TaskManager

    # without the tasks that lm-eval ships, which take seconds to index
    manager = TaskManager(include_defaults=False)
    loaded: dict[str, Any] = manager.load([task_configuration(tasks, name) for name in ready])
    return loaded

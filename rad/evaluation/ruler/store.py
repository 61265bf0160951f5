"""Documents as files: one JSON Lines file per task and length with a sidecar, made once.

    <folder>/<task>/<length>.jsonl    a document per line
    <folder>/<task>/<length>.json     what they were made from, fill ratio, variant, sha256

A file is kept when its sidecar names the same inputs and its bytes have the sha256 that the sidecar
names; a torn or edited one is made again. The sidecar is written last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rad.evaluation.ruler import tasks
from rad.evaluation.ruler.generate import VERSION, Builder
from rad.evaluation.ruler.words import word_lists
from rad.evaluation.sources import Document
from rad.files import digest, file_digest, read_json, write_json, write_text


class Kept(NamedTuple):
    """Documents, what the sidecar says, and whether they had to be made."""

    documents: list[Document]
    facts: dict[str, Any]
    made: bool


@dataclass(frozen=True)
class Store:
    """A folder of documents; `tokenizer` is the digest of the tokenizer that counts."""

    folder: Path
    builder: Builder
    tokenizer: str

    def path(self, task: str, length: int) -> Path:
        """The documents' file; the sidecar has the ending `.json`."""
        return self.folder / task / f"{length}.jsonl"

    def inputs(self, task: str, length: int, samples: int, seed: int) -> dict[str, Any]:
        """Everything that the bytes of a file depend on."""
        found, builder = tasks.find(task), self.builder
        values: dict[str, Any] = {
            "version": VERSION,
            "task": task,
            "length": length,
            "samples": samples,
            "seed": seed,
            "new_tokens": found.new_tokens,
            "tokenizer_sha256": self.tokenizer,
        }
        if found.essay:
            values["haystack"] = builder.texts.facts()
        if found.family in ("niah", "cwe"):
            lists = word_lists()
            values["words"] = {"wonderwords": lists.version, "sha256": lists.sha256}
        if found.dataset in builder.questions:
            values["questions"] = builder.questions[found.dataset].facts()
        if builder.wrap:
            values["chat"] = digest(builder.wrap("text", "prefix"))
        return values

    def facts(self, task: str, length: int, samples: int, seed: int) -> dict[str, Any] | None:
        """The sidecar when file and sidecar are whole and of these inputs, else None."""
        path = self.path(task, length)
        try:
            found: dict[str, Any] = read_json(path.with_suffix(".json"))
            same = found["fingerprint"] == digest(self.inputs(task, length, samples, seed))
            return found if same and found["sha256"] == file_digest(path) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def ensure(self, task: str, length: int, samples: int, seed: int) -> Kept:
        """The documents of (task, length), from their file or made now; `TaskError` as `Builder`'s.

        What other files hold never changes.
        """
        path = self.path(task, length)
        if (facts := self.facts(task, length, samples, seed)) is not None:
            lines = path.read_text("utf-8").split("\n")[:-1]
            return Kept([json.loads(line) for line in lines], facts, made=False)
        documents, made = self.builder.documents(task, length, samples, seed)
        inputs = self.inputs(task, length, samples, seed)
        rows = (json.dumps(document, ensure_ascii=False) for document in documents)
        write_text(path, "".join(f"{row}\n" for row in rows))
        facts = {
            **inputs,
            **made,
            "fingerprint": digest(inputs),
            "sha256": file_digest(path),
        }
        write_json(path.with_suffix(".json"), facts)
        return Kept(documents, facts, made=True)

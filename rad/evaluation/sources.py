"""Documents of each task kind: nano families, GSM8K, CRUXEval and running text.

A document is a mapping with `prompt` and `target` (perplexity: `text`) and what its scorer needs.
Every function is deterministic in its arguments. No torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rad.evaluation.scorers import parse_literal
from rad.settings import TaskSettings

Document = dict[str, Any]
Count = Callable[[str], int]  # tokens of a text, with the <s> that the model will see

# The two worked examples of CRUXEval's direct output prompt (facebookresearch/cruxeval, MIT).
_CRUX_SHOTS = (
    ("def f(n):\n    return n", "17", "17"),
    ('def f(s):\n    return s + "a"', '"x9j"', '"x9ja"'),
)


class TaskError(ValueError):
    """A task cannot be built from its settings; the message names the task and the remedy."""


# --- files ----------------------------------------------------------------------------------


def read_texts(task: str, files: Sequence[str], root: Path, key: str = "files") -> list[str]:
    """The contents of `files` (relative to `root`); raises `TaskError` naming task and file."""
    if not files:
        raise TaskError(f"evaluation.tasks.{task}.{key}: this kind of task needs at least one file")
    texts = []
    for name in files:
        path = root / name
        try:
            texts.append(path.read_text(encoding="utf-8").replace("\r\n", "\n"))
        except OSError as error:
            raise TaskError(
                f"evaluation.tasks.{task}.{key}: cannot read {path} ({error.strerror})"
            ) from error
        except UnicodeDecodeError as error:
            raise TaskError(f"evaluation.tasks.{task}.{key}: {path} is not UTF-8 text") from error
    return texts


def read_rows(
    task: str, files: Sequence[str], root: Path, fields: Sequence[str], key: str = "files"
) -> list[Document]:
    """The rows of JSON Lines files; raises `TaskError` when a line lacks one of `fields`."""
    rows = []
    for name, text in zip(files, read_texts(task, files, root, key), strict=True):
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            where = f"evaluation.tasks.{task}.{key}: {root / name} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{where} is not JSON ({error.msg})") from error
            missing = [field for field in fields if not isinstance(row.get(field), str)]
            if missing:
                raise TaskError(f"{where} lacks the text field {missing[0]!r}")
            rows.append(row)
    return rows


# --- nano -----------------------------------------------------------------------------------


def nano(
    name: str, settings: TaskSettings, count: int, seed: int, **options: Any
) -> list[Document]:
    """`count` documents of a nano family, for instance with `task="vt", tokens=96`."""
    from rad.data.nano import generate

    try:
        examples = generate(settings.kind, settings.split, seed, count, **options)
    except ValueError as error:
        raise TaskError(f"evaluation.tasks.{name}: {error}") from error
    documents = []
    for example in examples:
        document: Document = {"prompt": example.prompt, "target": example.answer}
        if settings.kind == "ruler_nano":
            document["references"] = [example.answer.strip()]
        documents.append(document)
    return documents


# --- GSM8K ----------------------------------------------------------------------------------


def gsm8k(
    task: str, settings: TaskSettings, root: Path, probes: int, count: Count, limit: int
) -> tuple[list[Document], list[Document]]:
    """(test documents, probe documents) with the first `shots` rows of the shot files in front.

    The prompt is that of lm-eval's gsm8k version 3; the worked examples are the same for every
    question. A probe is a later row of the shot files with its worked steps in the prompt and only
    the final number to be predicted: nobody's own steps are word for word those of the data.
    Raises `TaskError` saying how many examples fit when these do not.
    """
    fields = ("question", "answer")
    rows = read_rows(task, settings.files, root, fields)[: settings.samples]
    wanted = settings.shots
    shots: list[Document] = []
    if wanted or settings.shot_files:
        shots = read_rows(task, settings.shot_files, root, fields, "shot_files")
    if len(shots) < wanted:
        raise TaskError(
            f"evaluation.tasks.{task}.shots: {wanted} examples asked for, the shot files have "
            f"{len(shots)}"
        )

    def question(row: Document, used: int) -> str:
        worked = [
            f"Question: {shot['question']}\nAnswer: {shot['answer']}" for shot in shots[:used]
        ]
        return "\n\n".join([*worked, f"Question: {row['question']}\nAnswer:"])

    room = limit - settings.max_new_tokens
    longest = max(rows, key=lambda row: count(question(row, 0)))
    if wanted and count(question(longest, wanted)) > room:
        fitting = [used for used in range(wanted) if count(question(longest, used)) <= room]
        fit = f"{fitting[-1]} would fit" if fitting else "not even none would fit"
        raise TaskError(
            f"evaluation.tasks.{task}.shots: {wanted} worked examples, the longest question and "
            f"{settings.max_new_tokens} new tokens need "
            f"{count(question(longest, wanted)) + settings.max_new_tokens} tokens, the limit is "
            f"{limit}; {fit} (or raise evaluation.max_length)"
        )

    def document(row: Document) -> Document:
        return {"prompt": question(row, wanted), "target": " " + row["answer"]}

    def final_number(row: Document) -> Document:
        steps, _, number = row["answer"].rpartition("#### ")
        return {"prompt": f"{question(row, 0)} {steps}####", "target": f" {number.strip()}"}

    probe = [final_number(row) for row in shots[wanted : wanted + 4 * probes]]
    fits = [item for item in probe if count(item["prompt"] + item["target"]) <= limit]
    return [document(row) for row in rows], fits[:probes]


# --- CRUXEval -------------------------------------------------------------------------------


def _crux_prompt(code: str, argument: str, answer: str = "") -> str:
    return f"{code}\nassert f({argument}) =={answer}"


def crux(
    task: str, settings: TaskSettings, root: Path, probes: int
) -> tuple[list[Document], list[Document]]:
    """(test documents, probe documents) of CRUXEval output prediction.

    The prompt is the function and `assert f(input) ==`, after up to two worked examples. Probes
    come from the end of the file, never from the documents that are scored.
    """
    rows = read_rows(task, settings.files, root, ("code", "input", "output"))
    for row in rows:
        if not parse_literal(row["output"])[0]:
            name = row.get("id", row["input"])
            raise TaskError(f"evaluation.tasks.{task}: the output of {name} is not a literal")
    if settings.shots > len(_CRUX_SHOTS):
        raise TaskError(f"evaluation.tasks.{task}.shots: at most {len(_CRUX_SHOTS)} of kind crux")
    worked = [_crux_prompt(c, i, f" {o}") for c, i, o in _CRUX_SHOTS[: settings.shots]]

    def document(row: Document) -> Document:
        prompt = "\n\n".join([*worked, _crux_prompt(row["code"], row["input"])])
        return {"prompt": prompt, "target": f" {row['output']}"}

    test = rows[: settings.samples]
    spare = rows[max(len(test), len(rows) - probes) :] if probes else []
    return [document(row) for row in test], [document(row) for row in spare]


# --- running text ---------------------------------------------------------------------------

_PARAGRAPH = re.compile(r"\n\s*\n")
# Project Gutenberg puts its own header and licence around a book.
_BOOK = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*)\*\*\* ?END OF", re.DOTALL)


def paragraphs(text: str) -> list[str]:
    """Paragraphs between empty lines, or the lines; without the wrapping of Project Gutenberg."""
    book = _BOOK.search(text)
    text = book.group(1) if book else text
    parts = [part for part in _PARAGRAPH.split(text) if part.strip()]
    chosen = parts if len(parts) > 1 else text.split("\n")
    return [part.strip("\n") for part in chosen if part.strip()]


def _pieces(text: str, room: int, count: Count) -> list[str]:
    """`text` cut at spaces into pieces of at most `room` tokens."""
    if count(text) <= room:
        return [text]
    words = text.split(" ")
    if len(words) == 1:
        middle = len(text) // 2
        halves = [text[:middle], text[middle:]]
    else:
        middle = len(words) // 2
        halves = [" ".join(words[:middle]), " ".join(words[middle:])]
    return [piece for half in halves for piece in _pieces(half, room, count) if piece]


def blocks(texts: Sequence[str], room: int, count: Count) -> list[str]:
    """Consecutive paragraphs joined into blocks of at most `room` tokens."""
    result: list[str] = []
    current, used = "", 0
    for text in texts:
        for paragraph in paragraphs(text):
            for piece in _pieces(paragraph, room, count):
                size = count(piece)
                if current and used + size + 2 > room:
                    result.append(current)
                    current, used = "", 0
                current = f"{current}\n{piece}" if current else piece
                used += size + 1
        if current:  # blocks do not cross files
            result.append(current)
            current, used = "", 0
    return result


def perplexity(
    task: str, settings: TaskSettings, root: Path, count: Count, limit: int
) -> list[Document]:
    """`samples` blocks of text spread evenly over the files, each of at most `limit` tokens."""
    found = blocks(read_texts(task, settings.files, root), limit - 1, count)
    if not found:
        raise TaskError(f"evaluation.tasks.{task}.files: no text in {', '.join(settings.files)}")
    wanted = min(settings.samples, len(found))
    chosen = [found[index * len(found) // wanted] for index in range(wanted)]
    prefix = count("")
    return [
        {
            "text": text,
            "tokens": count(text) - prefix,
            "words": len(text.split()),
            "bytes": len(text.encode("utf-8")),
        }
        for text in chosen
    ]

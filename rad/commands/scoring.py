"""The verb `score`: stored outputs scored again, without a model.

A file of outputs has one JSON object per line with `id`, `output` (a text, or a list of texts for
several samples) and, unless the gold answers come from a data file, `answer`. Nothing here imports
torch, transformers or lm-eval.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rad.commands.options import OPTIONAL, Verb
from rad.evaluation.scoring import contains, cruxeval, literals, numbers, ruler, zeroeval
from rad.files import write_text

Document = dict[str, Any]
Row = dict[str, Any]
Responses = Sequence[Any]  # the text; for tasks with `code` the list of samples
Scores = dict[str, float]

# A longer line is no record of outputs, and would fill the memory before that shows.
LINE_LIMIT = 64 * 2**20
# What stands before the position of a row in ZeroEval's ids.
_GSM_ID = "gsm8k-main-test-#"
_CRUX_ID = "crux-test-#"

# --- scorers --------------------------------------------------------------------------------


def _ruler(document: Document, responses: Responses) -> Scores:
    return ruler.ruler_results({"match": "all", **document}, responses)


def _ruler_qa(document: Document, responses: Responses) -> Scores:
    return ruler.ruler_results({"match": "part", **document}, responses)


def _retrieval(document: Document, responses: Responses) -> Scores:
    return {**_ruler(document, responses), **contains.recall_results(document, responses)}


# --- gold answers ---------------------------------------------------------------------------


def _number(value: Any) -> Document:
    """The number of a GSM8K answer, after `####` if that is there."""
    last = _text(value).rpartition("####")[2].replace("#", "").strip()
    number = numbers.normalise_number(last)
    if not numbers.same_number(number, number):
        raise ValueError("is not a number")
    return {"target": number}


def _literal(value: Any) -> Document:
    text = _text(value).strip()
    if not literals.parse_literal(text)[0]:
        raise ValueError("is not a Python literal")
    return {"target": text}


def _references(value: Any) -> Document:
    wanted = [value] if isinstance(value, str) else value
    texts = isinstance(wanted, list) and all(isinstance(text, str) and text for text in wanted)
    if not texts or not wanted:
        raise ValueError("must be text or a list of texts, not empty")
    return {"references": wanted}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


@dataclass(frozen=True)
class Scorable:
    """How a task is scored and where its gold answers are.

    `gold` turns an answer into what `score` wants of a document, raising `ValueError` (what is
    wrong with it). `field` holds it in a row of the data file, whose place below a data folder is
    that of `dataset`. `ids` stands before the position of a row in ids given by position. Tasks
    that need `code` take every gold answer from the data file, and score all samples at once.
    """

    score: Callable[[Document, Responses], Scores]
    gold: Callable[[Any], Document]
    dataset: str | None = None
    field: str = "answer"
    ids: str = ""
    code: bool = False
    rules: bool = False


_GSM: dict[str, Any] = {"gold": _number, "dataset": "gsm8k", "ids": _GSM_ID}
_CRUX: dict[str, Any] = {
    "gold": _literal,
    "dataset": "cruxeval",
    "field": "output",
    "ids": _CRUX_ID,
}
_OUTPUT = Scorable(cruxeval.cruxeval_output_results, code=True, **_CRUX)
_INPUT = Scorable(cruxeval.cruxeval_input_results, code=True, **_CRUX)
_RECALL = ("swde", "fda", "squad_completion")
_MADE = ("kv_retrieval", "record_recall", "qa_recall")

SCORABLE: dict[str, Scorable] = {
    "gsm_zeroeval": Scorable(zeroeval.gsm_zeroeval_results, rules=True, **_GSM),
    "crux_zeroeval": Scorable(zeroeval.crux_zeroeval_results, rules=True, **_CRUX),
    "gsm8k": Scorable(numbers.gsm_results, **_GSM),
    "gsm8k_cot": Scorable(numbers.gsm_cot_results, **_GSM),
    "gsm8k_cot_llama": Scorable(numbers.gsm_cot_llama_results, **_GSM),
    "crux": Scorable(literals.crux_results, **_CRUX),
    "cruxeval_output": _OUTPUT,
    "cruxeval_output_cot": _OUTPUT,
    "cruxeval_input": _INPUT,
    "cruxeval_input_cot": _INPUT,
    "ruler": Scorable(_ruler, _references),
    "ruler_qa": Scorable(_ruler_qa, _references),
    "retrieval": Scorable(_retrieval, _references),
    **{name: Scorable(contains.recall_results, _references) for name in _MADE},
    **{
        name: Scorable(contains.recall_results, _references, dataset=name, field="value")
        for name in _RECALL
    },
}


def scorable(task: str) -> Scorable:
    """The entry of a task; raises `ValueError` with the closest names."""
    if task in SCORABLE:
        return SCORABLE[task]
    close = difflib.get_close_matches(task, SCORABLE, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"tasks: {', '.join(SCORABLE)}"
    raise ValueError(f"task {task!r} cannot be scored; {hint}")


# --- files ----------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, object) of every line; raises `ValueError` naming file and line."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if line.strip():
                    where = f"{path} line {number}"
                    yield where, _row(where, line)
    except OSError as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{path}: {what}") from error


def _row(where: str, line: bytes) -> Row:
    if len(line) > LINE_LIMIT:
        raise ValueError(f"{where} is longer than {LINE_LIMIT // 2**20} MiB")
    try:
        row = json.loads(line.decode("utf-8-sig").strip())
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    except ValueError as error:
        if line.startswith(b"{") and not line.endswith(b"\n"):
            raise ValueError(
                f"{where} is cut off: the file is half-written; write it again or drop that line"
            ) from error
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(f"{where} is not UTF-8 text") from error
        what = str(error)
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg}, column {error.colno}"
        raise ValueError(f"{where} is not JSON ({what})") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be an object with id and output, not {_kind(row)}")
    return row


def _field(where: str, row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"{where} lacks the field {name!r} (it has {', '.join(row) or 'none'})")
    return row[name]


def _id(where: str, row: Row) -> str:
    value = _field(where, row, "id")
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{where}: id must be text or a whole number, not {_kind(value)}")
    return str(value)


def _output(where: str, row: Row) -> str | list[str]:
    value = _field(where, row, "output")
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return value
    what = _kind(value) if not isinstance(value, list) else "a list of anything else"
    raise ValueError(f"{where}: output must be text or a list of texts, not {what}")


def _gold(where: str, row: Row, field: str, entry: Scorable, code: bool = False) -> Document:
    """What `score` wants of a row whose gold answer is in `field`."""
    value = _field(where, row, field)
    try:
        document = entry.gold(value)
        for field in ("code", "input", "output") if code else ():
            document[field] = _text(_field(where, row, field))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {field} {text}") from error
    return document


def read_gold(task: str, data: Path) -> dict[str, Document]:
    """Gold answers by id, of a data file, a folder of data sets or a folder of built tasks.

    Rows without `id` are named by their position, as in ZeroEval. Raises `ValueError` naming file
    and line.
    """
    entry = scorable(task)
    path = data
    if data.is_dir():
        path = data / "data" / f"{task}.jsonl"  # as `rad tasks` writes it
        if entry.dataset is not None and not path.is_file():
            from rad.evaluation.data import DATASETS

            path = data / DATASETS[entry.dataset].file
    found: dict[str, Document] = {}
    for position, (where, row) in enumerate(_lines(path)):
        # the first two are fields of documents of a built task
        field = next((name for name in ("references", "target") if name in row), entry.field)
        document = {**row, **_gold(where, row, field, entry, entry.code)}
        name = _id(where, row) if "id" in row else f"{entry.ids}{position}"
        if name in found:
            raise ValueError(f"{where}: id {name!r} is there twice")
        found[name] = document
    if not found:
        raise ValueError(f"{path}: no rows (the file is empty)")
    return found


def _known_as(name: str, entry: Scorable) -> list[str]:
    """Names of one row: its id, and what CRUXEval, ZeroEval and a bare position make of it."""
    number = re.fullmatch(rf"(?:{re.escape(entry.ids)}|sample_)?([0-9]+)", name)
    if not entry.ids or number is None:
        return [name]
    return [name, f"{entry.ids}{number[1]}", f"sample_{number[1]}", number[1]]


# --- the verb -------------------------------------------------------------------------------


def score_file(
    task: str,
    path: Path,
    *,
    data: Path | None = None,
    rules: str | None = None,
    boxed: bool = False,
    output: Path | None = None,
) -> dict[str, Any]:
    """Score the outputs in `path`; returns `task`, `n`, the means of the metrics and `intervals`.

    Intervals are Wilson's at 95 %. For scores between 0 and 1 (several samples, shares of
    references) they are on the safe side. With `data`, `missing` counts its rows without an output.
    With `output`, a record per row is written there. Raises `ValueError` naming file and line.
    """
    from rad.reporting.statistics import wilson

    entry = scorable(task)
    if (rules is not None or boxed) and not entry.rules:
        raise ValueError(f"task {task} has no choice of rules: leave out --rules and --boxed")
    if entry.code and data is None:
        raise ValueError(f"task {task} needs the functions: name their file or folder with --data")
    options: Document = {"rules": rules or "original", "boxed": boxed} if entry.rules else {}
    gold = None if data is None else read_gold(task, data)

    seen: dict[str, str] = {}
    totals: dict[str, list[float]] = {}
    records: list[str] = []
    samples = None
    for where, row in _lines(path):
        name, response = _id(where, row), _output(where, row)
        document = _document(where, row, name, entry, gold, data)
        key = next((k for k in _known_as(name, entry) if gold is not None and k in gold), name)
        if key in seen:
            raise ValueError(f"{where}: id {name!r} is there twice (first in {seen[key]})")
        seen[key] = where.removeprefix(f"{path} ")
        count = 1 if isinstance(response, str) else len(response)
        if count != (samples := samples or count):
            raise ValueError(f"{where}: {count} outputs, but {samples} in the lines before")
        scores = _scores(entry, {**document, **options}, response)
        for metric, value in scores.items():
            totals.setdefault(metric, []).append(value)
        if output is not None:
            target = document.get("target", document.get("references"))
            record = {"task": task, "id": name, "target": target, "response": response, **scores}
            records.append(json.dumps(record) + "\n")
    n = len(seen)
    if n == 0:
        raise ValueError(f"{path}: no outputs (the file is empty)")
    if output is not None:
        _write(output, path, records)
    sums = {metric: math.fsum(values) for metric, values in totals.items()}
    report: dict[str, Any] = {"task": task, "n": n}
    if samples is not None and samples > 1:
        report["samples"] = samples
    if entry.rules:
        report |= options
    if gold is not None:
        report["missing"] = len(gold) - n
    report |= {metric: value / n for metric, value in sums.items()}
    report["intervals"] = {metric: list(wilson(value, n)) for metric, value in sums.items()}
    return report


def _scores(entry: Scorable, document: Document, response: str | list[str]) -> Scores:
    """Scores of a response; means over its samples where the scorer does not want all of them."""
    if isinstance(response, str) or entry.code:
        return entry.score(document, [response])
    found = [entry.score(document, [sample]) for sample in response]
    return {metric: math.fsum(s[metric] for s in found) / len(found) for metric in found[0]}


def _document(
    where: str,
    row: Row,
    name: str,
    entry: Scorable,
    gold: Mapping[str, Document] | None,
    data: Path | None,
) -> Document:
    """The gold of a row, from the row or the data; both must agree when both have it."""
    own = _gold(where, row, "answer", entry) if "answer" in row and not entry.code else None
    if gold is None:
        if own is None:
            raise ValueError(f"{where} has no answer: add the field, or name the data with --data")
        return own
    found = next((gold[known] for known in _known_as(name, entry) if known in gold), None)
    if found is None:
        raise ValueError(
            f"{where}: id {name!r} is not in {data} (there: {next(iter(gold))!r}, ...)"
        )
    if own is not None and any(found.get(key) != value for key, value in own.items()):
        raise ValueError(f"{where}: the answer is not the one that {data} has for id {name!r}")
    return found


def _write(output: Path, path: Path, records: Sequence[str]) -> None:
    try:
        if output.exists() and output.samefile(path):
            raise ValueError(f"--output {output}: is the file of outputs itself")
        write_text(output, "".join(records))
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from error


def score(args: argparse.Namespace) -> None:
    """Score stored outputs (fields id, output[, answer]) without a model."""
    report = score_file(
        args.task,
        args.file,
        data=args.data,
        rules=args.rules,
        boxed=args.boxed,
        output=args.output,
    )
    print(json.dumps(report, indent=2))


VERBS: dict[str, Verb] = {
    "score": (
        score,
        [
            ("task", {"help": "gsm_zeroeval, crux_zeroeval, gsm8k, cruxeval_output, ..."}),
            ("file", {"type": Path, "help": "outputs, one JSON object per line"}),
            ("--data", {**OPTIONAL, "help": "file or folder with the gold answers"}),
            (
                "--rules",
                {"choices": ["original", "upstream"], "default": None, "help": "of ZeroEval"},
            ),
            ("--boxed", {"action": "store_true", "help": "ZeroEval: take \\boxed{...} too"}),
            ("--output", {**OPTIONAL, "help": "JSON Lines with a record per output"}),
        ],
    ),
}

"""`rad score`: published numbers from stored outputs, and what it says about bad files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from rad.cli import main
from rad.commands.scoring import LINE_LIMIT, SCORABLE, score_file

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no benchmark files at {SHARED} (set RAD_SHARED)"
)
MODELS = ["Meta-Llama-3.1-8B-Instruct", "Qwen2-7B-Instruct", "Mamba2InLlama_0_50_v2"]


def write(path: Path, *rows: Any, end: str = "\n") -> Path:
    """JSON Lines; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def right(name: str | int, answer: str = "1") -> dict[str, Any]:
    return {"id": name, "output": json.dumps({"answer": answer}), "answer": answer}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a call that fails."""
    assert main(["score", *map(str, arguments)]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.startswith("rad score: error: ")
    assert streams.err.count("\n") == 1
    return streams.err.removeprefix("rad score: error: ").rstrip("\n")


# --- scores ---------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", ["gsm", "crux"])
def test_published_numbers(task: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = SHARED / "zeroeval"
    lines = json.loads((folder / f"published_{task}.summary.json").read_text("utf-8"))
    [line] = [line for line in lines if line["Model"].strip() == model]
    assert main(["score", f"{task}_zeroeval", str(folder / f"{task}__{model}.jsonl")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == f"{task}_zeroeval"
    assert report["n"] == line["Total"]
    assert f"{100 * report['exact_match']:.2f}" == line["Acc"]
    assert f"{100 * report['no_answer']:.2f}" == line["No answer"]
    for metric in ("exact_match", "semantic_match", "no_answer", "upstream_match"):
        assert isinstance(report[metric], float)
        count = round(report[metric] * report["n"])
        assert report[metric] == count / report["n"]  # full precision
        interval = binomtest(count, report["n"]).proportion_ci(method="wilson")
        assert report["intervals"][metric] == pytest.approx([interval.low, interval.high])


@needs_data
@pytest.mark.parametrize("task", ["gsm", "crux"])
def test_gold_answers_come_from_the_data(task: str, tmp_path: Path) -> None:
    """By ZeroEval's ids, by position, and from the folder or the file."""
    stored = SHARED / "zeroeval" / f"{task}__{MODELS[0]}.jsonl"
    expected = score_file(f"{task}_zeroeval", stored)
    assert score_file(f"{task}_zeroeval", stored, data=SHARED) == {**expected, "missing": 0}
    rows = [json.loads(line) for line in stored.read_text("utf-8").split("\n") if line]
    bare = [{"id": number, "output": row["output"]} for number, row in enumerate(rows)]
    file = SHARED / {"gsm": "gsm8k/test.jsonl", "crux": "cruxeval/cruxeval.jsonl"}[task]
    path = write(tmp_path / "bare.jsonl", *reversed(bare[5:]))
    report = score_file(f"{task}_zeroeval", path, data=file)
    assert report["n"] == len(rows) - 5
    assert report["missing"] == 5
    rest = score_file(f"{task}_zeroeval", write(tmp_path / "rest.jsonl", *rows[5:]))
    assert {**rest, "missing": 5} == report


@needs_data
@pytest.mark.parametrize("task", ["cruxeval_output", "cruxeval_input"])
def test_cruxeval_takes_the_functions_from_the_data(task: str, tmp_path: Path) -> None:
    lines = (SHARED / "cruxeval" / "cruxeval.jsonl").read_text("utf-8").split("\n")[:20]
    outputs = []
    for number, row in enumerate(map(json.loads, lines)):
        gold = row["output"] if task == "cruxeval_output" else f"f({row['input']})"
        # calls of f: the official rule skips answers without one
        samples = [gold, "f(*[1] * 9)", "f(open('x', 'w'))", "f("]
        outputs.append({"id": f"crux-test-#{number}", "output": samples})
    report = score_file(task, write(tmp_path / "a.jsonl", *outputs), data=SHARED)
    assert report["n"] == 20
    assert report["samples"] == 4
    assert report["pass@1"] == pytest.approx(0.25)


def test_rules_and_boxed_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "outputs.jsonl",
        {"id": "a", "output": '{"answer": ""}', "answer": "''"},
        {"id": "b", "output": "\\boxed{7}", "answer": "7"},
    )
    exact = {}
    for options in ([], ["--rules", "upstream"], ["--boxed"], ["--rules", "upstream", "--boxed"]):
        assert main(["score", "crux_zeroeval", str(path), *options]) == 0
        report = json.loads(capsys.readouterr().out)
        exact[" ".join(options)] = (report["exact_match"], report["rules"], report["boxed"])
    assert exact == {
        "": (0.0, "original", False),
        "--rules upstream": (0.5, "upstream", False),
        "--boxed": (0.5, "original", True),
        "--rules upstream --boxed": (1.0, "upstream", True),
    }


@pytest.mark.parametrize(
    ("task", "answer", "output", "scores"),
    [
        ("gsm8k", "So.\n#### 18", "It is 18.\n#### 18", (1, 1, 1, 0)),
        ("gsm8k", "# 18", "It is $18.00", (0, 0, 1, 0)),
        ("gsm8k", "18", "#### 18\nor 19", (1, 0, 0, 0)),
        ("gsm8k", "18", "eighteen", (0, 0, 0, 1)),
        ("gsm8k_cot", "1,800", "The answer is 1800.", (1, 1, 1, 0)),
        ("gsm8k_cot", "18", "The final answer is 18", (0, 1, 1, 0)),
        ("gsm8k_cot_llama", "18", "The final answer is 1. The final answer is $18", (1, 1, 1, 0)),
        ("gsm8k_cot_llama", "18", "The answer is 18.", (0, 1, 1, 0)),
    ],
)
def test_word_problems(
    task: str, answer: str, output: str, scores: tuple[int, ...], tmp_path: Path
) -> None:
    path = write(tmp_path / "o.jsonl", {"id": "a", "output": output, "answer": answer})
    report = score_file(task, path)
    names = ("exact_match", "flexible_match", "semantic_match", "no_answer")
    assert tuple(report[name] for name in names) == scores


def test_retrieval_answers_may_be_lists(tmp_path: Path) -> None:
    path = write(
        tmp_path / "o.jsonl",
        {"id": "a", "output": "one and TWO", "answer": ["one", "two", "three", "four"]},
        {"id": "b", "output": "none", "answer": "five"},
    )
    assert score_file("ruler", path)["string_match"] == 0.25
    assert score_file("ruler_qa", path)["string_match"] == 0.5
    assert score_file("retrieval", path)["string_match"] == 0.25


def test_samples_are_averaged_and_records_written(tmp_path: Path) -> None:
    good, bad = '{"answer": "1"}', '{"answer": "\ud800\u2028"}'
    path = write(
        tmp_path / "o.jsonl",
        {"id": "a", "output": [good, bad], "answer": "1"},
        "",
        {"id": "b", "output": [good, good], "answer": "1"},
    )
    report = score_file("crux_zeroeval", path, output=tmp_path / "new" / "samples.jsonl")
    assert (report["n"], report["samples"], report["exact_match"]) == (2, 2, 0.75)
    lines = (tmp_path / "new" / "samples.jsonl").read_text("utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    assert [(r["task"], r["id"], r["target"], r["exact_match"]) for r in records] == [
        ("crux_zeroeval", "a", "1", 0.5),
        ("crux_zeroeval", "b", "1", 1.0),
    ]
    assert records[0]["response"] == [good, bad]


def test_documents_of_a_built_task_are_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    document = {"id": "7", "prompt": "p", "target": "x", "references": ["x", "y"], "match": "part"}
    write(tmp_path / "data" / "ruler.jsonl", document)
    path = write(tmp_path / "o.jsonl", {"id": 7, "output": "an X"})
    assert score_file("ruler", path, data=tmp_path)["string_match"] == 1
    document = {"id": "0", "prompt": "p", "target": " So it is.\n#### 1,800"}
    write(tmp_path / "data" / "gsm8k.jsonl", document)
    row = {"id": "gsm8k-main-test-#0", "output": "#### 1800", "answer": "# 1800"}
    report = score_file("gsm8k", write(tmp_path / "o.jsonl", row), data=tmp_path)
    assert report["exact_match"] == 1


def test_recall_reads_the_usual_rows(tmp_path: Path) -> None:
    data = write(tmp_path / "swde.jsonl", {"text": "t", "value": "a"}, {"text": "t", "value": "B"})
    path = write(tmp_path / "o.jsonl", {"id": 1, "output": "b."}, {"id": 0, "output": "none"})
    report = score_file("swde", path, data=data)
    assert (report["contains"], report["exact_match"]) == (0.5, 0.5)


def test_line_separators_and_windows_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    row = json.dumps(right("a", "x\u2028y\u0085z"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n" + json.dumps(right("b")).encode())
    with pytest.raises(ValueError, match=r"line 1: answer is not a Python literal"):
        score_file("crux_zeroeval", path)
    row = json.dumps(right("a", "'x\u2028y\u0085z'"), ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n" + json.dumps(right("b")).encode())
    assert score_file("crux_zeroeval", path)["exact_match"] == 1


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", right("a"))
    code = (
        "import sys; from rad.cli import main\n"
        f"assert main(['score', 'crux_zeroeval', {str(path)!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


# --- bad input ------------------------------------------------------------------------------

GOOD = right("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "{path}: no outputs (the file is empty)"),
        (b"\n \n", "{path}: no outputs (the file is empty)"),
        (b"{}\n", "{path} line 1 lacks the field 'id' (it has none)"),
        (b'{"id": 1}\n', "{path} line 1 lacks the field 'output' (it has id)"),
        (b'{"id": 1, "output": "x"}\n', "{path} line 1 has no answer: "),
        (b'{"id": null, "output": "x"}\n', "{path} line 1: id must be text or a whole number, "),
        (b'{"id": true, "output": "x"}\n', "{path} line 1: id must be text or a whole number, "),
        (b'{"id": 1.5, "output": "x"}\n', "{path} line 1: id must be text or a whole number, "),
        (b'{"id": 1, "output": null}\n', "{path} line 1: output must be text or a list of texts"),
        (b'{"id": 1, "output": 5}\n', "{path} line 1: output must be text or a list of texts"),
        (b'{"id": 1, "output": []}\n', "{path} line 1: output must be text or a list of texts"),
        (b'{"id": 1, "output": [5]}\n', "{path} line 1: output must be text or a list of texts"),
        (
            b'{"id": 1, "output": "x", "answer": 5}\n',
            "{path} line 1: answer must be text, not a number",
        ),
        (
            b'{"id": 1, "output": "x", "answer": "f("}\n',
            "{path} line 1: answer is not a Python literal",
        ),
        (b"[1]\n", "{path} line 1 must be an object with id and output, not a list"),
        (b"GOOD\nhello\n", "{path} line 2 is not JSON (Expecting value, column 1)"),
        (b"hello", "{path} line 1 is not JSON (Expecting value, column 1)"),
        (b'GOOD\n{"id": 1, "outp', "{path} line 2 is cut off: the file is half-written; "),
        (b'GOOD\n{"id": 1, "output": "\xc3', "{path} line 2 is cut off: the file is half-written"),
        (b'GOOD\n{"id": 1, "outp\nGOOD\n', "{path} line 2 is not JSON (Unterminated string"),
        (b'{"id": "\xff"}\n', "{path} line 1 is not UTF-8 text"),
        (b"\x1f\x8b\x08\x00", "{path} line 1 is not UTF-8 text"),
        (b"GOOD\nGOOD\n", "{path} line 2: id 'a' is there twice (first in line 1)"),
        (b'{"id":' + b"[" * 10**5 + b"\n", "{path} line 1 is nested too deeply"),
        (b'{"id": ' + b"1" * 5000 + b"}\n", "{path} line 1 is not JSON (Exceeds the limit"),
        (
            b'GOOD\n{"id": "b", "output": ["x", "y"], "answer": "1"}\n',
            "{path} line 2: 2 outputs, but 1 in the lines before",
        ),
    ],
)
def test_bad_files_get_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outputs.jsonl"
    path.write_bytes(content.replace(b"GOOD", json.dumps(GOOD).encode()))
    samples = tmp_path / "samples.jsonl"
    text = refusal(capsys, "crux_zeroeval", path, "--output", samples)
    assert text.startswith(message.format(path=path))
    assert not samples.exists()


def test_bad_arguments_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "o.jsonl", GOOD)
    none = tmp_path / "none.jsonl"
    assert refusal(capsys, "crux_zeroeval", none) == f"{none}: no such file"
    assert refusal(capsys, "crux_zeroeval", tmp_path) == f"{tmp_path}: Is a directory"
    text = refusal(capsys, "gsm_zeroval", path)
    assert text.startswith("task 'gsm_zeroval' cannot be scored; did you mean gsm_zeroeval")
    text = refusal(capsys, "poetry", path)
    assert text == f"task 'poetry' cannot be scored; tasks: {', '.join(SCORABLE)}"
    text = refusal(capsys, "gsm8k", path, "--rules", "upstream")
    assert text == "task gsm8k has no choice of rules: leave out --rules and --boxed"
    text = refusal(capsys, "cruxeval_input", path)
    assert text.startswith("task cruxeval_input needs the functions: ")
    text = refusal(capsys, "gsm8k", write(tmp_path / "n.jsonl", {**GOOD, "answer": "#### many"}))
    assert text == f"{tmp_path / 'n.jsonl'} line 1: answer is not a number"
    text = refusal(capsys, "ruler", write(tmp_path / "r.jsonl", {**GOOD, "answer": []}))
    assert text.endswith("line 1: answer must be text or a list of texts, not empty")
    text = refusal(capsys, "crux_zeroeval", path, "--output", path)
    assert text == f"--output {path}: is the file of outputs itself"
    assert json.loads(path.read_text("utf-8")) == GOOD
    text = refusal(capsys, "crux_zeroeval", path, "--output", path / "below.jsonl")
    assert "cannot be written" in text


def test_bad_data_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = {"id": "crux-test-#1", "output": "x"}
    path = write(tmp_path / "o.jsonl", bare)
    row = {"code": "def f(x): return x", "input": "1", "output": "1"}
    data = tmp_path / "d.jsonl"

    def said(*rows: Any, task: str = "crux_zeroeval", outputs: Path = path) -> str:
        write(data, *rows)
        return refusal(capsys, task, outputs, "--data", data)

    assert said(row) == (
        f"{path} line 1: id 'crux-test-#1' is not in {data} (there: 'crux-test-#0', ...)"
    )
    assert said({"code": ""}) == f"{data} line 1 lacks the field 'output' (it has code)"
    assert said({**row, "output": "f()"}) == f"{data} line 1: output is not a Python literal"
    assert said({**row, "id": "a"}, {**row, "id": "a"}) == f"{data} line 2: id 'a' is there twice"
    assert said("nothing") == f"{data} line 1 is not JSON (Expecting value, column 1)"
    missing = {"id": "sample_1", "input": "1", "output": "1"}
    assert said(missing, task="cruxeval_output") == (
        f"{data} line 1 lacks the field 'code' (it has id, input, output)"
    )
    text = said({**missing, "code": 5}, task="cruxeval_output")
    assert text == f"{data} line 1: code must be text, not a number"
    wrong = write(tmp_path / "w.jsonl", {**bare, "answer": "2"})
    text = said(row, row, outputs=wrong)
    assert text == (
        f"{wrong} line 1: the answer is not the one that {data} has for id 'crux-test-#1'"
    )
    twice = write(tmp_path / "t.jsonl", bare, {**bare, "id": "sample_1"}, {**bare, "id": 1})
    assert said(row, row, outputs=twice) == (
        f"{twice} line 2: id 'sample_1' is there twice (first in line 1)"
    )
    write(data, end="")
    assert refusal(capsys, "crux_zeroeval", path, "--data", data).startswith(f"{data}: no rows")
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    text = refusal(capsys, "crux_zeroeval", path, "--data", nowhere)
    assert text == f"{nowhere / 'cruxeval' / 'cruxeval.jsonl'}: no such file"


def test_a_line_without_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": "')
        file.truncate(4 * LINE_LIMIT)  # a sparse file: zeros to the end
    assert refusal(capsys, "crux_zeroeval", path) == f"{path} line 1 is longer than 64 MiB"

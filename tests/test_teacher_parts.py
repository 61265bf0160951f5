"""A corpus shared by several jobs of one teacher, students that read while it is written."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation_fixture import ROWS, job, random_corpus, untimed, weights
from teacher_driver import SETTINGS, teacher, writer

from rad.data.corpus import Corpus
from rad.distillation import loop, shards
from rad.distillation.batches import Batches
from rad.distillation.shards import row_order
from rad.distillation.stored import StoredError, StoredOutputs
from rad.distillation.teacher_outputs import merge, write_outputs
from rad.distillation.teachers import StoredTeacher
from rad.files import read_json, write_json
from rad.models import sources

ROOT = Path(__file__).resolve().parent.parent
DRIVER = Path(__file__).with_name("teacher_driver.py")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the records of parts."""
    files = folder.iterdir()
    return {path.name: path.read_bytes() for path in files if not path.name.startswith("part-")}


def at_once(corpus: Corpus, out: Path, kind: str = "hidden", **changes: Any) -> dict[str, bytes]:
    """What a single job writes."""
    one = writer(corpus.folder, out, kind, **changes)
    one.start()
    one.part()
    merge(out)
    return contents(out)


@pytest.fixture(scope="module")
def driver() -> Iterator[Callable[..., int]]:
    """Starts a process that writes a part, or waits for one: what the driver answers."""
    with subprocess.Popen(
        [sys.executable, str(DRIVER)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        to, back = process.stdin, process.stdout

        def ask(*words: object) -> int:
            print(*words, file=to, flush=True)
            return int(back.readline())

        yield ask
        to.close()


def tokens_of(corpus: Corpus, rows: list[int], split: str = "train") -> torch.Tensor:
    return torch.from_numpy(corpus.rows(split)[rows].astype(np.int64))


# --- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order_seed", [None, 3])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_number_of_parts_changes_no_byte(
    corpus: Corpus, tmp_path: Path, kind: str, order_seed: int | None
) -> None:
    whole = at_once(corpus, tmp_path / "whole", kind, order_seed=order_seed)
    out = tmp_path / "out"
    writer(corpus.folder, out, kind, order_seed=order_seed).start()
    for part in (2, 0, 1):
        with pytest.raises(StoredError, match="shards are missing, the first is"):
            merge(out)
        writer(corpus.folder, out, kind, order_seed=order_seed).part(part, 3)
    merge(out)
    assert contents(out) == whole
    assert len(list(out.glob("part-*"))) == 3
    StoredOutputs(out, verify=True)


def test_parts_of_another_number_go_on_with_what_is_there(corpus: Corpus, tmp_path: Path) -> None:
    whole = at_once(corpus, tmp_path / "whole")
    out = tmp_path / "out"
    one = writer(corpus.folder, out)
    one.start()
    one.part(1, 3)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    one.part(0, 2)
    one.part(1, 2)
    merge(out)
    assert contents(out) == whole
    assert all((out / name).stat().st_mtime_ns == moment for name, moment in times.items())


def test_a_killed_part_goes_on_where_it_stopped(
    corpus: Corpus, tmp_path: Path, driver: Callable[..., int]
) -> None:
    whole = at_once(corpus, tmp_path / "whole", "sampled")
    out = tmp_path / "out"
    one = writer(corpus.folder, out, "sampled")
    one.start()
    process = driver(corpus.folder, out, "sampled", 0, 2, 0.05)
    while len(list(out.glob("*-*.json"))) < 3:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert driver(process) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in out.glob("*-*.json")}
    left = out / ".train-00004.ids.npy.abcdef"
    left.write_bytes(b"half")  # as a kill in the middle of writing leaves it
    one.part(1, 2)
    with pytest.raises(StoredError, match="run the parts again"):
        merge(out)
    one.part(0, 2)
    merge(out)
    assert contents(out) == whole  # and nothing temporary
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow further, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_a_part_with_one_line(corpus: Corpus, tmp_path: Path) -> None:
    whole = at_once(corpus, tmp_path / "whole")
    out = tmp_path / "out"
    one = writer(corpus.folder, out)
    with largest_file(2000), pytest.raises(StoredError, match="make room and run the same"):
        one.start()
    assert contents(out) == {}
    one.start()
    one.part(0, 2)
    with largest_file(2000), pytest.raises(StoredError, match="make room and run the same"):
        one.part(1, 2)
    one.part(1, 2)
    merge(out)
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "top_k"}, "another kind"),
        ({"teacher_sha256": "other"}, "another teacher_sha256"),
        ({"dtype": "bfloat16"}, "another dtype"),
        ({"order_seed": 1}, "another order_seed"),
        ({"vocabulary": 90}, "another vocabulary"),
        ({"corpus_folder": "isolated"}, "another corpus_sha256"),
    ],
)
def test_a_part_of_something_else_is_refused(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    writer(corpus.folder, out).start()
    before = contents(out)
    changes = dict(changes)
    folder = corpus.folder
    if name := changes.pop("corpus_folder", None):
        folder = random_corpus(tmp_path / name, "isolate").folder
    other = writer(folder, out, **changes)
    for step in (other.start, other.part):
        with pytest.raises(StoredError, match=f"holds teacher outputs with {message}; remove it"):
            step()
    assert contents(out) == before


def test_parts_need_a_start_and_a_number(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = writer(corpus.folder, out)
    for step in (one.part, lambda: merge(out)):
        with pytest.raises(StoredError, match=r"start\.json: no such file: write the start"):
            step()
    one.start()
    for part, parts in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(StoredError, match=f"part {part} of {parts}: parts are counted from 0"):
            one.part(part, parts)
    (out / "head.safetensors").unlink()
    with pytest.raises(StoredError, match=r"head\.safetensors: missing or cut off; write the st"):
        one.part()
    one.start()
    one.part()


@pytest.mark.parametrize("names", [["start.json"], ["manifest.json"], ["start.json", "mani*"]])
def test_records_that_a_workflow_removes_are_written_again(
    corpus: Corpus, tmp_path: Path, names: list[str]
) -> None:
    """Snakemake removes the outputs that it knows before a job is repeated; shards stay."""
    out = tmp_path / "out"
    whole = at_once(corpus, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    for name in names:
        for path in out.glob(name):
            path.unlink()
    with pytest.raises(StoredError, match="another"):
        writer(corpus.folder, out, teacher_sha256="other").start()
    assert at_once(corpus, out) == whole
    assert all((out / name).stat().st_mtime_ns == moment for name, moment in times.items())


def test_a_shard_of_another_start_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    at_once(corpus, out)
    write_json(out / "start.json", read_json(out / "start.json") | {"teacher_sha256": "other"})
    with pytest.raises(StoredError, match=r"train-0000\d\.json|held_out-0000\d\.json: a shard of"):
        merge(out)


# --- order ----------------------------------------------------------------------------------


def test_stored_order_is_that_of_the_students_first_epoch(corpus: Corpus) -> None:
    start = {"rows": ROWS, "order_seed": 7}
    seen = np.concatenate([Batches(corpus, 4, 7).index(step) for step in range(10)])
    assert row_order(start, "train").tolist() == seen.tolist()
    assert sorted(seen) == list(range(40)) != seen.tolist()
    assert row_order(start, "held_out").tolist() == list(range(6))
    assert row_order({"rows": ROWS}, "train").tolist() == list(range(40))


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_order_moves_rows_and_changes_none(corpus: Corpus, tmp_path: Path, kind: str) -> None:
    at_once(corpus, tmp_path / "plain", kind)
    at_once(corpus, tmp_path / "moved", kind, order_seed=3)
    rows = [39, 0, 17, 4]
    tokens = tokens_of(corpus, rows)
    plain, moved = (
        StoredOutputs(tmp_path / name).read("train", tokens, rows) for name in ("plain", "moved")
    )
    for name, values in plain.items():
        if values.dtype == torch.int64 or (kind == "sampled" and name == "weights"):
            assert torch.equal(moved[name], values)  # draws depend on the row, not on its place
        else:  # batches of other rows round differently
            torch.testing.assert_close(moved[name], values, atol=1e-5, rtol=1e-3)


# --- reading while it is written ------------------------------------------------------------


class Clock:
    """Time for who waits: what has to happen meanwhile happens whenever it sleeps."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        self.now, self.meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile()


def trained(corpus: Corpus, stored: StoredTeacher) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Curve and weights of a student of stored outputs."""
    student = job(corpus, teacher=stored, vocabulary=stored.vocabulary)
    return untimed(loop.train(student)), weights(student)


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_a_student_that_waits_for_a_slow_teacher_becomes_the_same(
    corpus: Corpus,
    tmp_path: Path,
    kind: str,
    capfd: pytest.CaptureFixture[str],
    driver: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    writer(corpus.folder, out, kind).start()
    with pytest.raises(StoredError, match="incomplete; run the command"):
        StoredTeacher(out, corpus, vocab_size=96)
    early = StoredTeacher(out, corpus, vocab_size=96, wait_minutes=5)
    started: list[int] = []
    command = (corpus.folder, out, kind, 0, 1, 0.05)

    def teach() -> None:
        if not started:  # the student waits already
            started.append(driver(*command))
        time.sleep(0.05)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "time", Clock(teach))
        curve, student = trained(corpus, early)
    assert driver(started[0]) == 0
    said = capfd.readouterr().err
    assert "teacher outputs: waiting for shard train-" in said
    assert ", 0 of " in said  # nothing was there when it started
    assert not (out / "manifest.json").exists()
    merge(out)
    again, other = trained(corpus, StoredTeacher(out, corpus, vocab_size=96))
    assert curve == again
    assert student.keys() == other.keys()
    assert all(torch.equal(student[name], other[name]) for name in student)


def test_a_teacher_that_does_not_come_is_given_up(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = writer(corpus.folder, out)
    with pytest.raises(StoredError, match=r"no teacher outputs: .*manifest\.json: no such file"):
        StoredOutputs(out, wait_minutes=0.01)
    one.start()
    one.part(0, 2)
    stored = StoredOutputs(out, wait_minutes=0.01)
    tokens = tokens_of(corpus, list(range(6)), "held_out")
    with pytest.raises(StoredError, match=r"no shard arrived for 0\.01 minutes, \d+ of \d+ are th"):
        stored.read("held_out", tokens, range(6))
    one.part(1, 2)
    stored.read("held_out", tokens, range(6))


def test_waiting_goes_on_as_long_as_shards_come(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards come more often than the limit, and the wanted one only after several limits."""
    out = tmp_path / "out"
    whole = tmp_path / "whole"
    at_once(corpus, whole)
    writer(corpus.folder, out).start()
    last = sorted(whole.glob("train-*.json"))[-1]
    limit = 1.2
    coming = iter(sorted(whole.glob("*-*[0-9].json"), key=lambda path: path == last)[-8:])

    def deliver() -> None:
        record = next(coming)
        for path in whole.glob(f"{record.stem}.*.npy"):
            shutil.copyfile(path, out / path.name)
        (out / record.name).write_bytes(record.read_bytes())

    stored = StoredOutputs(out, wait_minutes=limit / 60)
    clock = Clock(deliver)
    assert limit > shards.POLL_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr(shards, "time", clock)
        found = stored.read("train", tokens_of(corpus, [39]), [39])["hidden"]
    assert clock.now > 2 * limit and next(coming, None) is None
    complete = StoredOutputs(whole).read("train", tokens_of(corpus, [39]), [39])["hidden"]
    assert torch.equal(found, complete)


def test_a_signal_ends_waiting_at_once(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer(corpus.folder, out).start()
    stored = StoredOutputs(out, wait_minutes=60)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(loop.Interrupted, match="stopped while waiting for shard train-0000"):
        stored.read("train", tokens_of(corpus, [0]), [0])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_shard_cut_off_is_waited_for_and_a_changed_one_named(
    corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    at_once(corpus, out)
    (out / "manifest.json").unlink()
    path = out / "train-00000.hidden.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(StoredError, match="train-00000 is not"):
        StoredOutputs(out, wait_minutes=0.005).read("train", tokens_of(corpus, [0]), [0])
    path.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(StoredError, match=r"train-00000\.hidden\.npy: its content has changed"):
        StoredOutputs(out, verify=True, wait_minutes=1).read("train", tokens_of(corpus, [0]), [0])


# --- a teacher in pieces --------------------------------------------------------------------


def test_a_device_map_loads_the_same_model() -> None:
    pytest.importorskip("accelerate")
    plain = sources.load("nano:base")
    tokens = torch.arange(24).unsqueeze(0)
    whole: dict[str, str | int] = {"": "cpu"}
    for device_map in ("auto", whole):
        placed = sources.load("nano:base", device_map=device_map)
        assert not placed.training
        with torch.no_grad():
            assert torch.equal(placed(tokens).logits, plain(tokens).logits)


def test_weights_that_stay_on_disk_are_refused() -> None:
    pytest.importorskip("accelerate")
    names = [f"model.layers.{index}" for index in range(8)]
    places: dict[str, str | int] = dict.fromkeys(["lm_head", *names[:-1]], "cpu")
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    with pytest.raises(sources.ModelError, match=r"tensors \(model\.layers\.7\..* do not fit"):
        sources.load("nano:base", device_map=places | {"model.layers.7": "disk"})


def test_a_teacher_laid_over_devices_writes_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    """Two pieces with accelerate's hooks between them, both on the CPU for want of two GPUs."""
    accelerate = pytest.importorskip("accelerate")
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.rotary_emb"], "cpu")
    places |= dict.fromkeys(["model.layers.1", "model.layers.2", "model.norm", "lm_head"], "cpu")
    model = accelerate.dispatch_model(teacher(), places, main_device="cpu", force_hooks=True)
    assert hasattr(model.model.layers[1], "_hf_hook")
    write_outputs(model, corpus.folder, tmp_path / "out", "hidden", teacher_sha256="teacher")
    write_outputs(teacher(), corpus.folder, tmp_path / "one", "hidden", teacher_sha256="teacher")
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


# --- the workflow ---------------------------------------------------------------------------

OVERLAY = """
variant: parts
corpora: {distil: {tokens: 16384, held_out_tokens: 4096}}
recipes:
  kl: {log_points: 2, stages: [{tokens: 16384, batch_size: 16, learning_rate: 2.0e-3}]}
grid:
  - view: controlled
    selector: uniform
    budget: {fraction: 0.25}
    recipe: kl
    teacher: [medium, large]
teacher_outputs:
  medium: {shard_mb: 1, parts: 3}
  large: {shard_mb: 1, parts: 2, stream: true, order: students, wait_minutes: 1}
references: [base]
evaluation:
  probe_samples: 4
  tasks:
    gsm_nano: {samples: 4}
    gsm_hard: {samples: 4}
    crux_nano: {samples: 4}
    crux_hard: {samples: 4}
    ruler_nano: {samples: 2, lengths: [64]}
  efficiency: {contexts: [64], decode_tokens: 2}
"""


def _snakemake(folder: Path, *arguments: str) -> str:
    overlay = folder / "overlay.yaml"
    overlay.write_text(OVERLAY)
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory"]
    command += [str(folder), "--configfile", str(overlay), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _planned(text: str, rule: str) -> list[str]:
    """What a dry run says of every job of a rule."""
    return [part for part in text.split("\nrule ") if part.startswith(f"{rule}:")]


def test_the_workflow_plans_parts_and_students_that_read_early(tmp_path: Path) -> None:
    text = _snakemake(tmp_path, "-n", "-p").replace("\nlocalrule ", "\nrule ")
    counts = {"teacher_start": 2, "teacher_part": 5, "teacher_merge": 2, "teacher_outputs": 0}
    for rule, count in counts.items():
        assert len(_planned(text, rule)) == count
    students = _planned(text, "distil")
    assert len(students) == 2
    for student in students:
        early = "-large-" in student
        needed = "large/start" if early else "medium/manifest"
        assert f"teachers/{needed}.json" in student
        assert ("--teacher-wait 1" in student) == early
    for part in _planned(text, "teacher_part"):
        assert "--shard-mb 1" in part
        assert ("--order-seed 0" in part) == ("teachers/large" in part)


def test_how_outputs_are_written_is_no_part_of_a_runs_specification() -> None:
    from rad.settings import TeacherOutputsSettings

    plain = TeacherOutputsSettings().model_dump(mode="json")
    how = {"parts": 3, "stream": True, "wait_minutes": 5, "device_map": "auto"}
    assert TeacherOutputsSettings.model_validate(how).model_dump(mode="json") == plain
    other = TeacherOutputsSettings(order="students").model_dump(mode="json")
    assert other != plain


@pytest.mark.slow
def test_one_core_is_enough_for_students_that_read_early(tmp_path: Path) -> None:
    """Parts go before students: nobody waits for a job that cannot start."""
    _snakemake(tmp_path, "--cores", "1")
    results = tmp_path / "results" / "nano-parts"
    for name in ("medium", "large"):
        assert read_json(results / "teachers" / name / "manifest.json")["complete"]
    assert (results / "report.html").exists()

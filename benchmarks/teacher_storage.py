"""What storing a teacher's outputs costs in bytes, and in the quality of its students.

    python -m benchmarks.teacher_storage [--tokens 49152] [--seeds 3] [--kind "top_k, 64"]

`nano:large` teaches `nano:base` with 6 of 8 layers kept: once live, once per kind of storage, with
the same rows in the same order. Every student is measured against the live teacher, so that the
figures of all kinds mean the same. Seconds are CPU time of one thread, because the machine may be
shared. Bytes of a 70B teacher follow from the formula alone; nothing of that size is run.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rad.data.corpus import Corpus, build
from rad.distillation import loop
from rad.distillation.encoding import Encoder
from rad.distillation.measure import HeldOut
from rad.distillation.targets import LogitHead
from rad.distillation.teacher_outputs import write_outputs
from rad.distillation.teachers import StoredTeacher
from rad.evaluation.build import build_tasks
from rad.evaluation.probe import probe_of
from rad.models import sources
from rad.models.convert import convert
from rad.placement import Placement
from rad.settings import CorpusSettings, EvaluationSettings, Mamba2Settings, StageSettings

TEACHER, BASE = "nano:large", "nano:base"
KEPT = [0, 1, 2, 3, 4, 5]  # few enough new layers that students answer after 49k tokens
KINDS: dict[str, dict[str, Any]] = {
    "hidden, float32": {"kind": "hidden", "dtype": "float32"},
    "hidden, bfloat16": {"kind": "hidden", "dtype": "bfloat16"},
    "top_k, 16": {"kind": "top_k", "k": 16},
    "top_k, 64": {"kind": "top_k", "k": 64},
    "top_k, 256": {"kind": "top_k", "k": 256},
    "sampled, 12": {"kind": "sampled", "k": 12},
    "sampled, 50": {"kind": "sampled", "k": 50},
}
TASKS = {
    "gsm_nano": {"kind": "gsm_nano", "samples": 1},
    "crux_nano": {"kind": "crux_nano", "samples": 1},
    "ruler_nano": {
        "kind": "ruler_nano",
        "subtasks": ["single", "multikey", "vt"],
        "samples": 1,
        "lengths": [64, 96],
    },
}
# Llama-3.1-70B: vocabulary, hidden size
LARGE, LARGE_TOKENS, CONTEXT = (128_256, 8192), 10**9, 8192


class Bench:
    """Corpus, tasks and models that all rows share."""

    def __init__(self, folder: Path, tokens: int, corpus_tokens: int, probes: int) -> None:
        self.folder, self.tokens = folder, tokens
        self.tokenizer = sources.load_tokenizer(BASE)
        settings = {"source": "nano", "tokens": corpus_tokens, "context": 128}
        build(
            "distil",
            CorpusSettings.model_validate({**settings, "held_out_tokens": 8192, "seed": 11}),
            self.tokenizer,
            folder / "corpus",
        )
        self.corpus = Corpus(folder / "corpus")
        evaluation = EvaluationSettings.model_validate({"probe_samples": probes, "tasks": TASKS})
        build_tasks(evaluation, str(sources.resolve(BASE)), folder / "tasks")
        self.base = sources.load(BASE).requires_grad_(False)
        self.teacher = sources.load(TEACHER).requires_grad_(False)
        self.measure = HeldOut(
            self.corpus,
            self.base,
            self.teacher,
            probe=probe_of(folder / "tasks", probes)(self.tokenizer),
        )

    def store(self, name: str) -> tuple[StoredTeacher, dict[str, Any], float]:
        """Outputs of the teacher as KINDS says: who reads them, the manifest, CPU seconds."""
        out = self.folder / name.replace(", ", "-")
        start = time.process_time()
        manifest = write_outputs(
            self.teacher, self.corpus.folder, out, teacher_sha256="large", **KINDS[name]
        )
        spent = time.process_time() - start
        size = self.base.config.vocab_size
        return StoredTeacher(out, self.corpus, vocab_size=size), manifest, spent

    def student(self, teacher: Any, seed: int) -> tuple[dict[str, Any], float]:
        """The last record of a student's curve, and the CPU seconds of its steps."""
        spent = 0.0

        def measured(model: Any) -> dict[str, Any]:
            nonlocal spent
            start = time.process_time()
            record = self.measure(model)
            spent -= time.process_time() - start
            return record

        kept = Placement.from_layers(
            KEPT, layers=8, heads=4, kv_heads=2, base="base", selector="uniform"
        )
        mixer = {"name": "mamba2", **Mamba2Settings(chunk=64).model_dump()}
        job = loop.Job(
            student=convert(self.base, kept, mixer, "qkvo", seed=seed),
            base=self.base,
            teacher=teacher,
            corpus=self.corpus,
            stages=[StageSettings(tokens=self.tokens, batch_size=8, learning_rate=2e-3)],
            seed=seed,
            measure=measured,
            log_points=1,
            title=f"seed {seed}",
        )
        start = time.process_time()
        record = loop.train(job)[-1]
        return record, spent + time.process_time() - start


def row(name: str, found: list[tuple[dict[str, Any], float]], *before: str) -> None:
    """One line of the table: means over the seeds, the spread of the KL behind it."""
    records = [record for record, _ in found]
    kl = [record["held_out_teacher_kl"] for record in records]
    spread = statistics.stdev(kl) if len(kl) > 1 else 0.0
    shares: Callable[[str], float] = lambda task: statistics.mean(  # noqa: E731
        value
        for record in records
        for key, value in record["probe"].items()
        if key.startswith(task)
    )
    entropy = statistics.mean(record["held_out_ce"] for record in records)
    seconds = statistics.mean(spent for _, spent in found)
    scores = " | ".join(f"{shares(task):.3f}" for task in ("gsm", "crux", "ruler"))
    print(
        f"| {name} | {' | '.join(before)} | {statistics.mean(kl):.4f} ({spread:.4f}) "
        f"| {entropy:.4f} | {scores} | {seconds:.0f} |",
        flush=True,
    )


def students_part(options: argparse.Namespace) -> None:
    """The table of all kinds."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), options.tokens, options.corpus_tokens, options.probes)
        rows = {split: len(bench.corpus.rows(split)) for split in ("train", "held_out")}
        print(
            f"{TEACHER} -> {BASE}, layers {KEPT} kept; corpus {rows} rows of "
            f"{bench.corpus.context}, students trained on {options.tokens} tokens, "
            f"{options.seeds} seeds, {options.probes} probe documents per task"
        )
        print(
            "| kind | bytes/token | loss, nats/token | writing, s | held-out KL (sd over seeds) "
            "| CE | gsm | crux | ruler | training, s |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        seeds = range(options.seeds)
        if not options.kind:
            record = bench.measure(bench.base)
            row("base, not converted", [(record, 0.0)], "-", "-", "-")
            live = [bench.student(bench.teacher, seed) for seed in seeds]
            row("live", live, "0", "0", "0")
        for kind in options.kind or KINDS:
            teacher, manifest, spent = bench.store(kind)
            loss = manifest["loss"]
            error = f" ± {loss['standard_error']:.1e}" if "standard_error" in loss else ""
            found = [bench.student(teacher, seed) for seed in seeds]
            before = (
                f"{manifest['bytes_per_token']:.1f}",
                f"{loss['kl']:.2g}{error}",
                f"{spent:.0f}",
            )
            row(kind, found, *before)


def large_part() -> None:
    """Bytes of a 70B teacher: at most, since equal draws are merged."""
    head = LogitHead(torch.empty(LARGE, dtype=torch.bfloat16, device="meta"))
    print(f"\nLlama-3.1-70B: vocabulary {LARGE[0]}, hidden {LARGE[1]}, {LARGE_TOKENS:.0e} tokens")
    print("| kind | bytes/token, at most | TB |\n|---|---|---|")
    for name, settings in KINDS.items():
        dtype = {"top_k": "float16", "sampled": "float32"}.get(settings["kind"])
        spec = {
            "kind": settings["kind"],
            "k": settings.get("k", 0),
            "dtype": settings.get("dtype", dtype),
            "temperature": 1.0,
            "vocabulary": LARGE[0],
        }
        size = Encoder(head, spec).bytes_per_token + 4 / CONTEXT  # and a check of each row
        print(f"| {name} | {size:.0f} | {size * LARGE_TOKENS / 1e12:.3g} |")
    logits = LARGE[0] * 2
    print(f"| all logits, bfloat16 | {logits} | {logits * LARGE_TOKENS / 1e12:.3g} |")


def main() -> None:
    """Print both tables."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--tokens", type=int, default=49_152)
    options.add_argument("--corpus-tokens", type=int, default=65_536)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--probes", type=int, default=96)
    options.add_argument("--kind", choices=KINDS, action="append", help="default: live and all")
    torch.set_num_threads(1)
    large_part()
    students_part(options.parse_args())


if __name__ == "__main__":
    main()

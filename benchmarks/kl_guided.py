"""KL-guided GA-S2 on the nano base: one job with a shared teacher against one job per layer.

    python -m benchmarks.kl_guided [--tokens 40000] [--early-stop]

A job per layer is what the published procedure runs: a process of its own for every candidate, with
its own start, its own teacher passes and its own held-out reference. Both train the same candidates
on the same tokens with the same code; the separate jobs are started one after the other. Times are
CPU seconds of the processes on one thread, start included, so other work on the machine hardly
counts. Only one job can stop early: the rule compares the candidates while they train.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rad.data import corpus as corpora
from rad.distillation.align import align
from rad.models import sources
from rad.placement import Budget
from rad.selection.base import SelectionContext
from rad.selection.base import select as run
from rad.selection.candidates import Candidate, Candidates, Shared
from rad.settings import AlignmentSettings, CorpusSettings, KLGuidedSettings, Mamba2Settings

BASE = "nano:base"
MIXER = Mamba2Settings(chunk=64).model_dump()
CHECK_EVERY = 2


def prepare(folder: Path) -> None:
    """Corpus and stage-1 alignment, which every job starts from."""
    settings = CorpusSettings(
        source="nano",
        tokens=200_000,
        held_out_tokens=16_384,
        context=128,
        prompt_weight=0.1,
        seed=11,
    )
    corpora.build("distil", settings, sources.load_tokenizer(BASE), folder / "corpus")
    record = sources.describe("base", {"source": BASE, "revision": None, "dtype": "float32"})
    assert record is not None
    align(
        record,
        MIXER,
        AlignmentSettings(corpus="distil", tokens=65_536, batch_size=16, learning_rate=3e-3),
        corpus=folder / "corpus",
        state=folder / "state",
        output=folder / "aligned",
    )


def context_of(folder: Path, **settings: Any) -> SelectionContext:
    """The selection's inputs, read from disk as any job does."""
    return SelectionContext.for_model(
        sources.load(BASE),
        Budget(fraction=0.25),
        KLGuidedSettings(**settings),
        corpus=folder / "corpus",
        resources={"aligned": folder / "aligned", "mixer": MIXER},
    )


def one_candidate(folder: Path, layer: int, tokens: int) -> dict[str, float]:
    """What a job per layer does: its own teacher, one candidate."""
    context = context_of(folder, tokens=tokens)
    assert isinstance(context.settings, KLGuidedSettings)
    shared = Shared(context, context.settings)
    (result,) = Candidates(shared).score([Candidate(f"layer{layer}", layer, (layer,))])
    return {"held_out_kl": result.held_out}


def whole_job(folder: Path, tokens: int, early_stop: bool) -> dict[str, Any]:
    """All layers in one job, as `rad select kl_guided` does it, swap scores included."""
    placement = run(
        context_of(folder, tokens=tokens, early_stop=early_stop, check_every=CHECK_EVERY)
    )
    assert placement.scores is not None
    report = placement.provenance["kl_guided"]
    return {
        "scores": placement.scores.values,
        "kept": placement.kept_layers(),
        "steps": report["steps"],
        "spearman_swap_trained": report["ga_s2"]["spearman_swap_trained"],
    }


def timed(folder: Path, *arguments: str) -> tuple[float, dict[str, Any]]:
    """CPU seconds of this script in a process of its own, and what it found."""
    output = folder / "found.json"
    command = [sys.executable, "-m", "benchmarks.kl_guided", "--folder", str(folder)]
    start = _children()
    subprocess.run(
        [*command, *arguments, "--output", str(output)], check=True, stderr=subprocess.DEVNULL
    )
    return _children() - start, json.loads(output.read_text(encoding="utf-8"))


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(tokens: int) -> None:
    """Print CPU seconds and ratios of the three ways."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        budget = ["--tokens", str(tokens)]
        start, _ = timed(folder, *budget, "--job", "start")
        joint, found = timed(folder, *budget, "--job", "whole")
        separate, scores = 0.0, []
        for layer in range(len(found["scores"])):
            seconds, result = timed(folder, *budget, "--job", str(layer))
            separate += seconds
            scores.append(result["held_out_kl"])
        stopped, early = timed(folder, *budget, "--job", "whole", "--early-stop")
    differ = max(abs(a - b) for a, b in zip(scores, found["scores"], strict=True))
    print(f"GA-S2 on {BASE}, {len(scores)} candidates of {tokens} tokens")
    print(f"start of a job   {start:7.1f} s")
    print(f"{len(scores)} separate jobs  {separate:7.1f} s")
    print(f"one job          {joint:7.1f} s   ratio {separate / joint:.2f}")
    print(
        f"one, early stop  {stopped:7.1f} s   ratio {separate / stopped:.2f} "
        f"(step {early['steps']} of {found['steps']})"
    )
    print(f"largest difference of a held-out KL between jobs: {differ:.1e}")
    print(f"kept {found['kept']}, with early stop {early['kept']}")
    print(f"rank correlation of swap and trained scores: {found['spearman_swap_trained']:.3f}")


def main() -> None:
    """Compare, or run one of the jobs that the comparison starts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--job", help="`whole`, `start` or a layer; default: compare them")
    parser.add_argument("--early-stop", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.job is None:
        compare(options.tokens)
        return
    found: dict[str, Any] = {}
    if options.job == "start":
        context_of(options.folder, tokens=options.tokens)
    elif options.job == "whole":
        found = whole_job(options.folder, options.tokens, options.early_stop)
    else:
        found = one_candidate(options.folder, int(options.job), options.tokens)
    options.output.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

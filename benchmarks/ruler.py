"""RULER documents: CPU seconds and fill of our builder and of lm-eval's generators, in one run.

    python -m benchmarks.ruler --data ../shared/data --tokenizer ../shared/data/tokenizers/gpt2

12 tasks x 100 samples at 4096 tokens on one core; the peer is lm-eval 0.4.13's `tasks/ruler` with
the same tokenizer. Its question answering needs the hub, so that is ours alone; its essay tasks are
given the same books instead of the essays from the hub, cut at once into words. Tasks take turns,
one thread each; CPU seconds, as other work on the machine does not count then.
Fill is the share of (length - generated tokens) that prompts use, least and mean; above 1 a prompt
does not fit. Ours is written to files; the second pass over them makes nothing.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rad.evaluation.ruler import tasks
from rad.evaluation.ruler.build import available, builder_of
from rad.evaluation.ruler.store import Store
from rad.evaluation.tokenizer import counter, tokenizer_digest

Peer = Callable[[], list[dict[str, Any]]]
SEED = 1234


def peers(folder: str, words: list[str], length: int, samples: int) -> dict[str, Peer]:
    """lm-eval's generator of every task that runs without the hub."""
    import numpy as np
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, vt_utils
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import NEEDLE, generate_samples
    from transformers import GPT2TokenizerFast  # type: ignore[attr-defined]

    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    random.seed(SEED)
    np.random.seed(SEED)
    kinds = {"noise": "repeat", "needle": "needle", "essay": "essay"}
    haystacks = {"noise": " ".join(tasks.NOISE), "needle": NEEDLE, "essay": words}

    def niah(task: tasks.RulerTask) -> Peer:
        options, scaled = task.options, task.variants[0]
        return lambda: generate_samples(
            haystacks[options["haystack"]],
            TOKENIZER=tokenizer,
            max_seq_length=length,
            type_haystack=kinds[options["haystack"]],
            type_needle_k=f"{options['key']}s",
            type_needle_v=f"{options['value']}s",
            template=TEMPLATE,
            num_samples=samples,
            num_needle_k=scaled.get("keys", 1),
            num_needle_v=scaled.get("values", 1),
            num_needle_q=scaled.get("queries", 1),
        )

    def vt() -> list[dict[str, Any]]:
        make = vt_utils.sys_vartrack_w_noise_random
        example = make(tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
        rows: list[dict[str, Any]] = make(tokenizer, samples, length, icl_example=example)
        return rows

    found = {name: niah(task) for name, task in tasks.TASKS.items() if task.family == "niah"}
    found["vt"] = vt
    found["cwe"] = lambda: cwe_utils.sys_word_pair_random(samples, length, tokenizer)
    found["fwe"] = lambda: fwe_utils.sys_kwext(tokenizer, length, samples)
    return found


def timed(make: Callable[[], Any]) -> tuple[float, Any]:
    """(CPU seconds, result), with the function's own output kept off the screen."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        start = time.process_time()
        result = make()
        return time.process_time() - start, result


def main() -> None:
    """Print CPU seconds and fill of every task, and the sums."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True, help="GPT-2's vocab.json and merges.txt")
    parser.add_argument("--data", type=Path, required=True, help="books, XQuAD and nltk_data")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=100)
    args = parser.parse_args()
    os.environ.setdefault("NLTK_DATA", str(args.data / "nltk_data"))
    length, samples = args.length, args.samples

    start = time.process_time()
    count = counter(args.tokenizer)
    builder = builder_of("ruler", count, [], [], Path(), args.data)
    words = " ".join(builder.texts.load().paragraphs).split()
    loading = time.process_time() - start
    peer = peers(args.tokenizer, words, length, samples)
    names = list(dict.fromkeys(available(name, builder.questions) for name in tasks.TASKS))
    names = [n for n in names if tasks.EVERY[n].dataset in (None, *builder.questions)]

    ours = theirs = shared = 0.0
    print(f"{'task':<16} {'ours s':>7} {'fill':>13} {'lm-eval s':>10} {'fill':>13} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder), builder, tokenizer_digest(args.tokenizer))
        for name in names:
            seconds, kept = timed(lambda: store.ensure(name, length, samples, SEED))  # noqa: B023
            fill = kept.facts["fill"]
            ours += seconds
            line = f"{name:<16} {seconds:7.2f} {fill['min']:6.3f} {fill['mean']:6.3f}"
            if name in peer:
                other, rows = timed(peer[name])
                room = length - tasks.EVERY[name].new_tokens
                shares = [count(f"{row['input']} {row['gen_prefix']}") / room for row in rows]
                theirs, shared = theirs + other, shared + seconds
                mean = sum(shares) / len(shares)
                line += f" {other:10.2f} {min(shares):6.3f} {mean:6.3f} {other / seconds:6.1f}"
                line += f"  {sum(share > 1 for share in shares)} too long" * (max(shares) > 1)
            print(line, flush=True)
        print(f"{len(names)} tasks, ours: {ours:.1f} s (and {loading:.1f} s to read the texts)")
        print(f"{len(peer)} tasks that both have: {theirs / shared:.1f} times lm-eval's speed")
        again, made = timed(
            lambda: [store.ensure(name, length, samples, SEED).made for name in names]
        )
        print(f"second pass: {again:.2f} s, {sum(made)} of {len(made)} files made")
        if any(made):
            sys.exit(1)


if __name__ == "__main__":
    main()

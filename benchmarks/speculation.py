"""RAD's search on the nano base: quality per evaluation, agreement of objectives, cost, speed.

    python -m benchmarks.speculation [--part search|agreement|cost|decoding]

Peers are run in the same process: random search for the Gaussian process, the exhaustive optimum of
decoded acceptance for `matchness`, the selection by measured `throughput` for its cost, plain
greedy decoding for speculative decoding.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rad.data.corpus import build
from rad.models.sources import load, load_tokenizer
from rad.placement import Budget
from rad.selection import SelectionContext, select
from rad.selection.rad import Diagnosis
from rad.selection.search import search
from rad.selection.speculation_report import expected_jaccard, jaccard, speculate
from rad.selection.surrogate import Subset
from rad.settings import CorpusSettings, RadSettings

DRAWS = 10  # calibration draws of the search comparison
SEARCH_SEEDS = 20  # searches per draw
AGREEMENT_SEEDS = 5
KEPT = (2, 4, 6)  # of the 8 layers
PROMPTS = ("Tom has 3 apples. He buys 4 more.", "f(x) = x + 2", "once upon a time")


class Bench:
    """The nano base, a corpus as in config/nano.yaml, and values of all sets, computed once."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self.model = load("nano:base").eval()
        self.tokenizer = load_tokenizer("nano:base")
        self.layers = self.model.config.num_hidden_layers
        self.corpus = folder / "corpus"
        settings = CorpusSettings(
            source="nano", tokens=400000, held_out_tokens=16384, context=128, seed=11
        )
        self.corpus.mkdir()
        build("distil", settings, self.tokenizer, self.corpus)
        self._values: dict[tuple[str, int, int], dict[Subset, float]] = {}

    def context(self, keep: int, **settings: Any) -> SelectionContext:
        """A selection by RAD with the settings of config/nano.yaml but for `settings`."""
        chosen = RadSettings(**{"exit_threshold": 0.0, **settings})
        return SelectionContext.for_model(
            self.model, Budget(layers=keep), chosen, corpus=self.corpus
        )

    def values(self, objective: str, keep: int, draw: int) -> dict[Subset, float]:
        """The objective of every skip set on one draw of prompts."""
        key = (objective, keep, draw)
        if key not in self._values:
            context = self.context(keep, objective=objective, seed=draw)
            measure = Diagnosis(context, context.settings).objective  # type: ignore[arg-type]
            sets = itertools.combinations(range(self.layers), self.layers - keep)
            self._values[key] = {skip: measure(skip) for skip in sets}
        return self._values[key]


def best_of(values: dict[Subset, float]) -> Subset:
    """The first of the best sets."""
    return max(values, key=lambda skip: values[skip])


def search_part(bench: Bench) -> None:
    """How often a search finds the exhaustive optimum; no known pattern is tried first."""
    print(f"\nsearch: skip 4 of {bench.layers} layers, {DRAWS} draws x {SEARCH_SEEDS} seeds")
    print(f"{'objective':>12} {'tried':>10} {'bayesian':>9} {'random':>7}")
    for objective in ("acceptance", "matchness"):
        landscapes = [bench.values(objective, bench.layers - 4, draw) for draw in range(DRAWS)]
        for evaluations in (12, 16, 20, 30):
            hits = dict.fromkeys(("bayesian", "random"), 0)
            for draw, values in enumerate(landscapes):
                optimum = max(values.values())
                for method, seed in itertools.product(hits, range(SEARCH_SEEDS)):
                    found = search(
                        values.__getitem__,
                        bench.layers,
                        4,
                        method=method,
                        evaluations=evaluations,
                        initial=6,
                        seed=draw * SEARCH_SEEDS + seed,
                    )
                    hits[method] += found.value == optimum
            shares = [hits[method] / (DRAWS * SEARCH_SEEDS) for method in hits]
            tried = f"{evaluations}/{len(landscapes[0])}"
            print(f"{objective:>12} {tried:>10} {shares[0]:9.2f} {shares[1]:7.2f}")


def agreement_part(bench: Bench) -> None:
    """The set chosen by matchness beside the optimum of decoded acceptance, same prompts."""
    print(f"\nagreement: matchness's set with the optimum of acceptance, {AGREEMENT_SEEDS} seeds")
    print(f"{'kept':>5} {'overlap':>8} {'by chance':>10} {'Jaccard':>8} {'by chance':>10}  sets")
    for keep in KEPT:
        size = bench.layers - keep
        overlaps, indices, shown = [], [], []
        for seed in range(AGREEMENT_SEEDS):
            chosen = best_of(bench.values("matchness", keep, seed))
            optimum = best_of(bench.values("acceptance", keep, seed))
            overlaps.append(len({*chosen} & {*optimum}) / size)
            indices.append(jaccard(chosen, optimum))
            shown.append(f"{''.join(map(str, chosen))}/{''.join(map(str, optimum))}")
        chance = expected_jaccard(size, size, bench.layers)
        print(
            f"{keep:5d} {sum(overlaps) / len(overlaps):8.2f} {size / bench.layers:10.2f} "
            f"{sum(indices) / len(indices):8.2f} {chance:10.2f}  {' '.join(shown)}"
        )


def cost_part(bench: Bench) -> None:
    """Whole selections, keep 2 of 8: seconds and FLOPs of each objective against matchness."""
    print(f"\ncost: a selection keeping 2 of {bench.layers} layers, 16 prompts x 32 tokens")
    print(f"{'objective':>12} {'seconds':>8} {'ratio':>6} {'GFLOPs':>8} {'ratio':>6}  skipped")
    reference: tuple[float, float] | None = None
    for objective in ("matchness", "acceptance", "throughput"):
        context = bench.context(2, objective=objective, timed_prompts=0)
        start = time.process_time()
        placement = select(context)
        spent = time.process_time() - start
        flops = placement.cost.flops / 1e9
        reference = reference or (spent, flops)
        skipped = placement.provenance["search"]["skipped"]
        print(
            f"{objective:>12} {spent:8.1f} {spent / reference[0]:6.1f} {flops:8.1f} "
            f"{flops / reference[1]:6.1f}  {skipped}"
        )


def decoding_part(bench: Bench) -> None:
    """Speculative against plain greedy decoding with the best sets of acceptance."""
    print("\ndecoding: speculative against plain greedy, 64 tokens")
    print(f"{'skipped':>20} {'rate':>6} {'length':>7} {'analytic':>9} {'measured':>9} identical")
    for keep in KEPT:
        skip = best_of(bench.values("acceptance", keep, 0))
        report = speculate(
            bench.model, bench.tokenizer, PROMPTS * 4, skip, new_tokens=64, ignore_stop=True
        )
        measured = report["measured"]
        print(
            f"{skip!s:>20} {report['acceptance_rate']:6.2f} {report['acceptance_length']:7.2f} "
            f"{report['analytic_speed_up']:9.2f} {measured['speed_up']:9.2f} "
            f"{measured['identical']}/{measured['prompts']}"
        )


PARTS = {
    "search": search_part,
    "agreement": agreement_part,
    "cost": cost_part,
    "decoding": decoding_part,
}


def main() -> None:
    """Run the parts asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all of them")
    chosen = parser.parse_args().part or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in chosen:
            PARTS[name](bench)


if __name__ == "__main__":
    main()
